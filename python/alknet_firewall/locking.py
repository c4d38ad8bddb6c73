"""One process at a time: an advisory lock beside the thing that it protects."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .detector import Progress

__all__ = ["locked"]

if sys.platform == "win32":
    import msvcrt
    import time

    def _try_lock(stream: IO[bytes]) -> bool:
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _wait_lock(stream: IO[bytes]) -> None:
        while not _try_lock(stream):
            time.sleep(0.1)

else:
    import fcntl

    def _try_lock(stream: IO[bytes]) -> bool:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _wait_lock(stream: IO[bytes]) -> None:
        fcntl.flock(stream, fcntl.LOCK_EX)


@contextmanager
def locked(target: Path, progress: Progress | None = None) -> Iterator[None]:
    """Hold the lock of `target` (``.NAME.lock`` beside it), waiting for whoever has it.

    The system releases the lock when its process ends, however it ends. The file goes away with
    the lock, except on Windows, where an open file cannot be removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"
    while True:
        with path.open("ab") as stream:
            if not _try_lock(stream):
                if progress is not None:
                    progress("wait for another process", 0, None)
                _wait_lock(stream)
            # The holder before us may have removed the file that we waited for.
            if not _is_open_file(path, stream):
                continue
            try:
                yield
            finally:
                if sys.platform != "win32":
                    path.unlink()
            return


def _is_open_file(path: Path, stream: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False
