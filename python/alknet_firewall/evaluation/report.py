"""One page of an evaluation: tables and plots, self-contained, nothing fetched from a network.

Needs the ``[report]`` extra.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from .. import _core
from .intervals import wilson
from .plots import N_SERIES, reliability_plot, roc_plot

__all__ = ["html_report", "write_report"]

_MISSING = '<p class="note">Not measured in this run.</p>'
_NOTHING = '<p class="note">There was no such text in this run.</p>'
# Rows of a long table that are shown at once; the others can be unfolded.
_SHOWN = 12
_RATES = ("texts", "SUSPICIOUS or worse", "DANGEROUS")
_BOTH_RATES = ("attacks", "caught", "ordinary texts", "false alarms")


class _Html(str):
    """Text that is HTML already; all other text is escaped where it enters the page."""


class _Bar(_Html):
    """A whole cell of a table, with its tags."""


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of `html_report` to a file, in UTF-8."""
    path.write_text(html_report(report), encoding="utf-8")


def html_report(report: Mapping[str, Any]) -> str:
    """The page.

    Parameters
    ----------
    report : mapping
        As from `alknet_firewall.calibration.evaluate.evaluate`. ``compiled``, as from
        `measure.measure_detector`, may be missing; its sections then say so.
    """
    compiled = report.get("compiled")
    parts = {
        "detector": escape(report["detector"]),
        "version": escape(_core.__version__),
        "rows": f"{report['rows']:,}",
        "tiles": _tiles(report),
        "roc": _roc(report),
        "folds": _folds(report),
        **_reliability(report),
        "thresholds": _thresholds(report["thresholds"]),
        "benign": _rates_table("Ordinary texts by source", "source", report["benign"], good=False),
        "families": _rates_table("Attacks by family", "family", report["families"], good=True),
        "languages": _both_table("Texts by language", "language", _most_first(report["languages"])),
        "lengths": _both_table("Texts by length", "tokens", report["lengths"]),
        "pairs": _pairs(report["pairs"]),
        "disguises": _disguises(compiled["evasion"]) if compiled else _MISSING,
        "long_documents": _long_documents(compiled["long_documents"]) if compiled else _MISSING,
        "speed": _speed(compiled["speed"]) if compiled else _MISSING,
        "engine": f"Engine: {escape(compiled['engine'])}." if compiled else "",
    }
    page = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return Template(page).substitute(parts)


def _tiles(report: Mapping[str, Any]) -> str:
    """The figures to look at first."""
    tiles = [
        (_figure(report["mean_auroc"]), "mean AUROC over left-out folds"),
        (_figure(report["worst_auroc"]), "AUROC of the worst fold"),
        (_percent(report["mean_tpr_at_1pct_fpr"]), "of attacks caught at 1 % false positives"),
    ]
    tiles += [
        (_percent(row["observed"], 1), "false alarms where 1 % is promised")
        for row in report["reliability"]
        if row["nominal"] == 0.01
    ]
    if compiled := report.get("compiled"):
        evasion = compiled["evasion"]
        alarms = _percent(evasion["mean_false_alarms"])
        name = f"of caught attacks pass in a disguise, and {alarms} of harmless texts alarm in it"
        tiles.append((_percent(evasion["mean_passed"]), name))
        if times := compiled["speed"]:
            middle = times[min(1, len(times) - 1)]
            tiles.append((f"{middle['median_ms']:.0f} ms", f"for {middle['tokens']} tokens"))
    return "".join(f"<li><b>{value}</b><span>{escape(name)}</span></li>" for value, name in tiles)


def _roc(report: Mapping[str, Any]) -> str:
    if not report["folds"]:
        return _NOTHING
    return _figure_of(
        roc_plot(report["folds"], report["roc"]),
        "Thin lines are folds, numbered as in the table; the thick one is all of their texts, "
        "the dotted one is chance.",
    )


