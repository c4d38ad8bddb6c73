"""Left-out scores: every text judged by directions that have never seen it or its source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .corpus import FOLDS, Row, for_other_languages, is_authored
from .fit import FitOptions, fit_scorer
from .null import null_splines
from .windows import Group, Labels, Moments, Windows, group_moments

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

__all__ = [
    "ORIGINS",
    "Corpus",
    "LeftOut",
    "cross_fit",
    "cross_fit_stages",
    "first_stage",
    "folds_of",
    "numbered_folds",
]

# Origins that get a null of their own; None is that of texts whose origin is unknown.
ORIGINS: tuple[str | None, ...] = ("user", "document", None)

_AUTHORED_FOLDS = 3

# In place of a number of windows.
_CLOSING = 0


@dataclass(frozen=True)
class Corpus:
    """Rows with the window means of their texts, in the same order."""

    rows: Sequence[Row]
    windows: Windows
    n_tokens: Ints
    # ``(n_places, n_folds, width)``: what closes the texts, by readouts that have not seen a fold;
    # none where what closes them was not learned.
    left_out_closing: npt.NDArray[Any] | None = None

    @cached_property
    def attack(self) -> Bools:
        """Bool ``(n_texts,)``."""
        return np.array([row.attack for row in self.rows])

    @cached_property
    def sources(self) -> npt.NDArray[np.str_]:
        """Names ``(n_texts,)``."""
        return np.array([row.source for row in self.rows])

    @cached_property
    def labels(self) -> Labels:
        """What the fit knows of the texts."""
        groups = [(row.source, row.kind, row.attack) for row in self.rows]
        documents = frozenset(
            group
            for group, row in zip(groups, self.rows, strict=True)
            if not row.attack and row.origin == "document" and not is_authored(row.source)
        )
        foreign = np.array([row.lang not in ("", "en") for row in self.rows])
        apart = np.array([for_other_languages(row.source) for row in self.rows])
        return Labels(self.attack, groups, documents, foreign, apart)

    def scales(self, options: FitOptions) -> list[Windows]:
        """What the models read: runs at every scale, and what closes the texts; made once."""
        return [self._scale(n)[0] for n in self._readings(options)]

    def moments(self, options: FitOptions) -> list[dict[Group, Moments]]:
        """Moments of every group in each of `scales`; made once."""
        return [self._scale(n)[1] for n in self._readings(options)]

    def at_first(self, share: float) -> Corpus:
        """The same, read at the first sites alone: so large a part of the columns."""
        width = round(self.windows.x.shape[1] * share)

        def first(rows: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
            return None if rows is None else np.ascontiguousarray(rows[..., :width])

        windows = replace(
            self.windows,
            x=np.ascontiguousarray(self.windows.x[:, :width]),
            closing=first(self.windows.closing),
        )
        return replace(self, windows=windows, left_out_closing=first(self.left_out_closing))

    def without(self, fold: int) -> Corpus:
        """The same, read by nothing that was learned from a fold."""
        if self.left_out_closing is None:
            return self
        windows = replace(self.windows, closing=self.left_out_closing[:, fold])
        corpus = replace(self, windows=windows, left_out_closing=None)
        corpus._made.update({n: made for n, made in self._made.items() if n != _CLOSING})
        return corpus

    def _readings(self, options: FitOptions) -> list[int]:
        return [*options.scales, *([] if self.windows.closing is None else [_CLOSING])]

    def _scale(self, n: int) -> tuple[Windows, dict[Group, Moments]]:
        if n not in self._made:
            runs = self.windows.closings() if n == _CLOSING else self.windows.runs(n)
            every = np.arange(len(self.rows))
            self._made[n] = runs, group_moments(runs, self.labels, every)
        return self._made[n]

    @cached_property
    def _made(self) -> dict[int, tuple[Windows, dict[Group, Moments]]]:
        return {}

    def null(self, statistics: Array, texts: Ints) -> tuple[Array, Array]:
        """`null_splines` of some benign texts, from the statistics of all, ``(n_texts,)``."""
        rows = [self.rows[int(t)] for t in texts]
        return null_splines(statistics[texts], self.n_tokens[texts], rows)

    def of_origin(self, origin: str | None) -> Ints:
        """Texts that could have this origin; all if it is None."""
        return np.flatnonzero([origin is None or row.origin in (origin, None) for row in self.rows])


def folds_of(rows: Sequence[Row]) -> list[Bools]:
    """Rows that are left out together, as masks ``(n_texts,)`` that cover every row once."""
    return list(numbered_folds(rows).values())


def numbered_folds(rows: Sequence[Row]) -> dict[int, Bools]:
    """Rows that are left out together, as masks ``(n_texts,)`` that cover every row once, by fold.

    Sources are left out whole. The known public ones keep their folds; others are dealt out to them
    in order of name, those with attacks and those without separately, so that every fold has both.
    Text that was written for this project stands for kinds of text rather than for a source, and
    each kind is there once: a third of its rows is left out at a time, pairs together.
    """
    sources = {row.source for row in rows if not is_authored(row.source)}
    attacks = {row.source for row in rows if row.attack}
    unknown = sources - {source for fold in FOLDS for source in fold}
    folds = [[s for s in fold if s in sources] for fold in FOLDS]
    for part in (sorted(unknown & attacks), sorted(unknown - attacks)):
        for i, source in enumerate(part):
            folds[i % len(folds)].append(source)
    names = np.array([row.source for row in rows])
    masks = [np.isin(names, fold) for fold in folds]
    third = np.array([_third(row) if is_authored(row.source) else -1 for row in rows])
    masks += [third == part for part in range(_AUTHORED_FOLDS)]
    return {fold: mask for fold, mask in enumerate(masks) if mask.any()}


def _third(row: Row) -> int:
    key = f"{row.source}\0{row.pair}" if row.pair else row.text
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[0] % _AUTHORED_FOLDS


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Left-out statistics of every text.

    Attributes
    ----------
    whole : ndarray
        ``(n_texts,)``: largest logit, of all sites.
    early : ndarray, optional
        ``(n_texts,)``: of the first stage, if there is one.
    above : float
        p-value above which that ends the reading.
    """

    whole: Array
    early: Array | None = None
    above: float = 1.0


