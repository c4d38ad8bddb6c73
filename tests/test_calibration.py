"""Calibration: from rows of text, or made-up windows of them, to a codebook."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from alknet_firewall import AlarmLevel, ConfigError, Firewall, InputError, _core
from alknet_firewall.cli import main
from alknet_firewall.evaluation.measure import MeasureOptions, measure_detector
from click.testing import CliRunner
from tiny_detector import BENIGN, HIDDEN_SIZE, LAYOUT, N_BLOCKS, SITES, ordinary_sentences

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from alknet_firewall.calibration import codebook, null
from alknet_firewall.calibration.activations import Layout, Learned, read_windows
from alknet_firewall.calibration.corpus import Row, read_corpora, sha256_of
from alknet_firewall.calibration.crossfit import (
    ORIGINS,
    Corpus,
    cross_fit,
    folds_of,
    numbered_folds,
)
from alknet_firewall.calibration.evaluate import evaluate, table
from alknet_firewall.calibration.fit import FitOptions, fit_scorer
from alknet_firewall.calibration.run import default_layout
from alknet_firewall.calibration.scorer import Scorer, pool, project
from alknet_firewall.calibration.windows import Windows

WIDTH = len(SITES) * HIDDEN_SIZE
OPTIONS = FitOptions(n_components=5, rounds=2)
TINY_LAYOUT = Layout(sites=SITES, **LAYOUT)
CLOSED_LAYOUT = dataclasses.replace(TINY_LAYOUT, closing=0, closing_every=10)
N_WINDOWS = 3


def learned(n_readouts: int) -> np.ndarray:
    """Vectors of some readouts of the tiny model."""
    shape = (n_readouts, N_BLOCKS, HIDDEN_SIZE)
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


def made_up_corpus(
    seed: int = 0, separation: float = 6.0, hidden_sources: tuple[int, ...] = ()
) -> Corpus:
    """Twenty sources of 80 texts; in an attack, the middle window stands out along one axis.

    In those of hidden sources none does.

    The axis is another one for each origin, and every source lies a little elsewhere.
    """
    rng = np.random.default_rng(seed)
    rows, windows = [], []
    for source in range(20):
        attack, origin = source < 12, ("user", "document")[source % 2]
        offset = 0.1 * rng.standard_normal(WIDTH)
        for text in range(80):
            kind = ("jailbreak" if origin == "user" else "indirect") if attack else "benign"
            family = "redirect" if kind == "indirect" else ""
            lang = "de" if text % 4 == 0 else ""
            name = f"text {source} {text}"
            rows.append(Row(name, attack, kind, f"source{source}", origin, family, lang))
            x = rng.standard_normal((N_WINDOWS, WIDTH)) + offset
            x[1, source % 2] += separation * (attack and source not in hidden_sources)
            windows.append(x)
    starts = N_WINDOWS * np.arange(len(rows) + 1)
    n_tokens = rng.integers(4, 600, len(rows))
    return Corpus(rows, Windows(np.concatenate(windows).astype(np.float16), starts), n_tokens)


def closed(corpus: Corpus, separation: float = 2.0) -> Corpus:
    """The corpus with closing tokens after the second and the third window of a text.

    Those after the second lie elsewhere in attacks.
    """
    closing = np.random.default_rng(9).standard_normal((2 * len(corpus.rows), WIDTH))
    closing[::2, 2] += separation * corpus.attack
    closed_by = (2 * np.arange(len(corpus.rows))[:, None] + [0, 0, 1]).ravel()
    windows = dataclasses.replace(
        corpus.windows, closing=closing.astype(np.float16), closed_by=closed_by
    )
    return dataclasses.replace(corpus, windows=windows)


def part_of(corpus: Corpus, texts: np.ndarray) -> Corpus:
    """Some texts of a corpus."""
    whole = corpus.windows
    starts = N_WINDOWS * np.arange(len(texts) + 1)
    windows = Windows(whole.x[whole.rows(texts)], starts)
    if whole.closing is not None:
        part = closed(Corpus([corpus.rows[t] for t in texts], windows, corpus.n_tokens[texts]))
        closing = whole.closing.reshape(-1, 2, WIDTH)[texts].reshape(-1, WIDTH)
        windows = dataclasses.replace(part.windows, closing=closing)
    return Corpus([corpus.rows[t] for t in texts], windows, corpus.n_tokens[texts])


@pytest.fixture(scope="module")
def corpus():
    return made_up_corpus()


class TestCrossFit:
    def test_folds_leave_out_whole_sources_once(self, corpus):
        folds = folds_of(corpus.rows)
        assert (np.sum(folds, axis=0) == 1).all()
        for held in folds:
            assert not set(corpus.sources[held]) & set(corpus.sources[~held])
        assert sum(bool(corpus.attack[held].any()) for held in folds) >= 4

    def test_authored_text_is_left_out_row_by_row_pairs_together(self):
        rows = [
            Row(f"{name} {i} {attack}", attack, "x", "authored/mail", "document", pair=f"{i}")
            for i in range(60)
            for name, attack in (("clean", False), ("injected", True))
        ]
        folds = folds_of(rows)
        assert len(folds) == 3
        assert (np.sum(folds, axis=0) == 1).all()
        for held in folds:
            assert (held[::2] == held[1::2]).all()

    def test_attacks_of_left_out_sources_score_higher(self, corpus):
        scores = cross_fit(corpus, OPTIONS)
        assert scores.shape == (1600,)
        assert np.isfinite(scores).all()
        for origin in ORIGINS:
            own = corpus.of_origin(origin)
            attack = corpus.attack[own]
            assert np.median(scores[own[attack]]) > np.quantile(scores[own[~attack]], 0.95)

    def test_a_text_never_helps_to_judge_itself(self, corpus):
        """Other windows in one text of a fold leave the scores of all others in that fold."""
        held = folds_of(corpus.rows)[0]
        changed = np.flatnonzero(held)[::2]
        x = corpus.windows.x.copy()
        x[corpus.windows.rows(changed)] += np.float16(1)
        other = dataclasses.replace(corpus, windows=Windows(x, corpus.windows.starts))
        one, two = cross_fit(corpus, OPTIONS), cross_fit(other, OPTIONS)
        kept = np.setdiff1d(np.flatnonzero(held), changed)
        np.testing.assert_array_equal(one[kept], two[kept])
        assert (one[changed] != two[changed]).all()
        assert (one[~held] != two[~held]).any()


class TestOtherLanguages:
    def corpus(self, lang: str) -> Corpus:
        """Every fourth text is in `lang`, and what stands out in its attacks is another axis."""
        corpus = made_up_corpus()
        rows = [dataclasses.replace(row, lang=lang if row.lang else "") for row in corpus.rows]
        x = corpus.windows.x.copy()
        for t, row in enumerate(corpus.rows):
            if row.attack and row.lang:
                x[N_WINDOWS * t + 1, 6] += np.float16(6)
                x[N_WINDOWS * t + 1, :2] = x[N_WINDOWS * t, :2]
        return dataclasses.replace(corpus, rows=rows, windows=Windows(x, corpus.windows.starts))

    def scorer(self, corpus: Corpus) -> Scorer:
        scales, moments = corpus.scales(OPTIONS), corpus.moments(OPTIONS)
        return fit_scorer(scales, corpus.labels, np.arange(len(corpus.rows)), OPTIONS, moments)

    def test_attacks_in_them_have_a_direction_of_their_own(self):
        corpus = self.corpus("de")
        scorer = self.scorer(corpus)
        assert scorer.weights.shape == (3, 2, len(scorer.components))
        z = project(
            scorer.mean, scorer.components, corpus.windows, np.arange(len(corpus.windows.x))
        )
        lengths = np.diff(corpus.windows.starts)
        ends = np.zeros(len(z))
        own = [pool(z @ scorer.weights[:, d].T, lengths, scorer.scales, ends) for d in range(2)]
        foreign = corpus.labels.foreign
        english, others = corpus.attack & ~foreign, corpus.attack & foreign
        for d, attacks in enumerate((english, others)):
            assert np.median(own[d][attacks]) > np.quantile(own[d][~corpus.attack], 0.99)
        assert np.median(own[1][english]) < np.quantile(own[1][~corpus.attack], 0.9)
        every = np.arange(len(corpus.rows))
        largest = np.max([own[d] + scorer.bias[d] for d in range(2)], axis=0)
        np.testing.assert_allclose(scorer.largest(corpus.windows, every), largest, rtol=1e-6)

    def test_closing_tokens_count_besides_the_windows(self, corpus):
        scorer, every = self.scorer(closed(corpus)), np.arange(len(corpus.rows))
        assert scorer.weights.shape[0] == 4
        scores = scorer.largest(closed(corpus).windows, every)
        other = closed(corpus)
        for after in (0, 1):
            other.windows.closing[2 * every[::2] + after, 2] += np.float16(3)
        raised = scorer.largest(other.windows, every)
        assert (raised[::2] > scores[::2]).all()
        np.testing.assert_array_equal(raised[1::2], scores[1::2])

    def test_left_out_texts_are_closed_by_what_has_not_seen_them(self, corpus):
        known = closed(corpus)
        noise = np.random.default_rng(5).standard_normal(known.windows.closing.shape)
        folds = numbered_folds(corpus.rows)
        left_out = np.repeat(noise.astype(np.float16)[:, None], 1 + max(folds), axis=1)
        unseen = dataclasses.replace(known, left_out_closing=left_out)
        windows = dataclasses.replace(known.windows, closing=left_out[:, 0])
        blind = dataclasses.replace(known, windows=windows)
        scores = cross_fit(unseen, OPTIONS)
        np.testing.assert_array_equal(scores, cross_fit(blind, OPTIONS))
        assert np.abs(scores - cross_fit(known, OPTIONS)).max() > 1

    @pytest.mark.parametrize("lang", ["", "en"])
    def test_english_text_has_one_direction(self, lang):
        assert self.scorer(self.corpus(lang)).weights.shape[1] == 1


class TestFrames:
    def windows(self) -> Windows:
        lengths = np.array([1, 2, 3, 7])
        x = np.random.default_rng(3).normal(size=(lengths.sum(), 4)).astype(np.float32)
        return Windows(x, np.concatenate([[0], np.cumsum(lengths)]))

    def test_a_run_is_the_mean_of_its_windows(self):
        windows = self.windows()
        runs = windows.runs(3)
        assert list(np.diff(runs.starts)) == [1, 1, 1, 5]
        np.testing.assert_allclose(runs.x[0], windows.x[0], rtol=1e-6)
        np.testing.assert_allclose(runs.x[1], windows.x[1:3].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(runs.x[-1], windows.x[-3:].mean(axis=0), rtol=1e-5)

    def test_blocks_are_all_rows_in_order(self):
        windows = self.windows()
        rows = np.array([7, 1, 2, 12, 0])
        blocks = list(windows.blocks(rows, 2))
        assert [len(block) for block in blocks] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate(blocks), windows.x[rows])

    def test_a_frame_counts_by_its_largest_run_of_every_scale(self):
        windows = self.windows()
        terms = windows.x[:, :3].astype(np.float64)
        ends = windows.x[:, 3].astype(np.float64)
        largest = pool(terms, np.diff(windows.starts), (1, 2, 4), ends)
        one, two, four = terms.T
        frames = [
            one[i : i + 4].max()
            + max(two[j : j + 2].mean() for j in range(i, i + 3))
            + four[i : i + 4].mean()
            for i in range(6, 10)
        ]
        frames = [frame + ends[i + 3] for i, frame in enumerate(frames, start=6)]
        assert largest[3] == pytest.approx(max(frames))
        assert largest[0] == pytest.approx(terms[0].sum() + ends[0])
        of_two = one[1:3].max() + two[1:3].mean() + four[1:3].mean()
        assert largest[1] == pytest.approx(of_two + ends[2])


class TestNull:
    @pytest.mark.parametrize(
        "sample",
        [
            lambda rng: rng.standard_normal(20_000),
            lambda rng: rng.exponential(2.0, 20_000),
            lambda rng: 3.0 + rng.logistic(size=20_000),
        ],
        ids=["normal", "exponential", "logistic"],
    )
    def test_survival_is_that_of_the_sample(self, sample):
        rng = np.random.default_rng(1)
        statistics, fresh = sample(rng), sample(rng)
        knots, values = null.null_spline(statistics, np.ones(len(statistics)))
        assert knots.shape == values.shape == (null.N_KNOTS,)
        assert (np.diff(knots) > 0).all()
        assert (np.diff(values) >= 0).all()
        p = 10.0 ** -null.pchip_linear_above(knots, values, fresh)
        for nominal in (0.5, 0.2, 0.1, 0.05, 0.01, 0.001):
            observed = (p <= nominal).mean()
            # Four standard errors of two samples, and a tenth for the spline between its knots.
            tolerance = 4 * np.sqrt(2 * nominal / len(fresh)) + 0.1 * nominal
            assert observed == pytest.approx(nominal, abs=tolerance)

    @pytest.mark.parametrize(
        "statistics",
        [np.zeros(500), np.repeat([0.0, 1.0], 250), np.array([1.0]), np.arange(3.0)],
        ids=["constant", "two values", "one text", "three texts"],
    )
    def test_poor_samples_still_give_a_rising_spline(self, statistics):
        knots, values = null.null_spline(statistics, np.ones(len(statistics)))
        assert (np.diff(knots) > 0).all()
        assert (np.diff(values) >= 0).all()
        assert values[0] == 0
        assert values[-1] >= 3

    def test_sources_weigh_by_the_root_of_their_size(self):
        weights = null.source_weights(["a"] * 100 + ["b"] * 4)
        assert weights.sum() == pytest.approx(1)
        assert weights[:100].sum() / weights[100:].sum() == pytest.approx(5)

    def test_joined_texts_are_as_alarming_as_their_worst_part(self):
        statistics, n_tokens = np.arange(40.0), np.full(40, 256)
        joined = null.joined(statistics, n_tokens, 1024)
        assert len(joined) == 10
        assert joined.max() == 39
        assert (joined >= 3).all()
        np.testing.assert_array_equal(joined, null.joined(statistics, n_tokens, 1024))

    def test_long_text_of_many_parts_makes_long_text_less_alarming(self):
        rng = np.random.default_rng(5)
        n_tokens = np.repeat([300, 1024], 500)
        rows = [Row("text", False, "benign", "one", None)] * 1000
        knots, values = null.null_splines(rng.normal(size=1000), n_tokens, rows)
        p = [
            10 ** -null.pchip_linear_above(knots[c], values[c], np.array([2.5]))[0] for c in (3, 5)
        ]
        assert p[1] > 2 * p[0]

    def test_short_texts_are_not_joined(self):
        statistics = np.random.default_rng(5).normal(size=1000)
        n_tokens = np.repeat([100, 700], 500)
        document, prompt = (Row("text", False, "benign", "one", o) for o in ("document", "user"))
        knots, _ = null.null_splines(statistics, n_tokens, [document] * 1000)
        without, _ = null.null_splines(statistics, n_tokens, [prompt] * 500 + [document] * 500)
        np.testing.assert_array_equal(knots[5], without[5])

    def test_length_classes(self):
        n_tokens = np.array([0, 16, 17, 48, 49, 640, 641, 1024, 5000])
        assert null.length_class(n_tokens).tolist() == [0, 0, 1, 1, 2, 4, 5, 5, 5]

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_component_with_a_far_outlier_keeps_its_tails(self, sign):
        from scipy.interpolate import PchipInterpolator

        z = sign * np.concatenate([np.random.default_rng(2).standard_normal(900), [1e3, 2e3]])
        knots, values = null.component_cdf(z, np.ones(len(z)))
        ends = PchipInterpolator(knots, values).derivative()(knots[[0, -1]])
        assert (np.diff(knots) > 0).all()
        assert (ends > 0).all()

    def test_a_component_is_uniform_in_its_own_distribution(self):
        z = np.random.default_rng(2).standard_normal(20_000)
        knots, values = null.component_cdf(z, np.ones(len(z)))
        assert (np.diff(knots) > 0).all()
        assert (np.diff(values) > 0).all()
        assert values[0] > 0
        assert values[-1] < 1
        for at, value in zip(knots, values, strict=True):
            assert (z <= at).mean() == pytest.approx(value, abs=0.003)


@pytest.fixture(scope="module")
def compiled(corpus, tiny_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "codebook.safetensors"
    codebook.compile_codebook(
        closed(corpus), tiny_folder, out, layout=CLOSED_LAYOUT, options=OPTIONS
    )
    return out


@pytest.fixture(scope="module")
def ended_by_the_first_stage(corpus, tiny_folder, tmp_path_factory) -> Path:
    """A codebook whose first stage ends the reading of nearly every text."""
    out = tmp_path_factory.mktemp("early") / "codebook.safetensors"
    options = dataclasses.replace(OPTIONS, early_above=1e-13)
    codebook.compile_codebook(
        closed(corpus), tiny_folder, out, layout=CLOSED_LAYOUT, options=options
    )
    return out


class TestCompile:
    def test_the_library_accepts_it(self, compiled, corpus):
        metadata = _core.inspect_codebook(str(compiled))
        assert metadata["detector"] == "tiny"
        assert metadata["sites"] == ",".join(SITES)
        assert metadata["n_components"] == "6"
        assert json.loads(metadata["closing"]) == {"token": 0, "every": 10}
        quality = json.loads(metadata["quality"])
        assert 0 <= quality["worst_auroc"] <= quality["mean_auroc"] <= 1
        assert set(quality["benign"]) == {row.source for row in corpus.rows if not row.attack}
        calibration = json.loads(metadata["calibration"])
        assert calibration["rows"] == len(corpus.rows)
        assert calibration["sha256"] == sha256_of(corpus.rows)
        names = [d["name"] for d in json.loads(metadata["directions"]) if d["scored"]]
        assert names == ["attack", "foreign_attack"]

    def test_it_belongs_to_its_detector(self, compiled, tiny_folder):
        alarm = Firewall(tiny_folder, codebook_path=compiled).screen(BENIGN[0])
        assert alarm.level in AlarmLevel

    def test_what_was_learned_is_in_the_codebook(self, corpus, tiny_folder, tmp_path):
        from safetensors.numpy import load_file

        vectors = learned(2)
        out = tmp_path / "learned.safetensors"
        layout = dataclasses.replace(CLOSED_LAYOUT, closing=Learned(vectors))
        codebook.compile_codebook(closed(corpus), tiny_folder, out, layout=layout, options=OPTIONS)
        np.testing.assert_array_equal(load_file(out)["closing"], vectors[-1])
        assert json.loads(_core.inspect_codebook(str(out))["closing"]) == {"every": 10}
        alarm = Firewall(tiny_folder, codebook_path=out).screen(BENIGN[0])
        assert alarm.level in AlarmLevel

    def test_the_same_corpus_gives_the_same_bytes(self, compiled, tiny_folder, tmp_path):
        again = tmp_path / "again.safetensors"
        codebook.compile_codebook(
            closed(made_up_corpus()), tiny_folder, again, layout=CLOSED_LAYOUT, options=OPTIONS
        )
        assert again.read_bytes() == compiled.read_bytes()

    def test_another_corpus_gives_others(self, compiled, tiny_folder, tmp_path):
        other = tmp_path / "other.safetensors"
        codebook.compile_codebook(
            closed(made_up_corpus(seed=1)),
            tiny_folder,
            other,
            layout=CLOSED_LAYOUT,
            options=OPTIONS,
        )
        assert other.read_bytes() != compiled.read_bytes()

    def test_the_first_stage_reads_the_first_site(self, compiled):
        from safetensors.numpy import load_file

        tensors, metadata = load_file(compiled), _core.inspect_codebook(str(compiled))
        assert json.loads(metadata["early"]) == {"sites": 1, "above": 0.5}
        early = {name.removeprefix("early.") for name in tensors if name.startswith("early.")}
        assert early == {name for name in tensors if not name.startswith("early.")}
        assert tensors["early.components"].shape[1] == HIDDEN_SIZE

    @pytest.mark.parametrize("sites", [("1.resid_post",), ("1.resid_post", "0.attn_out")])
    def test_there_is_no_first_stage_where_no_site_is_before_another(
        self, corpus, tiny_folder, tmp_path, sites
    ):
        layout = dataclasses.replace(TINY_LAYOUT, sites=sites)
        width = len(sites) * HIDDEN_SIZE
        windows = dataclasses.replace(corpus.windows, x=corpus.windows.x[:, :width])
        narrow = dataclasses.replace(corpus, windows=windows)
        out = tmp_path / "codebook.safetensors"
        codebook.compile_codebook(narrow, tiny_folder, out, layout=layout, options=OPTIONS)
        assert "early" not in _core.inspect_codebook(str(out))

    @pytest.mark.parametrize("text", BENIGN)
    @pytest.mark.parametrize("stage", ["", "early."])
    def test_the_library_scores_as_calibration_does(
        self, compiled, ended_by_the_first_stage, tiny_folder, text, stage
    ):
        from safetensors.numpy import load_file

        compiled = ended_by_the_first_stage if stage else compiled
        tensors, metadata = load_file(compiled), _core.inspect_codebook(str(compiled))
        tensors = {
            name.removeprefix(stage): x for name, x in tensors.items() if name.startswith(stage)
        }
        reader = _core.Reader(str(tiny_folder), list(SITES))
        (x,) = reader.window_means([text], window=8, stride=4, max_tokens=64, closing=([0], 10))
        z = (x[:, : len(tensors["mean"])] - tensors["mean"]) @ tensors["components"].T
        *terms, closing = tensors["direction_weights"][:, 0] @ z.T
        n_tokens = min(reader.count_tokens(text), 64)
        n_windows = len(x) - -(-n_tokens // 10)
        ends = [min(4 * window + 8, n_tokens) for window in range(n_windows)]
        after = np.array([closing[n_windows + (end - 1) // 10] for end in ends])
        pooled = pool(np.stack(terms, axis=1)[:n_windows], np.array([n_windows]), (1, 3, 7), after)
        assert json.loads(metadata["scales"]) == [1, 3, 7]
        largest = pooled[0]
        length = null.length_class(np.array([reader.count_tokens(text)]))[0]
        unknown = ORIGINS.index(None)
        knots, values = (tensors[f"null_{part}"][unknown, length] for part in ("knots", "values"))
        statistic = np.array([largest + tensors["direction_bias"][0]])
        (expected,) = 10 ** -null.pchip_linear_above(knots, values, statistic)
        firewall = Firewall(tiny_folder, codebook_path=compiled, early_exit=bool(stage))
        alarm = firewall.screen(text)
        # A twentieth of the error budget is the novelty's.
        by_novelty = max(alarm.novelty_p_value / 0.05, 0.00101)
        assert alarm.p_value == pytest.approx(min(expected / 0.95, by_novelty, 1), rel=0.02)

    def test_nothing_else_is_left_behind(self, compiled):
        assert [path.name for path in compiled.parent.iterdir()] == [compiled.name]

    @pytest.mark.parametrize("kept", ["attacks", "benign"])
    def test_too_little_text(self, corpus, tiny_folder, tmp_path, kept):
        rows = [row for row in corpus.rows if row.attack == (kept == "attacks")]
        few = dataclasses.replace(corpus, rows=rows)
        with pytest.raises(InputError, match="at least 50 and 300 are needed"):
            codebook.compile_codebook(
                few, tiny_folder, tmp_path / "x", layout=TINY_LAYOUT, options=OPTIONS
            )
        assert not list(tmp_path.iterdir())

    def test_recalibrating_changes_the_nulls_only(self, compiled, corpus, tmp_path):
        from safetensors.numpy import load_file

        out = tmp_path / "mine.safetensors"
        ordinary = np.flatnonzero(~corpus.attack)
        mine = part_of(closed(corpus), ordinary)
        codebook.recalibrate(compiled, mine, out)
        before, after = load_file(compiled), load_file(out)
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert before.keys() == after.keys()
        nulls = {"null_knots", "null_values", "novelty_knots", "novelty_values"}
        assert changed <= nulls | {f"early.{name}" for name in nulls}
        assert {"null_knots", "early.null_knots"} <= changed
        metadata = _core.inspect_codebook(str(out))
        assert json.loads(metadata["null_calibration"])["rows"] == len(ordinary)

    def test_recalibrating_needs_enough_text(self, compiled, corpus, tmp_path):
        few = dataclasses.replace(corpus, rows=corpus.rows[:299])
        with pytest.raises(InputError, match="299 texts: at least 300"):
            codebook.recalibrate(compiled, few, tmp_path / "mine.safetensors")


@pytest.fixture(scope="module")
def report(corpus):
    return evaluate(corpus, OPTIONS, detector="tiny")


class TestFirstStage:
    def test_it_ends_the_reading_of_ordinary_texts(self, corpus, report):
        # Attacks stand out along an axis of the first site.
        staged = evaluate(corpus, OPTIONS, detector="tiny", sites=SITES)
        early = staged["early"]
        assert 0.2 < early["benign"] < 0.6
        assert early["public"] == early["benign"]
        assert early["caught"] <= early["attacks"] < 0.05
        assert "an early exit would end" in table(staged)
        # All other figures are those of the whole.
        assert staged["folds"] == report["folds"]
        assert staged["reliability"] == report["reliability"]

    def test_there_may_be_none(self, report):
        assert report["early"] is None
        assert "early exit" not in table(report)


def rows_of(report: dict, part: str) -> int:
    return sum(own["rows"] for own in report[part].values())


class TestEvaluate:
    def test_the_keys(self, report):
        keys = (
            "folds mean_auroc worst_auroc mean_tpr_at_1pct_fpr benign attacks reliability detector "
            "rows origins roc families languages lengths pairs thresholds early"
        )
        assert set(keys.split()) == report.keys()
        for origin in ("user", "document"):
            assert report["origins"][origin].keys() == report.keys() - {
                "detector",
                "rows",
                "origins",
            }
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        rates = next(iter(report["benign"].values()))
        assert {"rows", "suspicious", "dangerous"} <= rates.keys()

    def test_every_text_is_counted_once(self, report, corpus):
        n_attacks = int(corpus.attack.sum())
        assert rows_of(report, "benign") == len(corpus.rows) - n_attacks
        assert rows_of(report, "attacks") == rows_of(report, "families") == n_attacks
        for part in ("languages", "lengths"):
            for kind, n in (("attacks", n_attacks), ("benign", len(corpus.rows) - n_attacks)):
                assert sum(own[kind]["rows"] for own in report[part].values()) == n

    def test_a_lower_threshold_alarms_more(self, report):
        thresholds = report["thresholds"]
        assert [row["score"] for row in thresholds if row["p_value"] in (0.01, 0.001)] == [0.3, 0.7]
        for name in ("public", "caught"):
            shares = [row[name] for row in thresholds]
            assert shares == sorted(shares, reverse=True)
            assert 0 < shares[0] <= 1
        (default,) = (row for row in thresholds if row["p_value"] == 0.01)
        public = [own for source, own in report["benign"].items() if "authored" not in source]
        alarms = sum(own["rows"] * own["suspicious"] for own in public)
        assert default["public"] == pytest.approx(alarms / sum(own["rows"] for own in public))

    def test_families_and_languages_are_those_of_the_rows(self, report):
        assert report["families"].keys() == {"jailbreak", "redirect"}
        assert report["languages"].keys() == {"de", "unknown"}
        assert list(report["lengths"]) == ["1–16", "17–48", "49–128", "129–384", "385–640"]

    def test_a_family_that_stands_out_less_is_caught_less(self):
        """Half of the indirect attacks hide: their family shows it, the others do not."""
        report = evaluate(made_up_corpus(hidden_sources=(1, 5, 9)), OPTIONS, detector="tiny")
        families = report["families"]
        assert families["redirect"]["suspicious"] < families["jailbreak"]["suspicious"] - 0.2

    def test_roc_curves_lead_from_corner_to_corner(self, report):
        curves = [report["roc"], *(fold["roc"] for fold in report["folds"])]
        assert len(curves) >= 4
        for points in curves:
            assert 2 <= len(points) <= 200
            assert (points[0], points[-1]) == ([0, 0], [1, 1])
            assert (np.diff(points, axis=0) >= 0).all()

    def test_roc_curves_enclose_the_auroc(self):
        """Thinning to 200 points leaves the area."""
        report = evaluate(made_up_corpus(separation=2.0), OPTIONS, detector="tiny")
        for fold in report["folds"]:
            fpr, tpr = np.transpose(fold["roc"])
            assert np.trapezoid(tpr, fpr) == pytest.approx(fold["auroc"], abs=0.01)

    def test_pairs_compare_an_attack_with_its_twin(self):
        rows, windows = [], []
        rng = np.random.default_rng(4)
        for i in range(900):
            attack = i % 3 == 0
            # The first 60 attacks follow their twin; the rest has none.
            pair = f"p{i // 3}" if i < 180 and i % 3 < 2 else ""
            kind = "indirect_injection" if attack else "benign"
            rows.append(Row(f"text {i}", attack, kind, "authored/mail", "document", pair=pair))
            x = rng.standard_normal((N_WINDOWS, WIDTH))
            x[1, 0] += 8.0 * attack
            windows.append(x)
        for source in range(6):
            origin = ORIGINS[source % 2]
            for i in range(80):
                rows.append(Row(f"{source} {i}", source > 3, "x", f"s{source}", origin))
                x = rng.standard_normal((N_WINDOWS, WIDTH))
                x[1, 0] += 8.0 * (source > 3)
                windows.append(x)
        starts = N_WINDOWS * np.arange(len(rows) + 1)
        n_tokens = np.full(len(rows), 100)
        paired = Corpus(rows, Windows(np.concatenate(windows).astype(np.float16), starts), n_tokens)
        pairs = evaluate(paired, OPTIONS, detector="tiny")["pairs"]
        assert pairs.keys() == {"authored/mail"}
        assert pairs["authored/mail"]["pairs"] == 60
        assert pairs["authored/mail"]["higher"] > 0.9

    def test_separable_attacks_are_found(self, report):
        assert report["worst_auroc"] <= report["mean_auroc"] <= 1
        assert report["worst_auroc"] > 0.9

    def test_what_cannot_be_told_apart_is_not(self):
        report = evaluate(made_up_corpus(separation=0.0), OPTIONS, detector="tiny")
        assert 0.3 < report["mean_auroc"] < 0.7

    def test_the_table_names_every_source(self, report, corpus):
        text = table(report)
        for source in set(corpus.sources[~corpus.attack]):
            assert source in text

    def test_what_cannot_be_computed_is_none(self, corpus):
        """Three texts of a fold are not enough to judge it."""
        few = [t for t, row in enumerate(corpus.rows) if not row.attack or t % 80 < 3]
        small = part_of(corpus, np.array(few))
        report = evaluate(small, OPTIONS, detector="tiny")
        assert report["folds"] == report["roc"] == []
        assert report["mean_auroc"] is report["worst_auroc"] is None
        json.dumps(report, allow_nan=False)
        assert "–" in table(report)

    def test_the_command_writes_all_it_is_asked_for(
        self, tiny_folder, tmp_path, monkeypatch, report
    ):
        """Left-out figures are made up here; the rest is the tiny detector's."""
        pytest.importorskip("matplotlib")
        from alknet_firewall.calibration import run

        few = MeasureOptions(attacks=1, harmless=1, long_documents={500: 1}, speeds=(16,))
        monkeypatch.setattr(run, "load_corpus", lambda *_, **__: None)
        monkeypatch.setattr(run, "evaluate", lambda *_, **__: dict(report))
        monkeypatch.setattr(run, "measure_detector", partial(measure_detector, options=few))
        page, figures = tmp_path / "page.html", tmp_path / "figures.json"
        arguments = ["evaluate", str(tmp_path), "--detector", str(tiny_folder)]
        done = CliRunner().invoke(main, [*arguments, "--json", figures, "--report", page])
        assert done.exit_code == 0, done.output
        assert "milliseconds per screen" in done.output
        assert json.loads(figures.read_text())["compiled"]["speed"]
        assert "Not measured" not in page.read_text()
        done = CliRunner().invoke(main, [*arguments, "--quick", "--report", page])
        assert done.exit_code == 0, done.output
        assert "milliseconds per screen" not in done.output
        assert "Not measured" in page.read_text()
        done = CliRunner().invoke(main, [*arguments, "--quick", "--json", "/dev/full"])
        assert done.exit_code == 1
        assert "Error: " in done.stderr
        assert table(report) in done.stdout

    def test_a_null_of_ones_own_text_is_limited_and_cached_too(self, tiny_folder, tmp_path):
        rows = [json.dumps({"text": text, "label": 0}) for text in TEXTS]
        (tmp_path / "mine.jsonl").write_text("\n".join(rows))
        arguments = ["calibrate", str(tmp_path), "--null-only", "--detector", str(tiny_folder)]
        options = ["--limit", "7", "--cache-dir", tmp_path / "kept", "--out", tmp_path / "out"]
        done = CliRunner().invoke(main, [*arguments, *map(str, options)])
        assert "7 texts: at least 300" in done.output
        assert list((tmp_path / "kept").iterdir())


