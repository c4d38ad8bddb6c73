"""Window means of activations, cached on disk: an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import InputError
from ..locking import locked

__all__ = ["Layout", "WindowStore", "read_windows"]

Progress = Callable[[str, int, int | None], None]

# Texts handed to the engine at once: enough to fill its passes, few enough to lose little.
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """What is read, in tokens: windows, and the segments of long texts."""

    sites: tuple[str, ...] = ("6.resid_post", "14.resid_post")
    window: int = 8
    stride: int = 4
    segment_tokens: int = 1024
    segment_overlap: int = 256
    # Tokens that are read after every piece; they gather what it says.
    closing: tuple[int, ...] = ()


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
        Float16 ``(n_texts, n_sites * hidden_size)``: means of the closing tokens after every text.
    """

    data: npt.NDArray[np.float16]
    starts: npt.NDArray[np.int64]
    n_tokens: npt.NDArray[np.int64]
    closing: npt.NDArray[np.float16] | None


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
    settings = json.dumps([key, arithmetic, "unit rms", asdict(layout)], sort_keys=True)
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
            closing=list(layout.closing),
        )
        tokens = [min(reader.count_tokens(text), layout.segment_tokens) for _, text in batch]
        index.append([digest for digest, _ in batch], means, tokens)
        if progress:
            progress("activations", min(start + _BATCH, len(missing)), len(missing))
    return index.store(digests, closed=bool(layout.closing))


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

    def store(self, digests: list[str], *, closed: bool) -> WindowStore:
        """The rows of some texts; the last one of each is that of the closing tokens, if any."""
        shape = (self._rows, self._width)
        data = np.memmap(self._data, dtype="<f2", mode="r", shape=shape)
        spans = np.array([self.entries[digest][:2] for digest in digests], dtype=np.int64)
        closing = data[spans[:, 1] - 1] if closed else None
        spans[:, 1] -= closed
        order = np.concatenate([np.arange(a, b) for a, b in spans]) if len(spans) else np.empty(0)
        starts = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])]).astype(np.int64)
        n_tokens = np.array([self.entries[digest][2] for digest in digests], dtype=np.int64)
        return WindowStore(data[order.astype(np.int64)], starts, n_tokens, closing)
