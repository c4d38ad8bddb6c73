"""How good the recipe is on sources it has never seen: leave-sources-out evaluation.

Every text is judged by directions fitted without its fold of sources, and its p-value comes from
the left-out benign texts of the other folds. What is measured is the recipe that compiles a
codebook, on the same engine, windows and splines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from .crossfit import ORIGINS, Corpus, cross_fit, folds_of, is_authored
from .fit import FitOptions
from .null import length_class, null_splines, pchip_linear_above

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

__all__ = ["evaluate", "table"]

# −log₁₀ p from which the level is SUSPICIOUS and DANGEROUS by default.
_SUSPICIOUS, _DANGEROUS = 2.0, 3.0


def evaluate(
    corpus: Corpus,
    options: FitOptions,
    *,
    detector: str,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Measure the recipe on left-out sources.

    Returns
    -------
    dict
        ``folds`` (per fold: sources, numbers of texts, AUROC and TPR at 1 % false positives),
        ``mean_auroc``, ``worst_auroc``, ``mean_tpr_at_1pct_fpr``, all with the origin unknown;
        ``origins`` (the same per origin, on the rows of that origin); ``benign`` (per source:
        rows, share SUSPICIOUS or worse, share DANGEROUS); ``attacks`` (per source and kind: rows,
        share SUSPICIOUS or worse); ``reliability`` (nominal against observed false positives with a
        95 % interval); ``detector``, ``rows``.
    """
    logits = cross_fit(corpus, options, progress=progress)
    folds = folds_of(corpus.rows)
    measured = {origin: _measure_origin(corpus, logits, origin, folds) for origin in ORIGINS}
    report = measured.pop(None)
    report["origins"] = measured
    report["detector"] = detector
    report["rows"] = len(corpus.rows)
    return report


def table(report: Mapping[str, Any]) -> str:
    """The report as text."""
    lines = ["left out                                             AUROC  TPR at 1 % FPR"]
    for fold in report["folds"]:
        names = ", ".join(fold["sources"])
        names = names if len(names) <= 50 else names[:47] + "..."
        lines.append(f"{names:<52} {fold['auroc']:.3f}  {fold['tpr_at_1pct_fpr']:.3f}")
    lines.append(
        f"{'mean':<52} {report['mean_auroc']:.3f}  {report['mean_tpr_at_1pct_fpr']:.3f}"
        f"   worst {report['worst_auroc']:.3f}"
    )
    for origin, own in report.get("origins", {}).items():
        lines.append(
            f"{'origin=' + origin:<52} {own['mean_auroc']:.3f}  {own['mean_tpr_at_1pct_fpr']:.3f}"
            f"   worst {own['worst_auroc']:.3f}"
        )
    lines.append("")
    lines.append("benign source                      rows  SUSPICIOUS+  DANGEROUS")
    for source, rates in report["benign"].items():
        lines.append(
            f"{source:<32} {rates['rows']:>6}"
            f"  {rates['suspicious']:>10.2%}  {rates['dangerous']:>9.2%}"
        )
    return "\n".join(lines)


def _measure_origin(
    corpus: Corpus, logits: Array, origin: str | None, folds: list[Bools]
) -> dict[str, Any]:
    """Measures on the texts that could have an origin, read as texts of that origin."""
    own = np.zeros(len(corpus.rows), dtype=bool)
    own[corpus.of_origin(origin)] = True
    return _measure(corpus, _log_p(corpus, logits, own, folds), folds, own)


def _log_p(corpus: Corpus, logits: Array, own: Bools, folds: list[Bools]) -> Array:
    """−log₁₀ p of every text against the left-out benign texts ``own`` of the other folds."""
    x = np.full(len(corpus.rows), np.nan)
    classes = length_class(corpus.n_tokens)
    for held in folds:
        null = np.flatnonzero(own & ~held & ~corpus.attack)
        knots, values = null_splines(
            logits[null], corpus.n_tokens[null], list(corpus.sources[null])
        )
        for c in range(len(knots)):
            these = held & (classes == c)
            x[these] = pchip_linear_above(knots[c], values[c], logits[these])
    return x.clip(0, 12)


def _measure(corpus: Corpus, x: Array, folds: list[Bools], own: Bools) -> dict[str, Any]:
    attack = corpus.attack
    rows: list[dict[str, Any]] = []
    for held in folds:
        these = held & own
        positive, negative = x[these & attack], x[these & ~attack]
        sources = sorted(set(corpus.sources[these]))
        if len(positive) < 10 or len(negative) < 20 or all(map(is_authored, sources)):
            continue
        threshold = np.quantile(negative, 0.99)
        rows.append(
            {
                "sources": sources,
                "attacks": len(positive),
                "benign": len(negative),
                "auroc": float(roc_auc_score(attack[these], x[these])),
                "tpr_at_1pct_fpr": float((positive > threshold).mean()),
            }
        )
    aurocs = [row["auroc"] for row in rows] or [float("nan")]
    return {
        "folds": rows,
        "mean_auroc": float(np.mean(aurocs)),
        "worst_auroc": float(np.min(aurocs)),
        "mean_tpr_at_1pct_fpr": float(np.mean([row["tpr_at_1pct_fpr"] for row in rows] or [0.0])),
        "benign": _rates(corpus, x, own & ~attack, with_kind=False),
        "attacks": _rates(corpus, x, own & attack, with_kind=True),
        "reliability": _reliability(x[own & ~attack]),
    }


def _rates(corpus: Corpus, x: Array, texts: Bools, *, with_kind: bool) -> dict[str, Any]:
    names = np.array([f"{r.source}/{r.kind}" if with_kind else r.source for r in corpus.rows])
    rates = {}
    for name in sorted(set(names[texts])):
        own = x[texts & (names == name)]
        rates[str(name)] = {
            "rows": len(own),
            "suspicious": float((own >= _SUSPICIOUS).mean()),
            "dangerous": float((own >= _DANGEROUS).mean()),
        }
    return rates


def _reliability(x: Array) -> list[dict[str, float]]:
    """Nominal against observed false-positive rates, with 95 % Wilson intervals."""
    rows: list[dict[str, Any]] = []
    for nominal in (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001):
        n, hits = len(x), int((x >= -np.log10(nominal)).sum())
        z, observed = 1.96, hits / max(n, 1)
        centre = (observed + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(observed * (1 - observed) / n + z * z / (4 * n * n))
        rows.append(
            {
                "nominal": nominal,
                "observed": observed,
                "low": float(max(centre - half, 0.0)),
                "high": float(centre + half),
            }
        )
    return rows
