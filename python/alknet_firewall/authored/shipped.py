"""The small fixed part of the calibration text that comes with the package.

Users calibrate a detector for a model of their own with it. After a change of the phrases it is
written anew by ``python -m alknet_firewall.authored --shipped``; a test compares the two.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from .generator import generate
from .rows import Row

__all__ = ["calibration_rows", "shipped_lines", "write_shipped"]

_PATH = Path(__file__).parent / "calibration.jsonl.gz"
_SEED = 20_261_121
_ROWS = 2_500


def calibration_rows() -> Iterator[Row]:
    """The rows shipped with the package."""
    with gzip.open(_PATH, "rt", encoding="utf-8") as lines:
        for line in lines:
            row: Row = json.loads(line)
            yield row


def shipped_lines() -> Iterator[str]:
    """What the shipped file ought to hold, line by line."""
    for row in generate(_SEED, _ROWS):
        yield json.dumps(row, ensure_ascii=False) + "\n"


def write_shipped() -> Path:
    """Writes the shipped file anew and returns its path."""
    content = "".join(shipped_lines()).encode()
    # No time stamp, so that equal content gives an equal file.
    _PATH.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    return _PATH
