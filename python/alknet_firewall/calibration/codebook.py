"""Compiles a codebook: fits, cross-fits, calibrates, and writes the file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save
from scipy.interpolate import PchipInterpolator
from sklearn.linear_model import LogisticRegression

from .. import _core
from ..errors import InputError
from .activations import Layout, Learned
from .corpus import Row, sha256_of
from .crossfit import ORIGINS, Corpus, LeftOut, cross_fit, first_stage, folds_of
from .evaluate import quality
from .fit import FitOptions, fit_scorer
from .null import LENGTH_CLASSES, component_cdf
from .scorer import Scorer, largest_logits, project, project_closing

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Progress = Callable[[str, int, int | None], None]

__all__ = ["compile_codebook", "recalibrate"]

# The directions that are scored, and the behaviours that say what kind of attack it is.
_SCORED = ("attack", "foreign_attack")
_BEHAVIOURS: dict[str, Callable[[Row], bool]] = {
    "instruction_override": lambda row: (
        row.kind == "direct_injection" and "extraction" not in row.family
    ),
    "embedded_instruction": lambda row: row.kind == "indirect_injection",
    "jailbreak": lambda row: row.kind == "jailbreak",
    "extraction": lambda row: "extraction" in row.family,
}

# What names of tensors of the first stage begin with.
_EARLY = "early."

# Fewest attack texts from which a behaviour gets a direction of its own.
_MIN_EXAMPLES = 100


def compile_codebook(
    corpus: Corpus,
    detector: Path,
    out: Path,
    *,
    layout: Layout,
    options: FitOptions,
    progress: Progress | None = None,
) -> None:
    """Write the codebook of a detector folder, fitted on all of a corpus.

    The null comes from left-out scores, and so does the quality that is recorded. The same corpus
    and detector give the same bytes on the same kind of CPU; on another, NumPy's linear algebra may
    round otherwise.

    Raises
    ------
    InputError
        If the corpus lacks attacks or benign text of an origin.
    """
    _check(corpus)
    first, early, tensors = first_stage(corpus, options, layout.sites), None, {}
    if first is not None:
        early, own = _stage(first, options, progress)
        tensors = {_EARLY + name: tensor for name, tensor in own.items()}
        # Let go of before the rest begins: it takes half as much memory as that.
        del first
    whole, own = _stage(corpus, options, progress)
    tensors |= own
    left_out = LeftOut(whole, early, options.early_above)
    if isinstance(layout.closing, Learned):
        tensors["closing"] = layout.closing.vectors[-1]
    behaviours = _behaviours(corpus)
    scored = _SCORED[: len(tensors["direction_bias"]) - len(behaviours)]
    directions = [{"name": name, "scored": True} for name in scored]
    directions += [{"name": name, "scored": False} for name in behaviours]
    counts = Counter((row.source, row.kind) for row in corpus.rows)
    metadata = _core.fingerprint(str(detector)) | {
        "format_version": "4",
        "detector": detector.name,
        "library_version": _core.__version__,
        "sites": ",".join(layout.sites),
        "hidden_size": str(corpus.windows.x.shape[1] // len(layout.sites)),
        "window": str(layout.window),
        "stride": str(layout.stride),
        "scales": json.dumps(options.scales),
        "closing": json.dumps(_closing(layout)),
        "segment_tokens": str(layout.segment_tokens),
        "segment_overlap": str(layout.segment_overlap),
        "length_classes": json.dumps(LENGTH_CLASSES),
        "origins": json.dumps(ORIGINS),
        "directions": json.dumps(directions),
        "calibration": json.dumps(
            {
                "rows": len(corpus.rows),
                "sha256": sha256_of(corpus.rows),
                "sources": {f"{s}/{k}": n for (s, k), n in sorted(counts.items())},
            }
        ),
        "quality": json.dumps(quality(corpus, left_out)),
    }
    if early is not None:
        stage = {"sites": options.early_sites, "above": options.early_above}
        metadata["early"] = json.dumps(stage)
    _write(out, tensors, metadata)


def _stage(
    corpus: Corpus, options: FitOptions, progress: Progress | None
) -> tuple[Array, dict[str, Array]]:
    """Left-out statistics ``(n_texts,)``, and the tensors of a stage that reads all of a corpus."""
    left_out = cross_fit(corpus, options, progress=progress)
    scales, moments = corpus.scales(options), corpus.moments(options)
    every = np.arange(len(corpus.rows))
    fitted = fit_scorer(scales, corpus.labels, every, options, moments)
    tensors = {"mean": fitted.mean, "components": fitted.components}
    z = project(fitted.mean, fitted.components, corpus.windows, corpus.windows.rows(every))
    tensors |= _directions(corpus, fitted, z, _behaviours(corpus).values())
    tensors |= _distributions(corpus, z, np.flatnonzero(~corpus.attack))
    tensors |= _novelty_null(corpus, z)
    tensors |= _nulls(corpus, left_out)
    return left_out, tensors


def _closing(layout: Layout) -> dict[str, int] | None:
    """The entry of the metadata; what was learned is a tensor."""
    match layout.closing:
        case None:
            return None
        case Learned():
            return {"every": layout.closing_every}
        case token:
            return {"token": token, "every": layout.closing_every}


def recalibrate(codebook: Path, corpus: Corpus, out: Path) -> None:
    """Write a codebook whose nulls come from one's own ordinary text; nothing else changes.

    Every row counts as benign and is judged by the codebook's own directions.

    Raises
    ------
    InputError
        If there are fewer than 300 rows: p = 0.001 could not even be guessed.
    """
    if len(corpus.rows) < 300:
        raise InputError(f"{len(corpus.rows)} texts: at least 300 are needed for a null")
    tensors = load_file(codebook)
    metadata = _core.inspect_codebook(str(codebook))
    metadata.pop("n_components", None)
    classes = json.loads(metadata["length_classes"])
    if tuple(classes) != LENGTH_CLASSES:
        raise InputError(
            f"the codebook has length classes {classes}, this library makes {LENGTH_CLASSES}"
        )
    if "early" in metadata:
        n_sites = len(metadata["sites"].split(","))
        first = corpus.at_first(json.loads(metadata["early"])["sites"] / n_sites)
        own = {
            name.removeprefix(_EARLY): x for name, x in tensors.items() if name.startswith(_EARLY)
        }
        tensors |= {_EARLY + name: x for name, x in _own_nulls(first, own, metadata).items()}
    tensors |= _own_nulls(corpus, tensors, metadata)
    metadata["null_calibration"] = json.dumps(
        {"rows": len(corpus.rows), "sha256": sha256_of(corpus.rows)}
    )
    _write(out, tensors, metadata)


def _own_nulls(
    corpus: Corpus, tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> dict[str, Array]:
    """Nulls of a stage from all texts of a corpus, judged by the stage's own directions."""
    every = np.arange(len(corpus.rows))
    z = project(tensors["mean"], tensors["components"], corpus.windows, corpus.windows.rows(every))
    directions, scales = json.loads(metadata["directions"]), json.loads(metadata["scales"])
    statistics = [
        _statistics(corpus, z, tensors, directions, origin, scales)
        for origin in json.loads(metadata["origins"])
    ]
    nulls = [corpus.null(s, every) for s in statistics]
    novelty = corpus.null(_largest(corpus, _depth(z, tensors)), every)
    return {
        "null_knots": np.stack([n[0] for n in nulls]),
        "null_values": np.stack([n[1] for n in nulls]),
        "novelty_knots": novelty[0],
        "novelty_values": novelty[1],
    }