def _folds(report: Mapping[str, Any]) -> str:
    header = ("left out", "attacks", "ordinary", "AUROC", "caught at 1\N{NO-BREAK SPACE}%")
    rows: list[Sequence[str]] = []
    for number, fold in enumerate(report["folds"]):
        name = f"{_swatch(number)}{escape(', '.join(fold['sources']))}"
        low, high = wilson(fold["tpr_at_1pct_fpr"] * fold["attacks"], fold["attacks"])
        rows.append(
            (
                _Html(name),
                f"{fold['attacks']:,}",
                f"{fold['benign']:,}",
                _figure(fold["auroc"]),
                _bar(fold["tpr_at_1pct_fpr"], low, high, good=True),
            )
        )
    totals = [("mean, origin unknown", report)]
    totals += [
        (f"mean, texts of origin {origin}, read as such", own)
        for origin, own in report["origins"].items()
    ]
    for name, own in totals:
        worst = _Html(f"{_figure(own['mean_auroc'])} <small>worst {_figure(own['worst_auroc'])}")
        caught = _bar(own["mean_tpr_at_1pct_fpr"], good=True)
        rows.append((name, "", "", _Html(f"{worst}</small>"), caught))
    return _table("Folds of sources that were left out together", header, rows, len(totals))


def _reliability(report: Mapping[str, Any]) -> dict[str, str]:
    curves = {"origin unknown": report["reliability"]}
    curves |= {f"origin {name}": own["reliability"] for name, own in report["origins"].items()}
    rows = []
    for at, row in enumerate(report["reliability"]):
        cells = [_share(own[at]["observed"], own[at]["low"], own[at]["high"])
                 for own in curves.values()]  # fmt: skip
        rows.append((f"{100 * row['nominal']:g}\N{NO-BREAK SPACE}%", *cells))
    caption = "Bars are 95 % intervals; a point at zero is not drawn, its interval is."
    return {
        "reliability": _figure_of(reliability_plot(curves), caption),
        "reliability_table": _table(
            "Observed share of false positives", ("promised", *curves), rows
        ),
    }


def _thresholds(rows: Sequence[Mapping[str, Any]]) -> str:
    header = (
        "score",
        "p-value",
        "public texts alarm",
        "our ordinary texts alarm",
        "attacks caught",
    )
    cells = [
        (
            f"{row['score']:.2f}",
            f"{row['p_value']:g}",
            *(_percent(row[name], 1) for name in ("public", "authored", "caught")),
        )
        for row in rows
    ]
    return _table("Alarms from a score on", header, cells)


def _rates_table(
    caption: str,
    name: str,
    rates: Mapping[str, Mapping[str, Any]],
    *,
    good: bool,
) -> str:
    """Rates by name, the highest first; alarms are ``good`` on attacks."""
    ordered = sorted(rates.items(), key=lambda item: (-item[1]["suspicious"], item[0]))
    rows = [
        (key, f"{own['rows']:,}", _rate(own, "suspicious", good), _rate(own, "dangerous", good))
        for key, own in ordered
    ]
    # Of attacks the last rows matter most, so that none is hidden.
    return (_table if good else _long_table)(caption, (name, *_RATES), rows)


def _both_table(caption: str, name: str, rates: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            key,
            f"{own['attacks']['rows']:,}",
            _rate(own["attacks"], "suspicious", good=True),
            f"{own['benign']['rows']:,}",
            _rate(own["benign"], "suspicious", good=False),
            _figure(own["auroc"]),
        )
        for key, own in rates.items()
    ]
    return _long_table(caption, (name, *_BOTH_RATES, "AUROC"), rows)


