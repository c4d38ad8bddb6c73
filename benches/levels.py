"""Whether instruction sets and numbers of threads agree on alarms.

In an environment with alknet-firewall::

    python benches/levels.py [--texts PATH ...] [--rows 3000] [--isas avx2 amx]

Screens texts with every instruction set of this CPU, or those named, on one thread and on two, and
prints how many alarms are not the same to the last bit of their scores, spans and signals. Texts
are those of JSON Lines files (their ``text``), of other files and of folders of either; without any
they are generated. Ends with status 1 when an alarm differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from alknet_firewall import Alarm, Firewall, _core
from alknet_firewall.authored.generator import generate

THREADS = (1, 2)


def read(path: Path) -> Iterator[str]:
    """Texts of a JSON Lines file, of another file, or of all files below a folder."""
    if path.is_dir():
        yield from chain.from_iterable(map(read, sorted(filter(Path.is_file, path.rglob("*")))))
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines if line.strip())
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def choose(paths: Iterable[Path], rows: int, seed: int) -> list[str]:
    """`rows` of the texts below `paths`, drawn at random when there are more."""
    texts = [text for path in paths for text in read(path)]
    return random.Random(seed).sample(texts, rows) if len(texts) > rows else texts


def screen(detector: str, isa: str, threads: int, texts: list[str]) -> list[Alarm]:
    """Alarms of all texts, one after the other."""
    start = time.perf_counter()
    firewall = Firewall(detector, isa=isa, threads=threads)
    alarms = [firewall.screen(text) for text in texts]
    seconds = time.perf_counter() - start
    print(f"{firewall.engine}: {len(texts)} texts in {seconds:.0f} s", file=sys.stderr)
    return alarms


def differing(expected: list[Alarm], found: list[Alarm]) -> tuple[int, int]:
    """How many alarms are not the same, and how many have another level."""
    pairs = list(zip(expected, found, strict=True))
    return sum(a != b for a, b in pairs), sum(a.level != b.level for a, b in pairs)


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--texts", nargs="+", type=Path, default=[], help="JSON Lines, other files, folders"
    )
    parser.add_argument("--rows", type=int, default=3000, help="most texts to screen")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--isas", nargs="+", metavar="ISA", help="instruction sets to compare")
    parser.add_argument("--detector", default="smollm2-135m-instruct", help="name or folder")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    if options.texts:
        texts = choose(options.texts, options.rows, options.seed)
    else:
        texts = [row["text"] for row in generate(options.seed, options.rows)]
    isas = options.isas or _core.build_info()["instruction sets"].split(", ")
    runs = [(isa, threads) for isa in reversed(isas) for threads in THREADS]
    reference = screen(options.detector, *runs[0], texts)
    total = 0
    for isa, threads in runs[1:]:
        alarms, levels = differing(reference, screen(options.detector, isa, threads, texts))
        print(
            f"{isa}, {threads} threads: {alarms} of {len(texts)} alarms differ from those of "
            f"{runs[0][0]} on {runs[0][1]}, {levels} in their level",
            flush=True,
        )
        total += alarms
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
