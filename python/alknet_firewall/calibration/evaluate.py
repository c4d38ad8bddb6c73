"""How good the recipe is on sources it has never seen: leave-sources-out evaluation.

Every text is judged by directions fitted without its fold of sources, and its p-value comes from
the left-out benign texts of the other folds. What is measured is the recipe that compiles a
codebook, on the same engine, windows and splines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score, roc_curve

from .. import _core
from ..evaluation.intervals import wilson
from .corpus import is_authored
from .crossfit import ORIGINS, Corpus, LeftOut, cross_fit_stages, folds_of
from .fit import FitOptions
from .null import LENGTH_CLASSES, length_class, pchip_linear_above

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

__all__ = ["evaluate", "quality", "table"]

# −log₁₀ p from which the level is SUSPICIOUS and DANGEROUS by default.
_SUSPICIOUS, _DANGEROUS = 2.0, 3.0

# p-values at which rates are given.
_P_VALUES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)

# Attacks that a fold or a source must have for a figure of its own.
_ENOUGH_ATTACKS = 10

# Most points of a ROC curve that are kept for plotting.
_ROC_POINTS = 200


def evaluate(
    corpus: Corpus,
    options: FitOptions,
    *,
    detector: str,
    sites: Sequence[str] = (),
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Measure the recipe on left-out sources.

    Every figure is of left-out texts. Figures that nothing was left to compute from are None.

    Parameters
    ----------
    sites : sequence of str
        What the windows hold, side by side; where it is not said, there is no first stage.

    Returns
    -------
    dict
        ``detector``, ``rows`` (number of texts), and, with the origin unknown:

        ``folds``
            Per fold ``sources``, ``attacks`` and ``benign`` (numbers of texts), ``auroc``,
            ``tpr_at_1pct_fpr`` and ``roc``.
        ``mean_auroc``, ``worst_auroc``, ``mean_tpr_at_1pct_fpr``
            Over the folds.
        ``roc``
            Of the folds' texts pooled: at most 200 points ``[false positives, true positives]``,
            rising from ``[0, 0]`` to ``[1, 1]``.
        ``reliability``
            Per ``nominal`` rate of false positives the ``observed`` one with its 95 % interval
            (``low``, ``high``).
        ``thresholds``
            What other thresholds would give. Per ``score``, the ``p_value`` it stands for, the
            shares of benign texts that reach it, of those from public sources (``public``) and
            written for this project (``authored``), and that of attacks (``caught``), the mean
            over public sources of ten and more.
        ``early``
            What an early exit would do: shares of ``benign`` texts, of those from public sources
            (``public``), of ``attacks`` and of those that alarm (``caught``) that the first stage
            would end the reading of; None without such a stage. All else is without it.
        ``benign``
            Rates per source. Rates are ``rows``, ``suspicious`` (share SUSPICIOUS or worse) and
            ``dangerous`` (share DANGEROUS).
        ``attacks``
            Rates per source and kind.
        ``families``
            Rates of attacks per family; the kind stands for it where a row names none.
        ``languages``
            Per language rates of ``attacks`` and of ``benign`` texts, and ``auroc`` between them.
        ``lengths``
            The same per length class in tokens, the shortest first.
        ``pairs``
            Per source ``pairs`` (attacks that have a clean twin) and ``higher`` (share of them that
            are more alarming than it, equal ones counting half).

        ``origins`` holds all of these per origin, on the rows of that origin, read as of it.
    """
    left_out = cross_fit_stages(corpus, options, sites, progress=progress)
    folds = folds_of(corpus.rows)
    ended = _ended(corpus, left_out, folds)
    measured = {
        origin: _measure_origin(corpus, left_out.whole, ended, origin, folds) for origin in ORIGINS
    }
    report = measured.pop(None)
    report["origins"] = measured
    report["detector"] = detector
    report["rows"] = len(corpus.rows)
    return report


def quality(corpus: Corpus, left_out: LeftOut) -> dict[str, Any]:
    """The figures of `evaluate` that a codebook records: per fold and source, origin unknown."""
    folds = folds_of(corpus.rows)
    ended = _ended(corpus, left_out, folds)
    report = _measure_origin(corpus, left_out.whole, ended, None, folds)
    kept = ("folds", "mean_auroc", "worst_auroc", "mean_tpr_at_1pct_fpr", "reliability", "early")
    recorded = {name: report[name] for name in (*kept, "benign", "attacks")}
    for fold in recorded["folds"]:
        del fold["roc"]
    return recorded