def _check(corpus: Corpus) -> None:
    for origin in ORIGINS:
        texts = corpus.of_origin(origin)
        attacks = int(corpus.attack[texts].sum())
        if attacks < 50 or len(texts) - attacks < 300:
            raise InputError(
                f"{attacks} attacks and {len(texts) - attacks} benign texts of origin {origin}: "
                "at least 50 and 300 are needed"
            )


def _behaviours(corpus: Corpus) -> dict[str, Bools]:
    """Behaviours with enough examples, and which texts are examples, ``(n_texts,)``."""
    examples = {
        name: np.array([row.attack and belongs(row) for row in corpus.rows])
        for name, belongs in _BEHAVIOURS.items()
    }
    return {name: own for name, own in examples.items() if own.sum() >= _MIN_EXAMPLES}


def _directions(
    corpus: Corpus, fitted: Scorer, z: Array, behaviours: Iterable[Bools]
) -> dict[str, Array]:
    """Weights and bias of every direction, the scored ones first.

    A behaviour is told from benign text and from the other attacks, half and half, by the window
    that is most like an attack.
    """
    weights, bias = [fitted.weights], list(fitted.bias)
    most = (z @ fitted.weights[0].T + fitted.bias).max(axis=1)
    rows = _best_windows(corpus, np.arange(len(corpus.rows)), most)
    for own in behaviours:
        others, benign = corpus.attack & ~own, ~corpus.attack
        shares = 0.5 * own / own.sum() + 0.25 * benign / benign.sum()
        shares += 0.25 * others / max(others.sum(), 1)
        model = LogisticRegression(C=len(rows), max_iter=500)
        model.fit(z[rows], own, sample_weight=shares)
        weights.append(np.zeros_like(fitted.weights[:, :1]))
        weights[-1][0] = model.coef_[0]
        bias.append(float(model.intercept_[0]))
    return {"direction_weights": np.concatenate(weights, axis=1), "direction_bias": np.array(bias)}


