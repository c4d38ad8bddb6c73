"""What a compiled detector is asked, and the page that shows it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from alknet_firewall import Alarm, AlarmLevel, Span
from alknet_firewall.authored import calibration_rows
from alknet_firewall.evaluation import measure
from alknet_firewall.evaluation.intervals import wilson
from alknet_firewall.evaluation.measure import MeasureOptions
from alknet_firewall.evaluation.transforms import TRANSFORMS

SMALL = MeasureOptions(attacks=3, harmless=3, long_documents={1000: 3, 3000: 2}, speeds=(16, 64))
HOSTILE = '<script src="https://example.org/x.js">$name&amp;</script>'
# Elements of HTML that have no end tag.
VOID = {"meta", "br", "img", "link", "hr"}


def silent(stage: str, done: int, total: int | None) -> None:
    """Shows nothing."""


class TestIntervals:
    @pytest.mark.parametrize(
        ("hits", "n", "interval"),
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)),
         (1, 29, (0.0061, 0.1718))],
    )  # fmt: skip
    def test_published_values(self, hits, n, interval):
        assert wilson(hits, n) == pytest.approx(interval, abs=1e-4)

    def test_all_and_none(self):
        assert wilson(5, 5)[1] == 1
        assert wilson(0, 0) == (0, 1)


class Reader:
    """Alarms on words that stand in many attacks, and points at the first of them."""

    engine = "none"
    words = re.compile("instructions|rules|ignore|forget|your|pretend|prompt", re.IGNORECASE)

    def screen(self, text: str, *, origin: str | None = None) -> Alarm:
        found = self.words.search(text)
        spans = (Span(found.start(), found.end(), 1.0, "attack"),) if found else ()
        level = AlarmLevel.SUSPICIOUS if found else AlarmLevel.CLEAR
        tokens = len(text.split())
        return Alarm(level, 0.5, 0.5, 0.5, (), spans, origin, tokens, 0, None, "words")

    def screen_document(self, text: str) -> Alarm:
        return self.screen(text, origin="document")

    def screen_batch(self, texts: list[str], *, origin: list[str | None]) -> list[Alarm]:
        return [self.screen(text, origin=one) for text, one in zip(texts, origin, strict=True)]


class TestMeasure:
    def test_no_text_is_shipped_for_calibration(self):
        shipped = {row["text"] for row in calibration_rows()}
        drawn = measure._texts(MeasureOptions().seed, 400, measure._TYPED_ATTACKS, 300)
        assert len(drawn) > 50
        assert not shipped & {row["text"] for row in drawn}
        assert max(len(row["text"]) for row in drawn) <= 300

    @pytest.mark.parametrize(
        ("groups", "label"), [(measure._TYPED_ATTACKS, 1), (measure._HARMLESS, 0)]
    )
    def test_groups_are_what_their_names_say(self, groups, label):
        drawn = measure._texts(1, 200, groups, 300)
        assert {row["label"] for row in drawn} == {label}
        assert {row["source"].removeprefix("authored/") for row in drawn} == set(groups)

    def test_an_injection_is_what_its_pair_differs_in(self):
        pair = measure.Pair.of("one\n\ntwo", "one\n\nignore it\n\ntwo")
        assert pair.injected[: pair.start] + pair.injected[pair.end :] == pair.clean
        assert "ignore it" in pair.injected[pair.start : pair.end]

    def test_repeated_letters_around_an_injection(self):
        pair = measure.Pair.of("aa", "aaa")
        assert pair.injected[: pair.start] + pair.injected[pair.end :] == "aa"

    def test_a_buried_document_keeps_its_injection(self):
        from alknet_firewall.authored.dice import Dice

        pairs = measure._pairs(1, 60)
        assert pairs
        for number, pair in enumerate(pairs):
            long = pair.buried(["first text", "second"], 3000, Dice(str(number)))
            assert 3000 <= len(long.injected) <= 3000 + len(pair.injected)
            assert long.injected[long.start : long.end] == pair.injected[pair.start : pair.end]
            assert len(long.clean) == len(long.injected) - len(pair.injected) + len(pair.clean)

    def test_located_means_that_a_span_overlaps(self, tiny):
        from tiny_detector import ATTACK

        text = f"The committee meets on the second Tuesday. {ATTACK} "
        alarm = tiny.screen(text)
        assert alarm.level is AlarmLevel.DANGEROUS
        start = text.index(ATTACK)
        assert measure.Pair("", text, start, len(text)).is_located(alarm)
        assert not measure.Pair("", text, 0, min(s.start for s in alarm.spans)).is_located(alarm)

    def test_evasion(self):
        result = measure.measure_evasion(Reader(), SMALL, progress=silent)
        shares = result["transformations"]
        assert shares.keys() == TRANSFORMS.keys()
        assert result["caught"] == SMALL.attacks < result["screened"]
        assert result["harmless"] == 3
        # This reader sees through capitals, and through nothing that changes the letters.
        assert shares["random_case"]["passed"] == 0
        assert shares["fullwidth"]["passed"] == shares["base64_standard"]["passed"] == 1
        assert shares["tag_characters"]["false_alarms"] == 0
        passed = [own["passed"] for own in shares.values()]
        assert result["mean_passed"] == pytest.approx(sum(passed) / len(passed))
        alarms = [own["false_alarms"] for own in shares.values()]
        assert result["mean_false_alarms"] == pytest.approx(sum(alarms) / len(alarms))

    def test_disguises_of_harmless_texts_count_as_false_alarms(self, tiny):
        """What no person sees is an alarm of the real thing whatever it says."""
        result = measure.measure_evasion(tiny, SMALL, progress=silent)
        assert result["transformations"]["tag_characters"]["false_alarms"] == 1
        assert result["transformations"]["random_case"]["false_alarms"] == 0

    def test_nothing_is_caught(self, tiny):
        """No share is made up where there is nothing to share."""
        evasion = measure.measure_evasion(tiny, SMALL, progress=silent)
        long = measure.measure_long(tiny, SMALL, progress=silent)
        assert evasion["caught"] == long["caught"] == 0
        assert evasion["mean_false_alarms"] > 0
        assert evasion["mean_passed"] is long["located"] is None
        assert {own["caught"] for own in long["lengths"]} == {None}

    def test_long_documents(self):
        result = measure.measure_long(Reader(), SMALL, progress=silent)
        assert 0 < result["caught"] < result["screened"]
        assert 0 < result["located"] <= 1
        assert [own["documents"] for own in result["lengths"]] == [3, 2]
        for own in result["lengths"]:
            assert own["caught"] == 1
            assert own["mean_tokens"] == pytest.approx(own["tokens"], rel=0.4)

    def test_speed_is_of_texts_of_that_length(self, tiny):
        rows = measure.measure_speed(tiny, SMALL)
        assert [row["tokens"] for row in rows] == pytest.approx([16, 64], abs=8)
        assert all(0 < row["best_ms"] <= row["median_ms"] for row in rows)

    def test_the_same_seed_gives_the_same_figures(self):
        one, two = (measure.measure_detector(Reader(), SMALL) for _ in range(2))
        assert {"seed", "engine", "speed", "evasion", "long_documents"} == one.keys()
        for result in (one, two):
            result.pop("speed")
        assert one == two
        assert json.loads(json.dumps(one, allow_nan=False)) == one


def rates(rows: int = 40, share: float | None = 0.25) -> dict:
    return {"rows": rows, "suspicious": share, "dangerous": share}


def figures(name: str = "mine") -> dict:
    """A small report; every name in it is ``name``."""
    roc = [[0.0, 0.0], [0.01, 0.3], [0.1, 0.6], [1.0, 1.0]]
    fold = {"sources": [name], "attacks": 80, "benign": 90, "auroc": 0.8, "roc": roc}
    both = {"attacks": rates(), "benign": rates(0, None)}
    levels = (0.1, 0.01, 0.001)
    reliability = [{"nominal": p, "observed": p / 2, "low": p / 4, "high": p} for p in levels]
    own = {
        "folds": [fold | {"tpr_at_1pct_fpr": 0.3}] * 8,
        "mean_auroc": 0.8,
        "worst_auroc": 0.7,
        "mean_tpr_at_1pct_fpr": 0.3,
        "roc": roc,
        "reliability": reliability,
        "thresholds": [
            {"score": 0.15, "p_value": 0.1, "public": 0.03, "authored": 0.14, "caught": 0.774},
            {"score": 0.7, "p_value": 0.001, "public": None, "authored": 0.0, "caught": 0.0},
        ],
        "benign": {name: rates()},
        "attacks": {name: rates()},
        "families": {name: rates(), "other": rates(3, 0.0)},
        "languages": {name: both | {"auroc": 0.7}},
        "lengths": {"1–16": both | {"auroc": None}},
        "pairs": {name: {"pairs": 10, "higher": 0.7}},
    }
    return own | {"detector": name, "rows": 1234, "origins": {"user": own, "document": own}}


COMPILED = {
    "seed": 1,
    "engine": "native (avx2, 1 thread)",
    "speed": [{"tokens": 16, "median_ms": 3.5, "best_ms": 3.0}],
    "evasion": {
        "screened": 60, "caught": 30, "harmless": 20, "mean_passed": 0.1, "mean_false_alarms": None,
        "transformations": {"zero_width": {"passed": 0.1, "false_alarms": None}},
    },
    "long_documents": {
        "screened": 20, "caught": 10, "located": 0.9,
        "lengths": [
            {"tokens": 2000, "mean_tokens": 2011.5, "documents": 10, "caught": 0.5,
             "located": 0.8, "false_alarms": 0.1},
            {"tokens": 6000, "mean_tokens": None, "documents": 0, "caught": None,
             "located": None, "false_alarms": None},
        ],
    },
}  # fmt: skip


class Page(HTMLParser):
    """What a test asks about a page; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


