"""The scored directions, and what they make of texts: projections, log-odds, the largest frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from .windows import Windows

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

__all__ = ["Directions", "Scorer", "largest_logits", "pool", "project", "project_closing"]


@dataclass(frozen=True, slots=True)
class Directions:
    """A model of windows: ``logit = weights · (components @ (x − mean)) + bias``.

    Attributes
    ----------
    mean : ndarray
        ``(width,)``.
    components : ndarray
        ``(n_components, width)``, whitening folded in; each row's largest entry is positive.
    weights : ndarray
        ``(n_components,)``.
    bias : float
    """

    mean: Array
    components: Array
    weights: Array
    bias: float

    def oriented(self) -> Directions:
        """The same logits, the largest entry of each component positive."""
        largest = np.abs(self.components).argmax(axis=1)
        signs = np.sign(self.components[np.arange(len(self.components)), largest])
        components = self.components * signs[:, None]
        return Directions(self.mean, components, self.weights * signs, self.bias)

    def logits(self, windows: Windows, rows: Ints) -> Array:
        """Log-odds ``(len(rows),)`` of some rows."""
        along = self.weights @ self.components
        return project(self.mean, along[None], windows, rows)[:, 0] + self.bias


@dataclass(frozen=True, slots=True)
class Scorer:
    """The scored directions of frames, with ``z = components @ (x − mean)`` of their windows.

    ``logit[d] = Σ_s max_r mean_{w in r}(weights[s, d] · z_w) + bias[d]``, ``r`` its runs of scale
    ``s``; where there are readouts, with ``weights[-1, d] · z`` of the first after it
    besides.

    Attributes
    ----------
    mean : ndarray
        ``(width,)``.
    components : ndarray
        ``(n_components, width)``, whitening folded in; each row's largest entry is positive.
    weights : ndarray
        ``(n_scales (+ 1), n_directions, n_components)``.
    bias : ndarray
        ``(n_directions,)``.
    scales : tuple of int
        Windows of a run; a frame is a run of the last.
    """

    mean: Array
    components: Array
    weights: Array
    bias: Array
    scales: tuple[int, ...]

    def largest(self, windows: Windows, texts: npt.NDArray[Any]) -> Array:
        """Largest logit of some texts, ``(len(texts),)``."""
        rows = windows.rows(texts)
        z = project(self.mean, self.components, windows, rows)
        lengths = np.diff(windows.starts)[texts]
        closing = project_closing(self.mean, self.components, windows, rows)
        return largest_logits(z, lengths, self.weights, self.bias, self.scales, closing)


def largest_logits(
    z: Array,
    lengths: Ints,
    weights: Array,
    bias: Array,
    scales: Sequence[int],
    closing: Array | None,
) -> Array:
    """Largest log-odds over the frames of every text and some directions, see `Scorer`.

    ``z`` and ``closing`` are those of the windows and of what closes each.
    """
    ends = np.zeros((len(z), len(bias))) if closing is None else closing @ weights[-1].T
    directions = weights[: len(scales)].swapaxes(0, 1)
    pooled = [
        pool(z @ w.T, lengths, scales, end) for w, end in zip(directions, ends.T, strict=True)
    ]
    result: Array = (np.stack(pooled, axis=1) + bias).max(axis=1)
    return result


def project_closing(mean: Array, components: Array, windows: Windows, rows: Ints) -> Array | None:
    """Projections ``(len(rows), n_components)`` of what closes some windows, if anything does."""
    if windows.closed_by is None:
        return None
    own, places = np.unique(windows.closed_by[rows], return_inverse=True)
    return project(mean, components, windows.closings(), own)[places]


def project(mean: Array, components: Array, windows: Windows, rows: Ints) -> Array:
    """Projections ``(len(rows), n_components)`` of some rows."""
    along, centre = components.T.astype(np.float32), mean.astype(np.float32)
    blocks = [
        ((block.astype(np.float32) - centre) @ along).astype(np.float64)
        for block in windows.blocks(rows, 65536)
    ]
    return np.concatenate(blocks) if blocks else np.empty((0, len(components)))


def pool(terms: Array, lengths: Ints, scales: Sequence[int], ends: Array) -> Array:
    """Largest frame of every text: the sum, over scales, of the largest mean of a run in it.

    What its last window has in ``ends`` is added to a frame.

    Parameters
    ----------
    terms : ndarray
        ``(n_windows, n_scales)``, text by text.
    lengths : ndarray
        Windows of every text, ``(n_texts,)``.
    scales : sequence of int
        Windows of a run, rising; a frame is a run of the last. A text of fewer is one run.
    ends : ndarray
        ``(n_windows,)``.
    """
    largest = np.empty(len(lengths))
    end = 0
    for t, length in enumerate(lengths):
        start, end = end, end + length
        frame = min(scales[-1], length)
        total = ends[start + frame - 1 : end].copy()
        for scale, own in zip(scales, terms[start:end].T, strict=True):
            run = min(scale, frame)
            means = sliding_window_view(own, run).mean(axis=1)
            total += sliding_window_view(means, frame - run + 1).max(axis=1)
        largest[t] = total.max()
    return largest