def table(report: Mapping[str, Any]) -> str:
    """The report as text."""
    parts = [_folds_table(report), _thresholds_table(report)]
    parts += [_early_line(report["early"]), _pairs_line(report)]
    parts.append(_rates_table("benign source", report["benign"]))
    parts.append(_rates_table("attack family", report["families"]))
    if "compiled" in report:
        parts.append(_compiled_lines(report["compiled"]))
    return "\n\n".join(filter(None, parts))


def _folds_table(report: Mapping[str, Any]) -> str:
    lines = [f"{'left out':<52} AUROC  TPR at 1 % FPR"]
    for fold in report["folds"]:
        names = ", ".join(fold["sources"])
        names = names if len(names) <= 50 else names[:47] + "..."
        lines.append(f"{names:<52} {fold['auroc']:.3f}  {fold['tpr_at_1pct_fpr']:.3f}")
    means = [("mean", report)]
    means += [(f"origin={origin}", own) for origin, own in report.get("origins", {}).items()]
    for name, own in means:
        auroc, tpr = _figure(own["mean_auroc"]), _figure(own["mean_tpr_at_1pct_fpr"])
        lines.append(f"{name:<52} {auroc}  {tpr}   worst {_figure(own['worst_auroc'])}")
    return "\n".join(lines)


def _thresholds_table(report: Mapping[str, Any]) -> str:
    lines = ["threshold  p-value   ordinary texts: public, ours   attacks"]
    for row in report["thresholds"]:
        public, ours, caught = (_figure(row[name]) for name in ("public", "authored", "caught"))
        ordinary = f"{public}  {ours}"
        lines.append(f"{row['score']:>9.2f}  {row['p_value']:>7g}  {ordinary:>29}   {caught:>7}")
    return "\n".join(lines)


def _rates_table(name: str, rates: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"{name:<32}   rows  SUSPICIOUS+  DANGEROUS"]
    lines += [
        f"{key:<32} {own['rows']:>6}   {own['suspicious']:>10.2%}  {own['dangerous']:>9.2%}"
        for key, own in rates.items()
    ]
    return "\n".join(lines)


def _early_line(early: Mapping[str, float | None] | None) -> str:
    if early is None:
        return ""
    shares = ", ".join(f"{name} {_figure(share)}" for name, share in early.items())
    return f"an early exit would end the reading of: {shares}"


def _pairs_line(report: Mapping[str, Any]) -> str:
    number = sum(own["pairs"] for own in report["pairs"].values())
    higher = sum(own["pairs"] * own["higher"] for own in report["pairs"].values())
    return f"pairs with the attack above its clean twin: {higher:.0f} of {number}" if number else ""


def _compiled_lines(compiled: Mapping[str, Any]) -> str:
    evasion, long = compiled["evasion"], compiled["long_documents"]
    number = evasion["caught"]
    lines = [f"{number} attacks that are caught plain pass in disguise, harmless texts alarm"]
    worst = sorted(evasion["transformations"].items(), key=lambda item: -(item[1]["passed"] or 0))
    lines += [
        f"  {name:<30} {_figure(own['passed'])}  {_figure(own['false_alarms'])}"
        for name, own in worst[:5]
    ]
    means = f"{_figure(evasion['mean_passed'])}  {_figure(evasion['mean_false_alarms'])}"
    lines.append(f"  {'mean of all disguises':<30} {means}")
    lines.append("injections caught in short documents are caught in long ones, and located")
    lines += [
        f"  {own['tokens']:>6} tokens: {_figure(own['caught'])}, {_figure(own['located'])}"
        for own in long["lengths"]
    ]
    lines.append("milliseconds per screen")
    lines += [
        f"  {own['tokens']:>6} tokens: {own['median_ms']:.1f} (best {own['best_ms']:.1f})"
        for own in compiled["speed"]
    ]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "    –" if value is None else f"{value:.3f}"


def _measure_origin(
    corpus: Corpus, logits: Array, ended: Bools | None, origin: str | None, folds: list[Bools]
) -> dict[str, Any]:
    """Measures on the texts that could have an origin, read as texts of that origin."""
    own = _texts_of(corpus, origin)
    x = _log_p(corpus, logits, own, folds)
    early = None if ended is None else _early(corpus, x, ended, own)
    return _measure(corpus, x, folds, own) | {"early": early}