class TestReport:
    @pytest.fixture(scope="class")
    @staticmethod
    def make():
        pytest.importorskip("matplotlib")
        from alknet_firewall.evaluation.report import html_report

        return html_report

    @pytest.fixture(scope="class")
    @staticmethod
    def html(make):
        return make(figures() | {"compiled": COMPILED})

    def test_it_is_well_formed(self, html):
        page = Page(html)
        assert not page.open
        ids = [own["id"] for _, own in page.elements if "id" in own]
        assert len(ids) == len(set(ids))
        assert not page.text.count("$")

    def test_every_section_is_there_and_linked(self, html):
        page = Page(html)
        headings = {own["id"] for own in page.all("h2")}
        assert len(headings) == 12
        assert {own["href"] for own in page.all("a")} == {f"#{name}" for name in headings}
        assert {own["aria-labelledby"] for own in page.all("section")} == headings

    def test_nothing_is_fetched(self, html):
        page = Page(html)
        assert "://" not in html
        assert not page.all("script", "link", "img", "iframe", "object")
        links = {own[name] for _, own in page.elements for name in ("href", "src") if name in own}
        assert all(link.startswith("#") for link in links)

    def test_it_can_be_read_aloud(self, html):
        page = Page(html)
        plots = page.all("svg")
        assert len(plots) == 2
        assert all(own["role"] == "img" and len(own["aria-label"]) > 40 for own in plots)
        assert len(page.all("table")) == len(page.all("caption")) == 11
        assert {own["scope"] for own in page.all("th")} == {"col", "row"}
        assert page.all("html")[0]["lang"] == "en"

    def test_references_in_plots_lead_somewhere(self, html):
        page = Page(html)
        ids = {own["id"] for _, own in page.elements if "id" in own}
        used = {own["href"].removeprefix("#") for own in page.all("use")}
        used |= {own["clip-path"][5:-1] for _, own in page.elements if "clip-path" in own}
        assert used
        assert used <= ids

    def test_plots_have_the_colours_of_the_page(self, html):
        plots = html[html.index("<svg") : html.rindex("</svg>")]
        assert "currentColor" in plots
        assert "var(--series-0)" in plots
        assert "#0101" not in plots
        assert "#0202" not in plots

    def test_names_are_escaped(self, make):
        html = make(figures(HOSTILE) | {"compiled": COMPILED | {"engine": HOSTILE}})
        page = Page(html)
        assert not page.all("script")
        assert "<script" not in html
        assert page.text.count(HOSTILE) >= 6

    def test_figures_are_shown(self, html):
        text = " ".join(Page(html).text.split())
        for figure in ("1,234", "0.800", "worst 0.700", "zero width", "2,012", "avx2"):
            assert figure in text
        assert "None" not in text
        assert "nan" not in text

    def test_what_was_not_measured_is_said(self, make):
        assert Page(make(figures())).text.count("Not measured in this run") == 3

    def test_a_run_without_enough_text(self, make):
        empty = {"folds": [], "roc": [], "benign": {}, "families": {}, "languages": {}}
        empty |= {"lengths": {}, "pairs": {}, "mean_auroc": None, "worst_auroc": None}
        report = figures() | empty | {"mean_tpr_at_1pct_fpr": None}
        assert Page(make(report)).text.count("There was no such text in this run") == 6

    def test_the_same_figures_give_the_same_page(self, make, html):
        assert make(figures() | {"compiled": COMPILED}) == html


def test_a_missing_library_is_named():
    code = "import sys; sys.modules['matplotlib'] = None; import alknet_firewall.evaluation.report"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'alknet-firewall[report]'" in done.stderr.splitlines()[-1]


def test_measuring_needs_nothing_heavy():
    code = (
        "import sys, alknet_firewall.evaluation.measure as m\n"
        "print({'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