def _best_windows(corpus: Corpus, texts: npt.NDArray[np.int64], logits: Array) -> npt.NDArray[Any]:
    """The highest scoring window of every text."""
    starts = corpus.windows.starts
    return np.array([starts[t] + int(logits[starts[t] : starts[t + 1]].argmax()) for t in texts])


def _distributions(corpus: Corpus, z: Array, benign: npt.NDArray[np.int64]) -> dict[str, Array]:
    """Distribution of every component over benign windows; texts weigh alike within a source."""
    rows = corpus.windows.rows(benign)
    lengths = np.diff(corpus.windows.starts)[benign]
    _, inverse, counts = np.unique(corpus.sources[benign], return_inverse=True, return_counts=True)
    weights = np.repeat(1.0 / (lengths * np.sqrt(counts[inverse])), lengths)
    splines = [component_cdf(z[rows, k], weights) for k in range(z.shape[1])]
    return {
        "cdf_knots": np.stack([x for x, _ in splines]),
        "cdf_values": np.stack([y for _, y in splines]),
    }


def _nulls(corpus: Corpus, left_out: Array) -> dict[str, Array]:
    knots, values = [], []
    for origin in ORIGINS:
        texts = corpus.of_origin(origin)
        texts = texts[~corpus.attack[texts]]
        x, y = corpus.null(left_out, texts)
        knots.append(x)
        values.append(y)
    return {"null_knots": np.stack(knots), "null_values": np.stack(values)}


def _novelty_null(corpus: Corpus, z: Array) -> dict[str, Array]:
    """Null of the novelty: every benign text against distributions without its fold."""
    depth = np.full(len(corpus.rows), np.nan)
    for held in folds_of(corpus.rows):
        others = _distributions(corpus, z, np.flatnonzero(~held & ~corpus.attack))
        depth[held] = _largest(corpus, _depth(z, others))[held]
    benign = np.flatnonzero(~corpus.attack)
    knots, values = corpus.null(depth, benign)
    return {"novelty_knots": knots, "novelty_values": values}


def _depth(z: Array, tensors: Mapping[str, Array]) -> Array:
    """Mean tail depth of every window, as the library scores novelty, ``(n_windows,)``."""
    depth = np.zeros(len(z))
    for k, (x, y) in enumerate(zip(tensors["cdf_knots"], tensors["cdf_values"], strict=True)):
        spline = PchipInterpolator(x, y)
        slopes = spline.derivative()(x[[0, -1]])
        inside = np.clip(z[:, k], x[0], x[-1])
        # Both tails are exponential, so their depth grows linearly beyond the last knots.
        below = slopes[0] / y[0] * (inside - z[:, k]).clip(min=0)
        above = slopes[1] / (1 - y[-1]) * (z[:, k] - inside).clip(min=0)
        u = spline(inside)
        depth += -np.log(2 * np.minimum(u, 1 - u)) + below + above
    mean: Array = depth / len(tensors["cdf_knots"])
    return mean


def _statistics(
    corpus: Corpus,
    z: Array,
    tensors: Mapping[str, Array],
    directions: Sequence[Mapping[str, Any]],
    origin: str | None,
    scales: Sequence[int],
) -> Array:
    """Largest log-odds over the frames of every text and the scored directions of an origin."""

    def is_read(info: Mapping[str, Any]) -> bool:
        return None in (info.get("origin"), origin) or info["origin"] == origin

    windows = corpus.windows
    lengths = np.diff(windows.starts)
    own = [d for d, info in enumerate(directions) if info["scored"] and is_read(info)]
    weights, bias = tensors["direction_weights"][:, own], tensors["direction_bias"][own]
    every = np.arange(len(windows.x))
    closing = project_closing(tensors["mean"], tensors["components"], windows, every)
    return largest_logits(z, lengths, weights, bias, scales, closing)


def _largest(corpus: Corpus, of_window: Array) -> Array:
    """Largest value over the windows of every text, ``(n_texts,)``."""
    largest: Array = np.maximum.reduceat(of_window, corpus.windows.starts[:-1])
    return largest


def _write(out: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Writes the file under another name first, so that a reader never sees half of it."""
    arrays = {name: np.ascontiguousarray(x, dtype="<f4") for name, x in sorted(tensors.items())}
    partial = out.with_name(out.name + ".part")
    partial.write_bytes(_sorted_header(save(arrays, metadata=dict(metadata))))
    _core.inspect_codebook(str(partial))  # Nothing is left behind that the library would refuse.
    partial.replace(out)


def _sorted_header(data: bytes) -> bytes:
    """The same file, the keys of its header in order: the writer's order changes between runs."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