def _texts_of(corpus: Corpus, origin: str | None) -> Bools:
    texts = np.zeros(len(corpus.rows), dtype=bool)
    texts[corpus.of_origin(origin)] = True
    return texts


def _ended(corpus: Corpus, left_out: LeftOut, folds: list[Bools]) -> Bools | None:
    """Texts that the first stage, if there is one, finds ordinary whatever their origin is."""
    if left_out.early is None:
        return None
    own = [_log_p(corpus, left_out.early, _texts_of(corpus, o), folds) for o in ORIGINS]
    ended: Bools = np.max(own, axis=0) < -np.log10(left_out.above)
    return ended


def _early(corpus: Corpus, x: Array, ended: Bools, own: Bools) -> dict[str, float | None]:
    public = np.array([not is_authored(source) for source in corpus.sources])
    texts = {
        "benign": ~corpus.attack,
        "public": ~corpus.attack & public,
        "attacks": corpus.attack,
        "caught": corpus.attack & (x >= _SUSPICIOUS),
    }
    return {name: _mean(ended[own & these].tolist()) for name, these in texts.items()}


def _log_p(corpus: Corpus, logits: Array, own: Bools, folds: list[Bools]) -> Array:
    """−log₁₀ p of every text against the left-out benign texts ``own`` of the other folds."""
    x = np.full(len(corpus.rows), np.nan)
    classes = length_class(corpus.n_tokens)
    for held in folds:
        null = np.flatnonzero(own & ~held & ~corpus.attack)
        knots, values = corpus.null(logits, null)
        for c in range(len(knots)):
            these = held & (classes == c)
            x[these] = pchip_linear_above(knots[c], values[c], logits[these])
    return x.clip(0, 12)


def _measure(corpus: Corpus, x: Array, folds: list[Bools], own: Bools) -> dict[str, Any]:
    judged = [held & own for held in folds if _can_judge(corpus, held & own)]
    rows = [_measure_fold(corpus, x, these) for these in judged]
    aurocs = [row["auroc"] for row in rows]
    pooled = np.any(judged, axis=0) if judged else np.zeros(len(x), dtype=bool)
    benign, attacks = own & ~corpus.attack, own & corpus.attack
    return {
        "folds": rows,
        "mean_auroc": _mean(aurocs),
        "worst_auroc": min(aurocs, default=None),
        "mean_tpr_at_1pct_fpr": _mean([row["tpr_at_1pct_fpr"] for row in rows]),
        "roc": _roc(corpus.attack[pooled], x[pooled]),
        "reliability": _reliability(x[benign]),
        "thresholds": _thresholds(corpus, x, own),
        "benign": _rates(x, benign, [row.source for row in corpus.rows]),
        "attacks": _rates(x, attacks, [f"{row.source}/{row.kind}" for row in corpus.rows]),
        "families": _rates(x, attacks, [row.family or row.kind for row in corpus.rows]),
        "languages": _languages(corpus, x, own),
        "lengths": _lengths(corpus, x, own),
        "pairs": _pairs(corpus, x, own),
    }


def _can_judge(corpus: Corpus, these: Bools) -> bool:
    """Whether a fold has enough of both, and a source that was left out whole."""
    n_attacks = int(corpus.attack[these].sum())
    n_benign = int(these.sum()) - n_attacks
    whole = any(not is_authored(source) for source in set(corpus.sources[these]))
    return n_attacks >= _ENOUGH_ATTACKS and n_benign >= 20 and whole


