"""Writes calibration text: ``python -m alknet_firewall.authored --out DIR``."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

from .generator import generate
from .groups import GROUPS
from .shipped import write_shipped

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and writes one JSON-lines file per group."""
    parser = argparse.ArgumentParser(prog="python -m alknet_firewall.authored", description=__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="folder for one JSON-lines file per group")
    target.add_argument(
        "--shipped", action="store_true", help="write the part that comes with the package anew"
    )
    parser.add_argument("--rows", type=int, default=40_000, help="about how many (default 40000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--parts", nargs="+", choices=[group.name for group in GROUPS], metavar="GROUP"
    )
    options = parser.parse_args(arguments)
    if options.shipped:
        sys.stdout.write(f"{write_shipped()}\n")
    else:
        _write_files(options.out, options.seed, options.rows, options.parts)


def _write_files(folder: Path, seed: int, rows: int, parts: list[str] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for source, group in groupby(generate(seed, rows, parts), key=lambda row: row["source"]):
        path = folder / f"{source.replace('/', '-')}.jsonl"
        with path.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in group)


if __name__ == "__main__":
    main()
