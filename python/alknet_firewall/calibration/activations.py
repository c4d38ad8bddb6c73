"""Window means of activations, cached on disk: an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import InputError
from ..locking import locked

__all__ = ["Layout", "Learned", "WindowStore", "read_windows"]

Progress = Callable[[str, int, int | None], None]

# Texts handed to the engine at once: enough to fill its passes, few enough to lose little.
_BATCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """Readouts that were learned, see `alknet_firewall.calibration.readouts`.

    Attributes
    ----------
    vectors : ndarray
        Float32 ``(n_readouts, n_blocks, hidden_size)``: one for each fold, which has not seen it,
        and last the one that has seen all; or that one alone.
    """

    vectors: npt.NDArray[np.float32]

    @property
    def sha256(self) -> str:
        """Digest of the vectors."""
        return hashlib.sha256(self.vectors.astype("<f4").tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Layout:
    """What is read, in tokens: windows, and the segments of long texts."""

    sites: tuple[str, ...] = ("6.resid_post", "14.resid_post")
    window: int = 8
    stride: int = 4
    segment_tokens: int = 1024
    segment_overlap: int = 256
    # A token, or what was learned, that is read after every so many tokens of a piece and at its
    # end: it gathers what has been said up to there.
    closing: int | Learned | None = None
    closing_every: int = 64

    @property
    def closers(self) -> list[Any]:
        """What is read at each place, as `_core.Reader.window_means` takes it."""
        match self.closing:
            case None:
                return []
            case Learned(vectors):
                return list(vectors)
            case token:
                return [token]

    def settings(self) -> dict[str, Any]:
        """What tells it from other layouts, as JSON has it."""
        closing = self.closing.sha256 if isinstance(self.closing, Learned) else self.closing
        return asdict(replace(self, closing=None)) | {"closing": closing}

    def n_closings(self, n_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """At how many places of pieces of so many tokens something closes them."""
        if self.closing is None:
            return np.zeros_like(n_tokens)
        return -(-n_tokens // self.closing_every)

    def closed_by(
        self, starts: npt.NDArray[np.int64], n_tokens: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Which place, counted over all texts, is the first after each window.

        Parameters
        ----------
        starts : ndarray
            ``(n_texts + 1,)``: text ``i`` owns windows ``starts[i]`` to ``starts[i + 1]``.
        n_tokens : ndarray
            ``(n_texts,)``.
        """
        lengths = np.diff(starts)
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        ends = np.minimum(within * self.stride + self.window, np.repeat(n_tokens, lengths))
        first = np.concatenate([[0], np.cumsum(self.n_closings(n_tokens))[:-1]])
        closed: npt.NDArray[np.int64] = np.repeat(first, lengths) + self.n_closings(ends) - 1
        return closed


@dataclass(frozen=True, slots=True)
class WindowStore:
    """Window means of many texts.

    Attributes
    ----------
    data : ndarray
        Float16 ``(n_windows, n_sites * hidden_size)``, mapped from disk.
    starts : ndarray
        Int64 ``(n_texts + 1,)``: text ``i`` owns rows ``starts[i]`` to ``starts[i + 1]``.
    n_tokens : ndarray
        Int64 ``(n_texts,)``.
    closing : ndarray, optional
        Float16 ``(n_places, n_readouts, n_sites * hidden_size)``: what closes the texts, text by
        text.
    closed_by : ndarray, optional
        Int64 ``(n_windows,)``: the row of ``closing`` that is the first after each window.
    """

    data: npt.NDArray[np.float16]
    starts: npt.NDArray[np.int64]
    n_tokens: npt.NDArray[np.int64]
    closing: npt.NDArray[np.float16] | None = None
    closed_by: npt.NDArray[np.int64] | None = None


def read_windows(
    texts: Sequence[str],
    reader: _core.Reader,
    layout: Layout,
    *,
    key: str,
    cache: Path,
    progress: Progress | None = None,
) -> WindowStore:
    """Window means of the first segment of every text, from the cache where it has them.

    Every token counts alike: its activations are brought to a root mean square of 1 per site.

    The cache is a growing file per (detector, arithmetic, layout); texts already in it, from any
    corpus, are not read again. One process at a time reads into it; others wait.

    Parameters
    ----------
    key : str
        Whatever else the numbers depend on: the detector's fingerprint.
    cache : Path
        Folder; made if missing.

    Raises
    ------
    InputError
        If the cache folder holds something else under the same name.
    """
    # The name of the engine without its instruction set and threads: they round alike.
    arithmetic = reader.engine.split()[0]
    settings = json.dumps([key, arithmetic, "unit rms", layout.settings()], sort_keys=True)
    name = hashlib.sha256(settings.encode()).hexdigest()[:16]
    folder = cache / name
    # Rows of two processes at once would lie over each other, and texts get those of others.
    with locked(folder, progress):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(settings)
        return _read_into(_Index(folder), texts, reader, layout, progress)


