"""Components and the scored direction: what separates the windows of attacks from benign ones.

A model is fitted in the same way at each of a few scales: on windows, and on the means of runs of a
few consecutive ones. Judged are frames, runs of the longest scale: the log-odds of a frame are the
weighted sum of those of its largest run of every scale. An order of few words shows in a window, a
longer one in a longer run.

Each is made so: (1) μ and a scale per dimension from benign windows, sources weighing alike;
(2) positives: every window of the attack texts at first, then in every attack text its best windows
under the current model (multiple-instance learning: only part of an injected document is an
injection); (3) covariance within sources, of benign and of positive windows, averaged over (source,
kind) and shrunk to its mean variance, whitens; (4) one row per (source, kind), the mean whitened
positive window; the right singular vectors of these rows, each scaled by its singular value; (5) a
ridge logistic regression on the projections, classes balanced, sources weighing 1/√n, so that a
vector on which few groups agree takes part little; (6) again from (2).

A token that is read after every so many tokens of a text, and at its end, gathers what has been
said up to there. A model made in the same way reads it; the log-odds of the first one after a frame
are added to those of the frame.

Groups of public documents weigh more in (1) and (3): they are few, no two are alike, and what reads
like an order to a model must stand out from them.

The model reads other languages than English poorly, and what separates their texts is not what
separates English ones. Attacks in them therefore have a direction of their own, told from ordinary
text in all languages: a ridge on all whitened dimensions, since there is little that its groups
could agree on. A frame counts by the larger of the two.

The components are the first singular vectors of the windows, then what their model has outside
them, the models of each longer scale and of readouts, and last those of the other languages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular
from sklearn.linear_model import LogisticRegression

from .scorer import Directions, Scorer, project
from .windows import Group, Labels, Moments, Windows, group_moments

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Windows chosen from texts: the text, and the rows of its windows.
_Chosen = list[tuple[int, Ints]]

__all__ = ["FitOptions", "fit_scorer"]


@dataclass(frozen=True, slots=True)
class FitOptions:
    """Choices of the recipe; the defaults are those of the shipped codebook."""

    # Consecutive windows, rising from 1, of whose means a model is fitted; how much each counts.
    scales: tuple[int, ...] = (1, 3, 7)
    scale_weights: tuple[float, ...] = (0.5, 0.25, 0.25)
    # How much the model of readouts counts, where there are some.
    closing_weight: float = 0.6
    # Rows of the projection, one a model at least; the scored directions are exact with any number.
    n_components: int = 16
    shrinkage: float = 0.3
    rounds: int = 3
    # Of the regression: half of this times the squared weights is added to the mean loss.
    ridge: float = 1e-3
    # How much a group of public documents counts, beside another, in mean and covariance.
    document_weight: float = 2.0
    # The most alarming windows of an attack that count as attacks, after the first round.
    attack_windows: int = 2
    # Windows of one benign text that enter the regression, evenly spread over it.
    windows_per_text: int = 24
    # The most alarming windows of every benign text that enter it besides, after the first round.
    hard_windows: int = 12
    # Attacks in other languages: the same of their models, with a ridge on all whitened dimensions.
    foreign_scales: tuple[int, ...] = (1, 3)
    foreign_scale_weights: tuple[float, ...] = (0.5, 0.5)
    foreign_ridge: float = 0.2
    # Their log-odds, which the ridge keeps small, times the one and with the other added: so that
    # ordinary text in other languages reaches a threshold about as rarely as English text does.
    foreign_slope: float = 4.0
    foreign_shift: float = -4.9
    # Fewest attacks in other languages from which they get a direction.
    foreign_attacks: int = 200
    # Sites of the first stage, fewer than all; none, and there is no such stage.
    early_sites: int = 1
    # p-value above which it ends the reading of a text.
    early_above: float = 0.5


def fit_scorer(
    scales: Sequence[Windows],
    labels: Labels,
    texts: Ints,
    options: FitOptions,
    moments: Sequence[Mapping[Group, Moments]],
) -> Scorer:
    """Fit a model at every scale on some texts and put them together.

    Parameters
    ----------
    scales : sequence of Windows
        `Windows.runs` of every scale, and `Windows.closings` where there are readouts.
    moments : sequence of dict
        Of each scale, `group_moments` of every group among ``texts``.
    """
    abroad = labels.attack & labels.foreign
    foreign = []
    # All or no fold has the direction, unless it leaves out the text that makes it.
    if (
        abroad.sum() >= options.foreign_attacks
        and abroad[texts].any()
        and (labels.foreign & ~labels.attack)[texts].any()
    ):
        for n, share in zip(options.foreign_scales, options.foreign_scale_weights, strict=True):
            s = options.scales.index(n)
            model = _fit_foreign(scales[s], labels, texts, options)
            foreign.append(_Part(slice(1, 2), s, options.foreign_slope * share, model))
    texts = texts[~labels.apart[texts]]
    leading = max(options.n_components - len(scales) - len(foreign) + 1, 1)
    sizes = [leading, *[1] * (len(scales) - 1)]
    # Readouts count for attacks in any language.
    places = [(slice(1), share) for share in options.scale_weights]
    places.append((slice(None), options.closing_weight))
    main = []
    for s, ((directions, share), n, own) in enumerate(zip(places, sizes, moments, strict=False)):
        model = _fit(scales[s], labels, texts, replace(options, n_components=n), own)
        main.append(_Part(directions, s, share, model))
    return _together([*main, *foreign], len(scales), options)


class _Part(NamedTuple):
    """What a model adds to one direction or to all."""

    directions: slice
    scale: int
    share: float
    model: Directions


def _together(parts: Sequence[_Part], n_scales: int, options: FitOptions) -> Scorer:
    """One scorer of the models of every direction."""
    mean = parts[0].model.mean
    components = np.concatenate([part.model.components for part in parts])
    bias = np.zeros(max(part.directions.stop or 1 for part in parts))
    bias[1:] = options.foreign_shift
    weights = np.zeros((n_scales, len(bias), len(components)))
    end = 0
    for directions, s, share, model in parts:
        start, end = end, end + len(model.components)
        weights[s, directions, start:end] = share * model.weights
        # Every model is about a mean of its own.
        bias[directions] += share * (
            model.bias + model.weights @ model.components @ (mean - model.mean)
        )
    return Scorer(mean, components, weights, bias, options.scales)


def _fit(
    windows: Windows,
    labels: Labels,
    texts: Ints,
    options: FitOptions,
    moments: Mapping[Group, Moments],
) -> Directions:
    """Fit one model on some texts."""
    attack = labels.attack[texts]
    benign, attacks = texts[~attack], texts[attack]
    mean, covariance = _benign_average(moments, set(labels.of(benign)), labels, options)
    attack_moments = {group: moments[group] for group in labels.of(attacks)}
    positives = _spread(windows, attacks, len(windows.x))
    spread = _spread(windows, benign, options.windows_per_text)
    hard: _Chosen = []
    fitted: Directions | None = None
    for _ in range(options.rounds):
        if fitted is not None:
            positives = _best(windows, attacks, fitted, options.attack_windows)
            attack_moments = _chosen_moments(windows, positives, labels)
            hard = _best(windows, benign, fitted, options.hard_windows)
        whiten = _whitener(attack_moments.values(), covariance, options)
        vectors, values = _singular_vectors(attack_moments, mean, whiten)
        features = vectors * values[:, None] @ whiten
        chosen = [*positives, *spread, *hard]
        rows = np.concatenate([rows for _, rows in chosen])
        dangerous = np.arange(len(rows)) < sum(len(rows) for _, rows in positives)
        weights = _weights([labels.groups[t] for t, rows in chosen for _ in rows])
        weights *= np.where(
            dangerous, 0.5 / weights[dangerous].sum(), 0.5 / weights[~dangerous].sum()
        )
        model = LogisticRegression(C=1 / options.ridge, tol=1e-5, max_iter=1000)
        model.fit(project(mean, features, windows, rows), dangerous, sample_weight=weights)
        components, along = _fold(vectors, model.coef_[0] * values, options.n_components)
        bias = float(model.intercept_[0])
        fitted = Directions(mean, components @ whiten, along, bias).oriented()
    assert fitted is not None
    return fitted


def _fit_foreign(windows: Windows, labels: Labels, texts: Ints, options: FitOptions) -> Directions:
    """Fit a model of attacks in other languages: one direction.

    They count for half, ordinary text in other languages and in English for a quarter each.
    """
    attack, foreign = labels.attack[texts], labels.foreign[texts]
    attacks, native = texts[attack & foreign], texts[~attack & foreign]
    other = texts[~attack & ~foreign]
    moments = group_moments(windows, labels, native)
    mean, covariance = _benign_average(moments, moments, labels, options)
    positives = _spread(windows, attacks, options.windows_per_text)
    ordinary = [_spread(windows, native, 8), _spread(windows, other, 3)]
    hard: list[_Chosen] = [[], []]
    fitted: Directions | None = None
    for _ in range(options.rounds):
        if fitted is not None:
            positives = _best(windows, attacks, fitted, options.attack_windows)
            hard = [_best(windows, native, fitted, 6), _best(windows, other, fitted, 3)]
        chosen = [positives, *(a + b for a, b in zip(ordinary, hard, strict=True))]
        attack_moments = _chosen_moments(windows, positives, labels).values()
        whiten = _whitener(attack_moments, covariance, options)
        rows = np.concatenate([rows for part in chosen for _, rows in part])
        parts = [_weights([labels.groups[t] for t, rows in part for _ in rows]) for part in chosen]
        weights = [s * w / w.sum() for s, w in zip((0.5, 0.25, 0.25), parts, strict=True)]
        model = LogisticRegression(C=1 / options.foreign_ridge, tol=1e-4, max_iter=1000)
        model.fit(
            project(mean, whiten, windows, rows),
            np.arange(len(rows)) < len(parts[0]),
            sample_weight=np.concatenate(weights),
        )
        components, along = _fold(whiten, model.coef_[0], 1)
        fitted = Directions(mean, components, along, float(model.intercept_[0])).oriented()
    assert fitted is not None
    return fitted


def _benign_average(
    moments: Mapping[Group, Moments], groups: Iterable[Group], labels: Labels, options: FitOptions
) -> tuple[Array, Array]:
    """Mean and covariance of benign windows: the average of some groups'."""
    own = sorted(groups)
    weights = [options.document_weight if g in labels.documents else 1.0 for g in own]
    mean = np.average([moments[g].mean for g in own], axis=0, weights=weights)
    shares = np.array(weights) / sum(weights)
    # One after the other: a matrix of each at once would take gigabytes.
    covariance = sum(share * moments[g].covariance for share, g in zip(shares, own, strict=True))
    return mean, covariance