ROW = {"text": "a text", "label": 0}


class TestCorpora:
    def write(self, path: Path, *rows: object) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def test_folders_files_and_archives(self, tmp_path):
        self.write(tmp_path / "one.jsonl", ROW, {"text": "b", "label": 1})
        (tmp_path / "deep").mkdir()
        with gzip.open(tmp_path / "deep" / "two.jsonl.gz", "wt") as file:
            file.write(json.dumps({"text": "c", "label": 0, "source": "mine"}) + "\n\n")
        rows = read_corpora([tmp_path])
        assert sorted((row.text, row.attack, row.source) for row in rows) == [
            ("a text", False, "one"),
            ("b", True, "one"),
            ("c", False, "mine"),
        ]
        assert read_corpora([tmp_path / "one.jsonl"]) == [r for r in rows if r.source == "one"]

    def test_repeated_texts_are_kept_once(self, tmp_path):
        path = self.write(tmp_path / "a.jsonl", ROW, ROW)
        assert len(read_corpora([path, path])) == 1

    def test_what_is_left_out(self, tmp_path):
        harmful = {"text": "b", "label": 1, "kind": "harmful_request"}
        path = self.write(tmp_path / "a.jsonl", harmful, {"text": "  ", "label": 0}, ROW)
        assert [row.text for row in read_corpora([path])] == ["a text"]

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ([], "not a JSON object with text and label"),
            ({"text": "a"}, "not a JSON object with text and label"),
            ({"text": 5, "label": 0}, "text must be a string"),
            ({"text": "a", "label": 2}, "label 0 or 1"),
            ({"text": "a", "label": "1"}, "label 0 or 1"),
            ({"text": "a", "label": 0, "origin": "tool"}, "origin must be"),
            ({"text": "a", "label": 1, "kind": ["jailbreak"]}, "kind and source must be"),
            ({"text": "a", "label": 0, "source": 5}, "kind and source must be"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path, row, problem):
        path = self.write(tmp_path / "a.jsonl", ROW, row)
        with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{problem}"):
            read_corpora([path])

    @pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"null\n", b"\x00"])
    def test_bytes_that_are_no_rows(self, tmp_path, data):
        (tmp_path / "a.jsonl").write_bytes(data)
        with pytest.raises(InputError, match=r"a\.jsonl"):
            read_corpora([tmp_path])

    @pytest.mark.parametrize("line", [200_000 * "[", '{"label": ' + 5000 * "9"], ids=["[", "9"])
    def test_what_json_cannot_hold(self, tmp_path, line):
        path = self.write(tmp_path / "a.jsonl", ROW)
        path.write_text(path.read_text() + line)
        with pytest.raises(InputError, match=r"a\.jsonl:2: "):
            read_corpora([path])

    def test_a_damaged_archive(self, tmp_path):
        data = gzip.compress(json.dumps(ROW).encode() * 50)
        flipped = data[:12] + bytes(255 - byte for byte in data[12:])
        for number, bad in enumerate((data[:-9], b"plain", data[:20], flipped)):
            path = tmp_path / f"{number}.jsonl.gz"
            path.write_bytes(bad)
            with pytest.raises(InputError, match="cannot be read"):
                read_corpora([path])

    def test_a_folder_without_rows_and_a_missing_file(self, tmp_path):
        with pytest.raises(InputError, match="holds no"):
            read_corpora([tmp_path])
        with pytest.raises(InputError, match="cannot be read"):
            read_corpora([tmp_path / "none.jsonl"])

    def test_the_digest_depends_on_all_that_matters(self):
        row = Row("a", False, "benign", "s", "user")
        others = [{"text": "b"}, {"attack": True}, {"source": "t"}, {"origin": None}]
        digests = {sha256_of([dataclasses.replace(row, **change)]) for change in others}
        assert len(digests | {sha256_of([row])}) == 5


