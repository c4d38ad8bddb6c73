"""Plots of an evaluation as SVG for a page: text stays text, and colours are those of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

try:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"reports need {error.name}: pip install 'alknet-firewall[report]'") from None

__all__ = ["N_SERIES", "reliability_plot", "roc_plot"]

# How many colours of lines the page defines, as --series-0 and so on.
N_SERIES = 6

# Colours that nobody uses, which stand for those of the page until the plot is drawn.
_TEXT, _GRID = "#010101", "#010102"
_SERIES = [f"#02020{i}" for i in range(N_SERIES)]
_OF_PAGE = {_TEXT: "currentColor", _GRID: "var(--rule)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # Text as text: readable aloud, and in the page's font.
    "svg.hashsalt": "alknet-firewall",  # The same plot gives the same bytes.
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "legend.frameon": False,
}


def roc_plot(folds: Sequence[Mapping[str, Any]], pooled: Sequence[Sequence[float]]) -> str:
    """ROC curves of the folds, thin and numbered from 1, and of all texts pooled.

    False positives are on a logarithmic scale, since a firewall is used where they are few.
    """

    def draw(axes: Any) -> None:
        lowest = _lowest([*(fold["roc"] for fold in folds), pooled])
        chance = [lowest ** (step / 50) for step in range(51)]
        axes.plot(chance, chance, color=_TEXT, linewidth=1, linestyle=":")
        for number, fold in enumerate(folds):
            points = _from(lowest, fold["roc"])
            colour = _SERIES[number % N_SERIES]
            axes.plot(*_columns(points), color=colour, linewidth=1.3, drawstyle="steps-post")
            # Numbers stand apart, so that they can be told where curves run together.
            at = lowest ** (0.75 - 0.5 * (number + 0.5) / len(folds))
            axes.annotate(
                str(number + 1), (at, _height(points, at)), color=colour, weight="bold",
                xytext=(0, 5), textcoords="offset points", ha="center",
            )  # fmt: skip
        axes.plot(
            *_columns(_from(lowest, pooled)), color=_TEXT, linewidth=2.4, drawstyle="steps-post"
        )
        axes.set(xscale="log", xlim=(lowest, 1), ylim=(0, 1.02))
        axes.set(xlabel="false positives", ylabel="attacks caught")
        axes.xaxis.set_major_formatter(_percent)
        axes.yaxis.set_major_formatter(_percent)

    return _svg(
        draw,
        "ROC curves: share of attacks caught against share of false positives, one thin line per "
        "left-out fold and a thick one for all texts. The table below has the figures.",
    )


def reliability_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Observed against nominal false-positive rates with their intervals, a colour per origin."""

    def draw(axes: Any) -> None:
        rates = [row["nominal"] for rows in curves.values() for row in rows]
        low, high = min(rates) / 2, 2 * max(rates)
        axes.plot([low, high], [low, high], color=_TEXT, linewidth=1, linestyle="--")
        for number, (name, rows) in enumerate(curves.items()):
            colour = _SERIES[number % N_SERIES]
            # Side by side, so that the intervals of the origins do not hide each other.
            x = [row["nominal"] * 1.12 ** (number - (len(curves) - 1) / 2) for row in rows]
            bottom = low / 3
            axes.vlines(
                x, [max(row["low"], bottom) for row in rows], [row["high"] for row in rows],
                color=colour, linewidth=1.6,
            )  # fmt: skip
            shown = [(a, row["observed"]) for a, row in zip(x, rows, strict=True)]
            axes.plot(
                *_columns([p for p in shown if p[1] > 0]), color=colour, marker="osD^v*"[number],
                linestyle="none", markersize=5.5, label=name,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low / 3, 2 * high))
        axes.set(xlabel="promised (p-value)", ylabel="observed false positives")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_percent)
        axes.legend(loc="upper left")

    return _svg(
        draw,
        "Reliability: observed share of false positives, with 95 % intervals, against the share "
        "that the p-value promises, for each origin. The table below has the figures.",
    )


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.4g} %"


def _from(lowest: float, points: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The curve from a rate on, with what is caught at lower ones as its beginning."""
    return [(lowest, _height(points, lowest)), *(p for p in points if p[0] > lowest)]


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]


def _lowest(curves: Iterable[Sequence[Sequence[float]]]) -> float:
    """Where the axis begins: at the smallest rate seen, a power of ten, at least 0.0001."""
    rates = [p[0] for points in curves for p in points if p[0] > 0]
    lowest = 1.0
    while lowest > max(min(rates, default=0.01), 1.1e-4):
        lowest /= 10
    return lowest


def _height(points: Sequence[Sequence[float]], at: float) -> float:
    return max((p[1] for p in points if p[0] <= at), default=0.0)


def _svg(draw: Callable[[Any], None], description: str) -> str:
    """An ``<svg>`` element for a page, without addresses and with ids of its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.axes[0].minorticks_off()
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{_prefix(description)}-", svg)
    for colour, own in _OF_PAGE.items():
        svg = svg.replace(colour, own)
    svg = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", svg)
    label = f'<svg role="img" aria-label="{escape(description)}" '
    return svg.replace("<svg ", label, 1).strip()


def _prefix(description: str) -> str:
    return description.split(maxsplit=1)[0].strip(":").lower()