def _spread(windows: Windows, texts: Ints, most: int) -> _Chosen:
    """At most ``most`` windows of every text, evenly spread."""
    chosen = []
    for t in texts:
        first, last = windows.starts[t], windows.starts[t + 1]
        n = min(most, last - first)
        chosen.append((int(t), np.unique(np.linspace(first, last - 1, n).astype(np.int64))))
    return chosen


def _best(windows: Windows, texts: Ints, model: Directions, n: int) -> _Chosen:
    """The ``n`` windows of every text that score highest."""
    logits = model.logits(windows, windows.rows(texts))
    chosen, end = [], 0
    for t in texts:
        start, end = end, end + windows.starts[t + 1] - windows.starts[t]
        highest = np.argsort(-logits[start:end], kind="stable")[:n]
        chosen.append((int(t), windows.starts[t] + highest))
    return chosen


def _weights(owners: Sequence[Group]) -> Array:
    """Weight of every window, so that a group of n windows weighs √n in all."""
    of_group = {group: 1.0 / np.sqrt(n) for group, n in Counter(owners).items()}
    return np.array([of_group[owner] for owner in owners])


def _chosen_moments(windows: Windows, chosen: _Chosen, labels: Labels) -> dict[Group, Moments]:
    """Moments of the chosen windows of every group."""
    rows: dict[Group, list[Ints]] = {}
    for t, own in chosen:
        rows.setdefault(labels.groups[t], []).append(own)
    return {group: Moments.of(windows, np.concatenate(own)) for group, own in rows.items()}