def _measure_fold(corpus: Corpus, x: Array, these: Bools) -> dict[str, Any]:
    attack = corpus.attack[these]
    positive, negative = x[these][attack], x[these][~attack]
    return {
        "sources": sorted(set(map(str, corpus.sources[these]))),
        "attacks": len(positive),
        "benign": len(negative),
        "auroc": float(roc_auc_score(attack, x[these])),
        "tpr_at_1pct_fpr": float((positive > np.quantile(negative, 0.99)).mean()),
        "roc": _roc(attack, x[these]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _roc(attack: Bools, x: Array) -> list[list[float]]:
    """Points of the curve, evenly spread over both the rates and their logarithms."""
    if attack.all() or not attack.any():
        return []
    fpr, tpr, _ = roc_curve(attack, x)
    if len(fpr) > _ROC_POINTS:
        half = (_ROC_POINTS - 2) // 2
        rates = np.concatenate([np.linspace(0, 1, half), np.geomspace(fpr[fpr > 0][0], 1, half)])
        kept = np.searchsorted(fpr, rates, side="right") - 1
        kept = np.unique([0, *kept, len(fpr) - 1])
        fpr, tpr = fpr[kept], tpr[kept]
    return [[round(float(a), 6), round(float(b), 6)] for a, b in zip(fpr, tpr, strict=True)]


def _rate(x: Array) -> dict[str, Any]:
    return {
        "rows": len(x),
        "suspicious": float((x >= _SUSPICIOUS).mean()) if len(x) else None,
        "dangerous": float((x >= _DANGEROUS).mean()) if len(x) else None,
    }


def _rates(x: Array, texts: Bools, names: Sequence[str]) -> dict[str, Any]:
    """Rates of some texts by name."""
    of_row = np.array(names)
    return {str(name): _rate(x[texts & (of_row == name)]) for name in np.unique(of_row[texts])}


def _languages(corpus: Corpus, x: Array, texts: Bools) -> dict[str, Any]:
    of_row = np.array([row.lang or "unknown" for row in corpus.rows])
    names = np.unique(of_row[texts])
    return {str(name): _rates_of_both(corpus, x, texts & (of_row == name)) for name in names}


def _lengths(corpus: Corpus, x: Array, texts: Bools) -> dict[str, Any]:
    classes = length_class(corpus.n_tokens)
    starts = (1, *(bound + 1 for bound in LENGTH_CLASSES[:-1]))
    return {
        f"{start}–{end}": _rates_of_both(corpus, x, texts & (classes == c))
        for c, (start, end) in enumerate(zip(starts, LENGTH_CLASSES, strict=True))
        if (texts & (classes == c)).any()
    }


def _rates_of_both(corpus: Corpus, x: Array, texts: Bools) -> dict[str, Any]:
    """Rates of the attacks and of the benign ones among some texts, and AUROC between them."""
    attack = corpus.attack[texts]
    both = attack.any() and not attack.all()
    return {
        "attacks": _rate(x[texts][attack]),
        "benign": _rate(x[texts][~attack]),
        "auroc": float(roc_auc_score(attack, x[texts])) if both else None,
    }


def _pairs(corpus: Corpus, x: Array, own: Bools) -> dict[str, Any]:
    """How often an attack is more alarming than its clean twin, by source."""
    paired = [(corpus.rows[t], float(x[t])) for t in map(int, np.flatnonzero(own))]
    paired = [(row, value) for row, value in paired if row.pair]
    clean: dict[tuple[str, str], float] = {}
    for row, value in paired:
        if not row.attack:
            key = (row.source, row.pair)
            clean[key] = max(clean.get(key, 0.0), value)
    compared: dict[str, list[float]] = {}
    for row, value in paired:
        twin = clean.get((row.source, row.pair))
        if row.attack and twin is not None:
            compared.setdefault(row.source, []).append(0.5 * (1 + np.sign(value - twin)))
    return {
        source: {"pairs": len(wins), "higher": float(np.mean(wins))}
        for source, wins in sorted(compared.items())
    }


def _thresholds(corpus: Corpus, x: Array, own: Bools) -> list[dict[str, float | None]]:
    """False alarms and attacks caught where the threshold is another one."""
    authored = np.array([is_authored(source) for source in corpus.sources])
    benign, attacks = own & ~corpus.attack, own & corpus.attack & ~authored
    sources = [attacks & (corpus.sources == name) for name in np.unique(corpus.sources[attacks])]
    sources = [texts for texts in sources if texts.sum() >= _ENOUGH_ATTACKS]

    def rate(texts: Bools, p_value: float) -> list[float]:
        return [float((x[texts] >= -np.log10(p_value)).mean())] if texts.any() else []

    return [
        {
            "score": _core.score(p_value),
            "p_value": p_value,
            "public": _mean(rate(benign & ~authored, p_value)),
            "authored": _mean(rate(benign & authored, p_value)),
            "caught": _mean([share for texts in sources for share in rate(texts, p_value)]),
        }
        for p_value in _P_VALUES
    ]


def _reliability(x: Array) -> list[dict[str, float]]:
    """Nominal against observed false-positive rates, with 95 % intervals."""
    rows = []
    for nominal in _P_VALUES:
        hits = int((x >= -np.log10(nominal)).sum())
        low, high = wilson(hits, len(x))
        observed = hits / max(len(x), 1)
        rows.append({"nominal": nominal, "observed": observed, "low": low, "high": high})
    return rows
