"""Left-out scores: every text judged by directions that have never seen its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .corpus import FOLDS, Row
from .fit import Directions, FitOptions, Moments, Windows, fit_directions

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

__all__ = ["ORIGINS", "Corpus", "cross_fit", "folds_of", "is_authored"]

ORIGINS = ("user", "document")

_AUTHORED_FOLDS = 3


@dataclass(frozen=True)
class Corpus:
    """Rows with the window means of their texts, in the same order."""

    rows: Sequence[Row]
    windows: Windows
    n_tokens: Ints

    @property
    def attack(self) -> Bools:
        """Bool ``(n_texts,)``."""
        return np.array([row.attack for row in self.rows])

    @property
    def sources(self) -> npt.NDArray[np.str_]:
        """Names ``(n_texts,)``."""
        return np.array([row.source for row in self.rows])

    @property
    def groups(self) -> list[tuple[str, str]]:
        """(source, kind) of every text."""
        return [(row.source, row.kind) for row in self.rows]

    def of_origin(self, origin: str) -> Ints:
        """Texts that could have this origin."""
        return np.flatnonzero([row.origin in (origin, None) for row in self.rows])

    def benign_moments(self) -> dict[tuple[str, str], Moments]:
        """Moments of the benign windows of every (source, kind)."""
        texts: dict[tuple[str, str], list[int]] = {}
        for t, row in enumerate(self.rows):
            if not row.attack:
                texts.setdefault((row.source, row.kind), []).append(t)
        x = self.windows.x
        return {g: Moments.of(x[self.windows.rows(np.array(own))]) for g, own in texts.items()}

    def largest(self, directions: Directions, texts: Ints) -> Array:
        """Largest window logit of some texts, ``(len(texts),)``."""
        logits = directions.logits(self.windows.x[self.windows.rows(texts)])
        lengths = self.windows.starts[texts + 1] - self.windows.starts[texts]
        ends = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        result: Array = np.maximum.reduceat(logits, ends)
        return result


def folds_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Sources that are left out together.

    The known public sources keep their folds; others are dealt out to them in order of name, those
    with attacks and those without separately, so that every fold has both. Text that was written
    for this project forms folds of its own: it may always help to judge other people's text.
    """
    present = {row.source for row in rows}
    attacks = {row.source for row in rows if row.attack}
    own = {source for source in present if is_authored(source)}
    known = {source for fold in FOLDS for source in fold}
    folds = [[s for s in fold if s in present] for fold in FOLDS]
    _deal(folds, present - own - known, attacks)
    authored: list[list[str]] = [[] for _ in range(_AUTHORED_FOLDS)]
    _deal(authored, own, attacks)
    return [tuple(fold) for fold in folds + authored if fold]


def is_authored(source: str) -> bool:
    """Whether a source was written for this project."""
    return source.startswith("authored")


def _deal(folds: list[list[str]], sources: set[str], attacks: set[str]) -> None:
    for part in (sorted(sources & attacks), sorted(sources - attacks)):
        for i, source in enumerate(part):
            folds[i % len(folds)].append(source)


def cross_fit(
    corpus: Corpus,
    options: FitOptions,
    *,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Array:
    """Largest logit of every text under directions fitted without its fold.

    Returns
    -------
    ndarray
        ``(n_origins, n_texts)``, in the order of `ORIGINS`. Every text is scored for both origins.
    """
    folds = folds_of(corpus.rows)
    moments = corpus.benign_moments()
    scores = np.full((len(ORIGINS), len(corpus.rows)), np.nan)
    for f, fold in enumerate(folds):
        held = np.isin(corpus.sources, fold)
        for o, origin in enumerate(ORIGINS):
            texts = corpus.of_origin(origin)
            fitted = fit_directions(
                corpus.windows, corpus.attack, corpus.groups, texts[~held[texts]], options, moments
            )
            scores[o, held] = corpus.largest(fitted, np.flatnonzero(held))
        if progress:
            progress("cross-fit", f + 1, len(folds))
    return scores
