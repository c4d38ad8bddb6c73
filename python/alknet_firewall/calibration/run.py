"""The commands ``calibrate`` and ``evaluate``: files in, files out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from .. import _core
from ..authored import calibration_rows
from ..config import FirewallConfig
from ..detector import CODEBOOK, MANIFEST, Progress, cache_home, refresh_manifest
from ..errors import InputError
from ..evaluation.measure import measure_detector
from ..firewall import Firewall
from .activations import Layout, Learned, read_windows
from .codebook import compile_codebook, recalibrate
from .corpus import Row, for_other_languages, read_corpora, row_from
from .crossfit import Corpus
from .evaluate import evaluate
from .fit import FitOptions
from .readouts import learned_readouts
from .windows import Windows

__all__ = [
    "calibrate",
    "calibrate_null",
    "default_layout",
    "evaluate_recipe",
    "load_corpus",
    "read_rows",
]

# Ends the turn that a text is.
CLOSING = "<|im_end|>"


def default_layout(detector: Path) -> Layout:
    """The layout of a codebook for a detector folder's model."""
    if learned := learned_readouts(_core.fingerprint(str(detector))["weights_sha256"]):
        return Layout(closing=learned)
    ids = _core.token_ids(str(detector), CLOSING)
    # A tokenizer without that token makes several of it, or none.
    return Layout(closing=ids[0] if len(ids) == 1 else None)


def read_rows(
    paths: Iterable[Path], *, limit: int | None = None, authored: bool = True
) -> list[Row]:
    """Rows of corpora, and what the package ships; see `load_corpus`."""
    rows = read_corpora(paths)
    if authored:
        known = {row.text for row in rows}
        shipped = (row_from(values, "authored") for values in calibration_rows())
        rows += [row for row in shipped if row is not None and row.text not in known]
    if limit is not None:
        return _sample(rows, limit)
    return rows


def load_corpus(
    detector: Path,
    paths: Iterable[Path],
    layout: Layout,
    *,
    limit: int | None = None,
    authored: bool = True,
    cache: Path | None = None,
    engine: str = "native",
    progress: Progress | None = None,
) -> Corpus:
    """Read corpora and the activations of their texts.

    Parameters
    ----------
    limit : int, optional
        Most rows of one (source, kind), of text for the direction of other languages also of one
        language: the first in the order of their texts' digests, so that a larger limit keeps them.
    authored : bool
        Adds the calibration text that the package ships.
    cache : Path, optional
        Where activations are kept; by default in the user's cache folder.
    """
    rows = read_rows(paths, limit=limit, authored=authored)
    if not rows:
        raise InputError("there is no text to calibrate with")
    reader = _core.Reader(str(detector), list(layout.sites), engine=engine)
    store = read_windows(
        [row.text for row in rows],
        reader,
        layout,
        key=_core.fingerprint(str(detector))["weights_sha256"],
        cache=cache or cache_home() / "activations",
        progress=progress,
    )
    readable = store.n_tokens > 0
    if not readable.all():
        raise InputError("a row of the corpus holds no token")
    if store.closing is None:
        return Corpus(rows, Windows(store.data, store.starts), store.n_tokens)
    windows = Windows(store.data, store.starts, store.closing[:, -1], store.closed_by)
    left_out = store.closing[:, :-1] if store.closing.shape[1] > 1 else None
    return Corpus(rows, windows, store.n_tokens, left_out)


def calibrate(
    detector: Path,
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    layout: Layout | None = None,
    options: FitOptions | None = None,
    progress: Progress | None = None,
    **corpus_options: Any,
) -> Path:
    """Compile a codebook for a detector folder, by default into it; returns where it is."""
    layout, options = layout or default_layout(detector), options or FitOptions()
    corpus = load_corpus(detector, paths, layout, progress=progress, **corpus_options)
    target = out or detector / CODEBOOK
    compile_codebook(corpus, detector, target, layout=layout, options=options, progress=progress)
    if target == detector / CODEBOOK and (detector / MANIFEST).exists():
        refresh_manifest(detector)
    return target


def calibrate_null(
    detector: Path,
    paths: Sequence[Path],
    out: Path,
    *,
    progress: Progress | None = None,
    **corpus_options: Any,
) -> Path:
    """Re-calibrate the null of a detector's codebook on one's own ordinary text."""
    metadata = _core.inspect_codebook(str(detector / CODEBOOK))
    numbers = {
        n: int(metadata[n]) for n in ("window", "stride", "segment_tokens", "segment_overlap")
    }
    layout = replace(Layout(), sites=tuple(metadata["sites"].split(",")), **numbers)
    if closing := json.loads(metadata.get("closing", "null")):
        closer = closing.get("token")
        if closer is None:
            closer = Learned(load_file(detector / CODEBOOK)["closing"][None])
        layout = replace(layout, closing=closer, closing_every=closing["every"])
    corpus = load_corpus(
        detector, paths, layout, authored=False, progress=progress, **corpus_options
    )
    recalibrate(detector / CODEBOOK, corpus, out)
    return out


def evaluate_recipe(
    detector: Path,
    paths: Sequence[Path],
    *,
    layout: Layout | None = None,
    options: FitOptions | None = None,
    compiled: bool = False,
    codebook: Path | None = None,
    progress: Progress | None = None,
    **corpus_options: Any,
) -> dict[str, Any]:
    """Leave-sources-out evaluation of the recipe on a detector folder's model; see `evaluate`.

    Parameters
    ----------
    compiled : bool
        Adds ``compiled``: what the detector itself does with disguised and long text, and how fast;
        see `alknet_firewall.evaluation.measure.measure_detector`.
    codebook : Path, optional
        The codebook that these are measured with; by default the detector's own.
    """
    layout, options = layout or default_layout(detector), options or FitOptions()
    # Loaded first, so that a detector without a usable codebook fails before the work begins.
    firewall = _default_firewall(detector, codebook) if compiled else None
    corpus = load_corpus(detector, paths, layout, progress=progress, **corpus_options)
    name = detector.name
    report = evaluate(corpus, options, detector=name, sites=layout.sites, progress=progress)
    if firewall is not None:
        report["compiled"] = measure_detector(firewall, progress=progress)
    return report


def _default_firewall(detector: Path, codebook: Path | None) -> Firewall:
    """A firewall with the default settings, whatever this user's are."""
    path = None if codebook is None else str(codebook)
    return Firewall(config=FirewallConfig(detector=str(detector), codebook_path=path))


def _sample(rows: list[Row], limit: int) -> list[Row]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.digest):
        lang = row.lang if for_other_languages(row.source) else ""
        own = groups.setdefault((row.source, row.kind, lang), [])
        if len(own) < limit:
            own.append(row)
    kept = {row.digest for own in groups.values() for row in own}
    return [row for row in rows if row.digest in kept]
