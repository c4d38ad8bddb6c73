"""Whether instruction sets and numbers of threads agree on alarms.

In an environment with alknet-firewall::

    python benches/levels.py [--texts PATH ...] [--rows 3000] [--isas avx2 amx]

Screens texts with every instruction set of this CPU, or those named, on one thread and on two, and
prints the largest difference of scores from the last of them and how many levels differ. Texts are
those of JSON Lines files (their ``text``), of other files and of folders of either; without any
they are generated. Ends with status 1 when a level differs, or when the number of threads changes a
score at all.
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


def compare(expected: list[Alarm], found: list[Alarm]) -> tuple[float, int]:
    """Largest difference of scores, and how many levels differ."""
    pairs = list(zip(expected, found, strict=True))
    differences = (abs(a.score - b.score) for a, b in pairs)
    return max(differences, default=0.0), sum(a.level != b.level for a, b in pairs)


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
    reference = None
    largest, differing, threads_differ = 0.0, 0, 0.0
    for isa in reversed(isas):
        one, two = (screen(options.detector, isa, threads, texts) for threads in THREADS)
        reference = reference or one
        between_threads, _ = compare(one, two)
        difference, levels = compare(reference, one)
        print(
            f"{isa}: scores differ by at most {difference:.2e} from those of {isas[-1]}, "
            f"{levels} of {len(texts)} levels; between threads by {between_threads:.2e}",
            flush=True,
        )
        largest, differing = max(largest, difference), differing + levels
        threads_differ = max(threads_differ, between_threads)
    print(
        f"all of {', '.join(isas)}: scores differ by at most {largest:.2e}, {differing} of "
        f"{len(texts) * (len(isas) - 1)} levels; between threads by {threads_differ:.2e}"
    )
    return int(differing > 0 or threads_differ > 0.0)


if __name__ == "__main__":
    sys.exit(main())