TEXTS = [*BENIGN, *ordinary_sentences(160), "a" * 300]


class Interrupted(Exception):
    """What stops a run in the tests."""


class CountingReader:
    """A reader that counts the texts it reads and may be stopped after some."""

    def __init__(self, reader: _core.Reader, stop_after: int | None = None):
        self.reader, self.stop_after, self.read = reader, stop_after, 0
        self.engine = reader.engine
        self.count_tokens = reader.count_tokens

    def window_means(self, texts, **options):
        if self.stop_after is not None and self.read + len(texts) > self.stop_after:
            raise Interrupted
        self.read += len(texts)
        return self.reader.window_means(texts, **options)


@pytest.fixture(scope="module")
def reader(tiny_folder):
    return _core.Reader(str(tiny_folder), list(SITES))


class TestActivations:
    def windows(self, reader, cache: Path, texts=None, key: str = "key"):
        return read_windows(texts or TEXTS, reader, TINY_LAYOUT, key=key, cache=cache)

    def test_windows_are_those_of_the_engine(self, reader, tmp_path):
        store = self.windows(reader, tmp_path)
        assert len(store.starts) == len(TEXTS) + 1
        options = {"window": 8, "stride": 4, "max_tokens": 64, "closing": None}
        for text in (0, 5, 20, len(TEXTS) - 1):
            (expected,) = reader.window_means([TEXTS[text]], **options)
            own = store.data[store.starts[text] : store.starts[text + 1]]
            np.testing.assert_allclose(own, expected, rtol=2e-3, atol=2e-3)
            assert store.n_tokens[text] == min(reader.count_tokens(TEXTS[text]), 64)
        assert store.closing is None

    def test_a_closing_token_is_read_every_so_often(self, reader, tmp_path):
        store = read_windows(TEXTS, reader, CLOSED_LAYOUT, key="key", cache=tmp_path)
        open_store = self.windows(reader, tmp_path)
        np.testing.assert_array_equal(store.starts, open_store.starts)
        np.testing.assert_array_equal(store.n_tokens, open_store.n_tokens)
        np.testing.assert_array_equal(store.data, open_store.data)
        options = {"window": 8, "stride": 4, "max_tokens": 64, "closing": ([0], 10)}
        counts = -(-store.n_tokens // 10)
        assert counts.max() > 2
        assert store.closing.shape == (counts.sum(), 1, store.data.shape[1])
        for text in (0, 5, len(TEXTS) - 1):
            (expected,) = reader.window_means([TEXTS[text]], **options)
            own = store.closing[counts[:text].sum() :][: counts[text], 0]
            np.testing.assert_allclose(own, expected[-counts[text] :], rtol=2e-3, atol=2e-3)
            windows = slice(store.starts[text], store.starts[text + 1])
            n_tokens = store.n_tokens[text]
            ends = [min(4 * i + 8, n_tokens) for i in range(windows.stop - windows.start)]
            expected_rows = [counts[:text].sum() + (end - 1) // 10 for end in ends]
            assert list(store.closed_by[windows]) == expected_rows

    def test_several_readouts_close_a_text_at_the_same_places(self, reader, tmp_path):
        vectors = learned(3)
        layout = dataclasses.replace(CLOSED_LAYOUT, closing=Learned(vectors))
        store = read_windows(TEXTS, reader, layout, key="key", cache=tmp_path)
        assert store.closing.shape[1] == 3
        for i, own in enumerate(vectors):
            alone = dataclasses.replace(CLOSED_LAYOUT, closing=Learned(own[None]))
            expected = read_windows(TEXTS, reader, alone, key="key", cache=tmp_path)
            np.testing.assert_array_equal(store.closing[:, i], expected.closing[:, 0])
            np.testing.assert_array_equal(store.closed_by, expected.closed_by)

    def test_a_learned_readout_of_an_embedding_is_the_token(self, reader, tiny_folder):
        from safetensors.numpy import load_file

        weights = load_file(tiny_folder / "model.safetensors")
        vectors = np.zeros((N_BLOCKS, HIDDEN_SIZE), dtype=np.float32)
        vectors[0] = weights["model.embed_tokens.weight"][7]
        options = {"window": 8, "stride": 4, "max_tokens": 64}
        closing = ([7, vectors], 10)
        (rows,) = reader.window_means(TEXTS[:1], closing=closing, **options)
        first = len(rows) - 2 * -(-reader.count_tokens(TEXTS[0]) // 10)
        np.testing.assert_array_equal(rows[first::2], rows[first + 1 :: 2])
        vectors[1] += 1
        (other,) = reader.window_means(TEXTS[:1], closing=closing, **options)
        np.testing.assert_array_equal(other[:first], rows[:first])
        np.testing.assert_array_equal(other[first::2], rows[first::2])
        assert np.abs(other[first + 1 :: 2] - rows[first + 1 :: 2]).max() > 0.1

    @pytest.mark.parametrize("shape", [(N_BLOCKS + 1, HIDDEN_SIZE), (N_BLOCKS, HIDDEN_SIZE - 1)])
    def test_learned_readouts_of_another_model_are_refused(self, reader, shape):
        closing = ([np.zeros(shape, dtype=np.float32)], 10)
        options = {"window": 8, "stride": 4, "max_tokens": 64}
        with pytest.raises(InputError, match=f"{N_BLOCKS} blocks take {HIDDEN_SIZE} each"):
            reader.window_means(TEXTS[:1], closing=closing, **options)

    def test_the_shipped_codebook_reads_what_was_learned_from_all_folds(self, real_folder):
        from safetensors.numpy import load_file

        learned = default_layout(real_folder).closing
        # One for each of five folds of public sources and three of our own text.
        assert learned.vectors.shape == (5 + 3 + 1, 15, 576)
        tensors = load_file(real_folder / "codebook.safetensors")
        np.testing.assert_array_equal(tensors["closing"], learned.vectors[-1])

    def test_a_tokenizer_without_the_closing_token_has_none(self, tiny_folder, tmp_path):
        assert default_layout(tiny_folder).closing == 2
        other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
        tokenizer = other / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace("<|im_end|>", "<|end|>"))
        assert default_layout(other).closing is None

    def test_a_closing_token_is_no_denser_than_windows(self, reader):
        options = {"window": 8, "stride": 4, "max_tokens": 64, "closing": ([7], 7)}
        with pytest.raises(ConfigError, match="every 7 tokens"):
            reader.window_means(TEXTS[:1], **options)

    def test_what_was_read_is_not_read_again(self, reader, tmp_path):
        first = self.windows(reader, tmp_path)
        counting = CountingReader(reader)
        again = self.windows(counting, tmp_path, [*reversed(TEXTS), "new"])
        assert counting.read == 1
        own = again.data[again.starts[len(TEXTS) - 1] : again.starts[len(TEXTS)]]
        np.testing.assert_array_equal(own, first.data[: first.starts[1]])

    def test_an_interrupted_run_goes_on_where_it_stopped(self, reader, tmp_path):
        stopped = CountingReader(reader, stop_after=130)
        with pytest.raises(Interrupted):
            self.windows(stopped, tmp_path)
        assert stopped.read == 128
        resumed = CountingReader(reader)
        store = self.windows(resumed, tmp_path)
        assert resumed.read == len(TEXTS) - 128
        fresh = self.windows(reader, tmp_path / "fresh")
        np.testing.assert_array_equal(store.data, fresh.data)
        np.testing.assert_array_equal(store.starts, fresh.starts)

    @pytest.mark.parametrize("torn", ["journal", "rows"])
    def test_a_write_that_was_cut_off(self, reader, tmp_path, torn):
        """Rows without a journal line are overwritten, and a line cut off is read again."""
        self.windows(reader, tmp_path, TEXTS[:70])
        (folder,) = tmp_path.iterdir()
        if torn == "rows":
            with (folder / "windows.f16").open("ab") as data:
                data.write(b"\x01" * 77)
        else:
            journal = folder / "index.jsonl"
            journal.write_bytes(journal.read_bytes()[:-9])
        store = self.windows(reader, tmp_path)
        fresh = self.windows(reader, tmp_path / "fresh")
        np.testing.assert_array_equal(store.data, fresh.data)
        counting = CountingReader(reader)
        again = self.windows(counting, tmp_path)
        assert counting.read == 0
        np.testing.assert_array_equal(again.data, fresh.data)

    def test_two_runs_at_once(self, reader, tmp_path):
        """The second waits, so that no text is given the rows of another."""
        waits = threading.Event()

        def second():
            read_windows(
                TEXTS[:9],
                reader,
                TINY_LAYOUT,
                key="key",
                cache=tmp_path,
                progress=lambda *_: waits.set(),
            )

        class First(CountingReader):
            def window_means(self, texts, **options):
                runs.append(pool.submit(second))
                assert waits.wait(60)
                return super().window_means(texts, **options)

        runs = []
        with ThreadPoolExecutor() as pool:
            self.windows(First(reader), tmp_path, TEXTS[9:20])
            runs[0].result()
        counting = CountingReader(reader)
        store = self.windows(counting, tmp_path, TEXTS[:20])
        assert counting.read == 0
        fresh = self.windows(reader, tmp_path / "fresh", TEXTS[:20])
        np.testing.assert_array_equal(store.data, fresh.data)

    def test_a_shortened_file_is_refused(self, reader, tmp_path):
        self.windows(reader, tmp_path)
        (folder,) = tmp_path.iterdir()
        data = folder / "windows.f16"
        data.write_bytes(data.read_bytes()[:-2])
        with pytest.raises(InputError, match=r"shorter than its index: delete"):
            self.windows(reader, tmp_path)

    def test_other_settings_have_a_cache_of_their_own(self, reader, tmp_path):
        self.windows(reader, tmp_path, TEXTS[:3])
        counting = CountingReader(reader)
        self.windows(counting, tmp_path, TEXTS[:3], key="another detector")
        assert counting.read == 3
        assert len(list(tmp_path.iterdir())) == 2
