"""Null distributions: how often benign text reaches a statistic, per length class.

The statistics come from benign sources that were left out when the directions that gave them were
fitted, so that a p-value speaks of text from a source never seen. Sources weigh alike, and so do
kinds of text that were written for this project.

The last length class is also that of every segment of a long document, which may be about many
things: the long texts of a corpus mostly stay with one. Three quarters of its weight are therefore
those of documents joined at random until they are as long, if there are documents. Short ones are
not joined: a page of thirty notes, each of which somebody wrote because it is hard, is nothing that
long documents resemble.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator

from .corpus import Row

Array = npt.NDArray[np.float64]

__all__ = [
    "LENGTH_CLASSES",
    "N_KNOTS",
    "component_cdf",
    "length_class",
    "null_splines",
    "pchip_linear_above",
]

# Upper bounds in tokens, inclusive; the last class also serves longer pieces.
LENGTH_CLASSES = (16, 48, 128, 384, 640, 1024)

N_KNOTS = 24

# Survival probabilities that become knots while the sample supports them; beyond, the tail is
# exponential, fitted to the excesses over `_TAIL_FROM`.
_LEVELS = np.array([0.9, 0.7, 0.5, 0.35, 0.25, 0.18, 0.13, 0.09, 0.065])
_TAIL_FROM = 0.05
_TAIL_LEVELS = np.array([0.02, 0.01, 0.003, 0.001, 0.0001])

# Weight of joined documents in the last class, and the fewest tokens of each of them.
_JOINED_SHARE = 0.75
_JOINED_TOKENS = 128

# A class with fewer texts than this borrows the neighbouring classes' texts.
_ENOUGH = 400


def length_class(n_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Index into `LENGTH_CLASSES` for every number of tokens."""
    found = np.searchsorted(LENGTH_CLASSES, n_tokens, side="left")
    return np.minimum(found, len(LENGTH_CLASSES) - 1).astype(np.int64)


def source_weights(sources: Sequence[str]) -> Array:
    """Weights that sum to one, so that a source of n texts weighs √n."""
    _, inverse, counts = np.unique(np.asarray(sources), return_inverse=True, return_counts=True)
    weights = 1.0 / np.sqrt(counts[inverse])
    normalised: Array = weights / weights.sum()
    return normalised


def null_splines(
    statistics: Array, n_tokens: npt.NDArray[np.int64], rows: Sequence[Row]
) -> tuple[Array, Array]:
    """Knots and −log₁₀ p, both ``(n_length_classes, N_KNOTS)``, from benign texts.

    Parameters
    ----------
    statistics : ndarray
        ``(n_texts,)``, larger is more alarming.
    rows : sequence of Row
        The texts: where each comes from, and whether it is a document.
    """
    classes = length_class(n_tokens)
    documents = np.array([row.origin != "user" for row in rows]) & (n_tokens >= _JOINED_TOKENS)
    both = joined(statistics[documents], n_tokens[documents], LENGTH_CLASSES[-1])
    knots, values = [], []
    for c in range(len(LENGTH_CLASSES)):
        reach = 0
        while (near := np.abs(classes - c) <= reach).sum() < min(_ENOUGH, len(classes)):
            reach += 1
        own = statistics[near]
        weights = source_weights([rows[int(t)].source for t in np.flatnonzero(near)])
        if c == len(LENGTH_CLASSES) - 1 and len(both):
            share = np.full(len(both), _JOINED_SHARE / len(both))
            weights = np.concatenate([(1 - _JOINED_SHARE) * weights, share])
            own = np.concatenate([own, both])
        x, y = null_spline(own, weights)
        knots.append(x)
        values.append(y)
    return np.stack(knots), np.stack(values)


def joined(statistics: Array, n_tokens: npt.NDArray[np.int64], length: int) -> Array:
    """Statistics of texts joined at random, the same every time, to ``length`` tokens at least."""
    order = np.random.default_rng(0).permutation(len(statistics))
    largest, tokens = [-np.inf], 0
    for t in order:
        largest[-1] = max(largest[-1], statistics[t])
        tokens += n_tokens[t]
        if tokens >= length:
            largest.append(-np.inf)
            tokens = 0
    return np.array(largest[:-1])