def _most_first(rates: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    def texts(item: tuple[str, Mapping[str, Any]]) -> int:
        return -int(item[1]["attacks"]["rows"] + item[1]["benign"]["rows"])

    return dict(sorted(rates.items(), key=texts))


def _pairs(pairs: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for source, own in pairs.items():
        interval = wilson(own["higher"] * own["pairs"], own["pairs"])
        rows.append((source, f"{own['pairs']:,}", _bar(own["higher"], *interval, good=True)))
    rows.sort(key=lambda row: -pairs[row[0]]["pairs"])
    return _long_table("Pairs by source", ("source", "pairs", "attack above its twin"), rows)


def _disguises(evasion: Mapping[str, Any]) -> str:
    attacks, harmless = evasion["caught"], evasion["harmless"]
    ordered = sorted(
        evasion["transformations"].items(), key=lambda item: (-(item[1]["passed"] or 0), item[0])
    )
    rows = [
        (
            name.replace("_", " "),
            _counted(own["passed"], attacks, good=False),
            _counted(own["false_alarms"], harmless, good=False),
        )
        for name, own in ordered
    ]
    passed, alarms = _percent(evasion["mean_passed"]), _percent(evasion["mean_false_alarms"])
    note = (
        f"{attacks} attacks that are caught plain (of {evasion['screened']} screened) and "
        f"{harmless} harmless texts. On average {passed} of the attacks pass and {alarms} of "
        "the harmless texts alarm."
    )
    header = ("disguise", "attacks that pass", "harmless texts that alarm")
    return f'<p class="note">{note}</p>{_table("Disguises", header, rows)}'


def _long_documents(long: Mapping[str, Any]) -> str:
    header = ("tokens", "documents", "still caught", "of these located", "alarms without injection")
    low, high = wilson(long["caught"], long["screened"])
    rows: list[Sequence[str]] = []
    for own in long["lengths"]:
        number = own["documents"]
        caught = round((own["caught"] or 0) * number)
        rows.append(
            (
                f"{own['mean_tokens'] or own['tokens']:,.0f}",
                f"{number:,}",
                _counted(own["caught"], number, good=True),
                _counted(own["located"], caught, good=True),
                _counted(own["false_alarms"], number, good=False),
            )
        )
    share = long["caught"] / long["screened"] if long["screened"] else None
    note = (
        f"Alone, {_share(share, low, high)} of {long['screened']} such documents are caught, "
        f"{_percent(long['located'])} of these with a span on the injection."
    )
    table = _table("Documents that are caught alone, among others", header, rows)
    return f'<p class="note">{note}</p>{table}'


def _speed(times: Sequence[Mapping[str, float]]) -> str:
    rows = [
        (
            f"{own['tokens']:,}",
            f"{own['median_ms']:,.1f}",
            f"{own['best_ms']:,.1f}",
            f"{own['tokens'] / own['median_ms'] * 1e3:,.0f}",
        )
        for own in times
    ]
    header = ("tokens", "median, ms", "best, ms", "tokens per second")
    return _table("Time of one screen", header, rows)


def _table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], totals: int = 0
) -> str:
    """A table whose first column names the rows; the last ``totals`` rows stand out."""
    if not rows:
        return _NOTHING
    lines = []
    for number, (name, *cells) in enumerate(rows):
        kind = ' class="total"' if number >= len(rows) - totals else ""
        lines.append(f'<tr{kind}><th scope="row">{_cell(name)}</th>{"".join(map(_td, cells))}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{_headings(header)}</tr></thead>\n"
        "<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def _long_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of which only the first rows are shown until the others are asked for."""
    if len(rows) <= _SHOWN + 3:
        return _table(caption, header, rows)
    rest = _table(f"{caption}, continued", header, rows[_SHOWN:])
    return (
        f"{_table(caption, header, rows[:_SHOWN])}"
        f"<details><summary>{len(rows) - _SHOWN} more</summary>{rest}</details>"
    )


def _headings(names: Iterable[str]) -> str:
    return "".join(f'<th scope="col">{escape(name)}</th>' for name in names)


def _cell(value: str) -> str:
    return value if isinstance(value, _Html) else escape(value)


def _td(value: str) -> str:
    return value if isinstance(value, _Bar) else f"<td>{_cell(value)}</td>"


def _rate(rates: Mapping[str, Any], level: str, good: bool) -> str:
    return _counted(rates[level], rates["rows"], good=good)


def _counted(share: float | None, n: int, *, good: bool) -> str:
    """A share of ``n`` with its interval."""
    if share is None:
        return "–"
    return _bar(share, *wilson(share * n, n), good=good)


def _bar(
    share: float | None, low: float | None = None, high: float | None = None, *, good: bool
) -> str:
    """A cell with a share as a number and as a bar."""
    if share is None:
        return "–"
    kind = "good" if good else "bad"
    return _Bar(f'<td class="{kind}" style="--share:{share:.1%}">{_share(share, low, high)}</td>')


def _share(share: float | None, low: float | None = None, high: float | None = None) -> _Html:
    """A share in per cent, with a decimal where it is known so well, and its interval."""
    if share is None:
        return _Html("–")
    decimals = 1 if (share < 0.1 if low is None or high is None else high - low < 0.05) else 0
    text = _percent(share, decimals)
    if low is None or high is None:
        return _Html(text)
    return _Html(f"{text} <small>{100 * low:.{decimals}f}–{100 * high:.{decimals}f}</small>")


def _percent(share: float | None, decimals: int = 0) -> str:
    return "–" if share is None else f"{100 * share:.{decimals}f}\N{NO-BREAK SPACE}%"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _swatch(number: int) -> str:
    colour = f"--colour:var(--series-{number % N_SERIES})"
    return f'<span class="swatch" style="{colour}">{number + 1}</span>'


def _figure_of(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