def _whitener(attacks: Iterable[Moments], benign: Array, options: FitOptions) -> Array:
    """Matrix W ``(width, width)`` that whitens: ``W @ x`` is uncorrelated within groups.

    Made of the covariance of ``benign`` windows and of the groups of attacks.
    """
    scale = np.sqrt(np.diag(benign)) + 1e-6
    enough = [m.covariance for m in attacks if m.n >= 8]
    covariance = 0.5 * (benign + np.mean(enough, axis=0)) if enough else benign
    covariance = covariance / np.outer(scale, scale)
    mean_variance = np.trace(covariance) / len(covariance)
    shrunk = (1 - options.shrinkage) * covariance
    shrunk[np.diag_indices_from(shrunk)] += options.shrinkage * mean_variance
    factor = np.linalg.cholesky(shrunk)
    inverse: Array = solve_triangular(factor, np.diag(1 / scale), lower=True)
    return inverse


def _singular_vectors(
    attacks: Mapping[Group, Moments], mean: Array, whiten: Array
) -> tuple[Array, Array]:
    """Right singular vectors of the groups' mean whitened windows, and their values.

    The largest value is scaled to 1.
    """
    means = [attacks[group].mean - mean for group in sorted(attacks)]
    _, values, vectors = np.linalg.svd(np.stack(means) @ whiten.T, full_matrices=False)
    return vectors, values / values[0]


def _fold(vectors: Array, along: Array, n: int) -> tuple[Array, Array]:
    """At most ``n`` orthonormal vectors and weights of the same sum as ``along @ vectors``.

    All but the last are the leading ones; the last is what the sum has outside them.
    """
    leading = min(n, len(vectors)) - 1
    rest = along[leading:] @ vectors[leading:]
    length = float(np.linalg.norm(rest)) or 1.0
    folded = np.concatenate([vectors[:leading], rest[None] / length])
    return folded, np.append(along[:leading], length)