def null_spline(statistics: Array, weights: Array) -> tuple[Array, Array]:
    """Knots and −log₁₀ of the share of weight at or above them, both ``(N_KNOTS,)``, rising."""
    order = np.argsort(statistics)
    x, w = statistics[order], weights[order] / weights.sum()
    survival = 1.0 - np.cumsum(w) + w  # share at or above x
    body = [_quantile(x, survival, level) for level in _LEVELS]
    start = _quantile(x, survival, _TAIL_FROM)
    above = x >= start
    excess = float(np.average(x[above] - start, weights=w[above])) if above.any() else 1.0
    spread = max(float(x[-1] - x[0]), 1e-3)
    scale = max(excess, 1e-3 * spread)
    tail = start + scale * np.log(_TAIL_FROM / _TAIL_LEVELS)
    knots = np.concatenate([[x[0] - 1e-3 * spread], body, [start], tail])
    values = np.concatenate(
        [[0.0], -np.log10(_LEVELS), [-np.log10(_TAIL_FROM)], -np.log10(_TAIL_LEVELS)]
    )
    knots = _strictly_rising(knots, 1e-4 * spread)
    return _resample(knots, values)


def pchip_linear_above(knots: Array, values: Array, x: Array) -> Array:
    """The library's null spline: constant below the knots, straight on above them."""
    spline = PchipInterpolator(knots, values)
    slope = float(spline.derivative()(knots[-1]))
    inside = spline(np.clip(x, knots[0], knots[-1]))
    above: Array = inside + slope * (x - knots[-1]).clip(min=0)
    return above


def component_cdf(projections: Array, weights: Array) -> tuple[Array, Array]:
    """Knots and values in (0, 1) of a component's distribution, both ``(N_KNOTS,)``, rising."""
    order = np.argsort(projections)
    x, w = projections[order], weights[order] / weights.sum()
    below = np.cumsum(w) - 0.5 * w
    values = np.concatenate(
        [
            [0.001, 0.003, 0.01, 0.03],
            np.linspace(0.06, 0.94, N_KNOTS - 8),
            [0.97, 0.99, 0.997, 0.999],
        ]
    )
    knots = np.interp(values, below, x)
    knots = _strictly_rising(knots, 1e-5 * max(float(x[-1] - x[0]), 1e-6))
    first, last = PchipInterpolator(knots, values).derivative()(knots[[0, -1]])
    # An end interval much flatter than its neighbour gives an end slope of 0, and so no tail; one
    # barely above 0 would not survive being stored in single precision.
    density = (values[2] - values[1]) / (knots[2] - knots[1])
    if first <= 0.05 * density:
        knots[0] = knots[1] - 1.5 * (values[1] - values[0]) / density
    density = (values[-2] - values[-3]) / (knots[-2] - knots[-3])
    if last <= 0.05 * density:
        knots[-1] = knots[-2] + 1.5 * (values[-1] - values[-2]) / density
    return knots, values


def _quantile(x: Array, survival: Array, level: float) -> float:
    """Smallest value that at most ``level`` of the weight reaches."""
    return float(np.interp(-level, -survival, x))


def _strictly_rising(knots: Array, step: float) -> Array:
    """Knots moved up where needed, so that each exceeds the last by ``step`` at least."""
    rising = knots.copy()
    for i in range(1, len(rising)):
        rising[i] = max(rising[i], rising[i - 1] + step)
    return rising


def _resample(knots: Array, values: Array) -> tuple[Array, Array]:
    """Halves the widest intervals until there are ``N_KNOTS``."""
    x, y = list(knots), list(values)
    while len(x) < N_KNOTS:
        i = int(np.argmax(np.diff(y)))
        x.insert(i + 1, 0.5 * (x[i] + x[i + 1]))
        y.insert(i + 1, 0.5 * (y[i] + y[i + 1]))
    return np.array(x), np.array(y)