def _read_into(
    index: _Index,
    texts: Sequence[str],
    reader: _core.Reader,
    layout: Layout,
    progress: Progress | None,
) -> WindowStore:
    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
    seen = set(index.entries)
    missing = []
    for digest, text in zip(digests, texts, strict=True):
        if digest not in seen:
            seen.add(digest)
            missing.append((digest, text))
    # Texts of like length share passes.
    missing.sort(key=lambda item: len(item[1]))
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        means = reader.window_means(
            [text for _, text in batch],
            window=layout.window,
            stride=layout.stride,
            max_tokens=layout.segment_tokens,
            closing=(layout.closers, layout.closing_every) if layout.closers else None,
        )
        tokens = [min(reader.count_tokens(text), layout.segment_tokens) for _, text in batch]
        index.append([digest for digest, _ in batch], means, tokens)
        if progress:
            progress("activations", min(start + _BATCH, len(missing)), len(missing))
    return index.store(digests, layout)


class _Index:
    """A file of rows and a journal of which text owns which; the journal is written last."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "windows.f16"
        self._journal = folder / "index.jsonl"
        self.entries: dict[str, tuple[int, int, int]] = {}
        self._width = 0
        self._rows = 0
        if self._journal.exists():
            self._read_journal()

    def _read_journal(self) -> None:
        good = 0
        for line in self._journal.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                digest, start, end, tokens, width = json.loads(line)
            except ValueError:
                break
            self.entries[digest] = (start, end, tokens)
            self._rows, self._width = max(self._rows, end), width
            good += len(line)
        # A line cut off by a stop: its rows are overwritten, and the next line begins in its place.
        if good < self._journal.stat().st_size:
            os.truncate(self._journal, good)
        have = self._data.stat().st_size if self._data.exists() else 0
        if have < self._rows * self._width * 2:
            raise InputError(f"{self._data} is shorter than its index: delete {self._data.parent}")

    def append(
        self, digests: list[str], means: list[npt.NDArray[np.float32]], tokens: list[int]
    ) -> None:
        self._width = means[0].shape[1]
        lines = []
        with self._data.open("r+b" if self._data.exists() else "w+b") as data:
            data.seek(self._rows * self._width * 2)
            for digest, rows, n_tokens in zip(digests, means, tokens, strict=True):
                # Half precision keeps three digits.
                data.write(rows.astype("<f2").tobytes())
                end = self._rows + len(rows)
                self.entries[digest] = (self._rows, end, n_tokens)
                lines.append(json.dumps([digest, self._rows, end, n_tokens, self._width]) + "\n")
                self._rows = end
        with self._journal.open("a") as journal:
            journal.writelines(lines)

    def store(self, digests: list[str], layout: Layout) -> WindowStore:
        """The rows of some texts; the last ones of each are those of what closes it, if any."""
        shape = (self._rows, self._width)
        data = np.memmap(self._data, dtype="<f2", mode="r", shape=shape)
        entries = [self.entries[digest] for digest in digests]
        first, end, n_tokens = np.array(entries, dtype=np.int64).reshape(-1, 3).T
        n_readouts = len(layout.closers)
        middle = end - layout.n_closings(n_tokens) * n_readouts
        starts = np.concatenate([[0], np.cumsum(middle - first)])
        windows = data[_ranges(first, middle)]
        if layout.closing is None:
            return WindowStore(windows, starts, n_tokens)
        closed_by = layout.closed_by(starts, n_tokens)
        closing = data[_ranges(middle, end)].reshape(-1, n_readouts, self._width)
        return WindowStore(windows, starts, n_tokens, closing, closed_by)


def _ranges(first: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers from each of some to each of others, one range after the other."""
    ranges = [np.arange(a, b) for a, b in zip(first, end, strict=True)]
    return np.concatenate([np.empty(0, dtype=np.int64), *ranges])