def cross_fit_stages(
    corpus: Corpus,
    options: FitOptions,
    sites: Sequence[str],
    *,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> LeftOut:
    """`cross_fit` of both stages of a codebook that reads these sites."""
    first, early = first_stage(corpus, options, sites), None
    if first is not None:
        early = cross_fit(first, options, progress=progress)
        # Let go of before the rest begins: it takes half as much memory as that.
        del first
    return LeftOut(cross_fit(corpus, options, progress=progress), early, options.early_above)


def first_stage(corpus: Corpus, options: FitOptions, sites: Sequence[str]) -> Corpus | None:
    """What the first stage of a codebook reads; None where it gets none.

    The sites of a first stage come before the others.
    """
    layers, n = [int(site.split(".")[0]) for site in sites], options.early_sites
    if not 0 < n < len(layers) or max(layers[:n]) >= min(layers[n:]):
        return None
    return corpus.at_first(n / len(layers))


def cross_fit(
    corpus: Corpus,
    options: FitOptions,
    *,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Array:
    """Largest logit of every text under directions fitted without its fold, ``(n_texts,)``."""
    folds = numbered_folds(corpus.rows)
    # Made before the folds part, so that all of them share what windows say.
    corpus.moments(options)
    scores = np.full(len(corpus.rows), np.nan)
    for done, (fold, held) in enumerate(folds.items()):
        unseen = corpus.without(fold)
        scales, moments = unseen.scales(options), unseen.moments(options)
        # The rows of authored groups that are left out must not show in the groups' moments either.
        split = set(corpus.sources[held]) & set(corpus.sources[~held])
        rest = np.flatnonzero(~held & np.isin(corpus.sources, sorted(split)))
        own = [
            whole | group_moments(scale, corpus.labels, rest)
            for scale, whole in zip(scales, moments, strict=True)
        ]
        scorer = fit_scorer(scales, corpus.labels, np.flatnonzero(~held), options, own)
        scores[held] = scorer.largest(unseen.windows, np.flatnonzero(held))
        if progress:
            progress("cross-fit", done + 1, len(folds))
    return scores
