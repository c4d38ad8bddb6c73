"""What is known and what was read of the texts: labels, window means, their moments by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Source and kind of texts, and whether they are attacks.
Group = tuple[str, str, bool]

__all__ = ["Group", "Labels", "Moments", "Windows", "group_moments"]


@dataclass(frozen=True, slots=True)
class Labels:
    """What is known of the texts.

    Attributes
    ----------
    attack : ndarray
        Bool ``(n_texts,)``.
    groups : sequence
        Of every text.
    documents : frozenset
        Groups of public documents.
    foreign : ndarray
        Bool ``(n_texts,)``: known to be in another language than English.
    apart : ndarray
        Bool ``(n_texts,)``: take part in the direction of other languages alone.
    """

    attack: Bools
    groups: Sequence[Group]
    documents: frozenset[Group]
    foreign: Bools
    apart: Bools

    def of(self, texts: Ints) -> list[Group]:
        """Groups of some texts."""
        return [self.groups[int(t)] for t in texts]


@dataclass(frozen=True, slots=True)
class Windows:
    """Window means with the text each belongs to.

    Attributes
    ----------
    x : ndarray
        ``(n_windows, width)``, any float type.
    starts : ndarray
        ``(n_texts + 1,)``: text ``i`` owns rows ``starts[i]`` to ``starts[i + 1]``.
    closing : ndarray, optional
        ``(n_closings, width)``: readouts of the texts, text by text.
    closed_by : ndarray, optional
        ``(n_windows,)``: the row of ``closing`` that is the first after each window.
    """

    x: npt.NDArray[Any]
    starts: Ints
    closing: npt.NDArray[Any] | None = None
    closed_by: Ints | None = None

    def rows(self, texts: npt.NDArray[Any]) -> Ints:
        """Window rows of some texts, text by text."""
        spans = [np.arange(self.starts[t], self.starts[t + 1]) for t in texts]
        return np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)

    def blocks(self, rows: Ints, size: int) -> Iterator[npt.NDArray[Any]]:
        """Some rows, so many at a time: a copy of all at once may not fit in memory."""
        return (self.x[rows[start : start + size]] for start in range(0, len(rows), size))

    def closings(self) -> Windows:
        """The readouts of every text as its windows."""
        assert self.closing is not None
        assert self.closed_by is not None
        return Windows(self.closing, np.append(self.closed_by[self.starts[:-1]], len(self.closing)))

    def runs(self, n: int) -> Windows:
        """Means of every ``n`` consecutive windows; a text of fewer is one run."""
        if n == 1:
            return self
        lengths = np.diff(self.starts)
        counts = np.maximum(lengths - n + 1, 1)
        starts = np.concatenate([[0], np.cumsum(counts)])
        x = np.empty((starts[-1], self.x.shape[1]), self.x.dtype)
        for t, (first, last) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            own = self.x[first:last].astype(np.float32)
            run = x[starts[t] : starts[t + 1]]
            size = min(n, len(own))
            run[:] = sum(own[i : i + len(run)] for i in range(size)) / size
        return Windows(x, starts)


@dataclass(frozen=True, slots=True)
class Moments:
    """Number, mean and covariance of the windows of one group."""

    n: int
    mean: Array
    covariance: Array

    @classmethod
    def of(cls, windows: Windows, rows: Ints) -> Moments:
        """Moments of some rows."""
        total = np.zeros(windows.x.shape[1])
        outer = np.zeros((windows.x.shape[1], windows.x.shape[1]))
        centre = windows.x[rows[:256]].astype(np.float32).mean(axis=0)
        for taken in windows.blocks(rows, 16384):
            block = taken.astype(np.float32) - centre
            total += block.sum(axis=0, dtype=np.float64)
            outer += block.T @ block
        offset = total / len(rows)
        covariance = outer / len(rows) - np.outer(offset, offset)
        return cls(len(rows), centre + offset, covariance)


def group_moments(windows: Windows, labels: Labels, texts: Ints) -> dict[Group, Moments]:
    """Moments of the windows of every group among some texts."""
    own: dict[Group, list[int]] = {}
    for t in texts:
        own.setdefault(labels.groups[t], []).append(int(t))
    return {g: Moments.of(windows, windows.rows(np.array(ts))) for g, ts in own.items()}
