"""Whether instruction sets and numbers of threads agree on alarms.

In an environment with alknet-firewall::

    python benches/levels.py [--rows 3000] [--seed 7] [--detector NAME]

Screens generated texts with every instruction set of this CPU, on one thread and on two, and prints
the largest difference of scores from the first combination and the texts whose level differs. Ends
with status 1 when a level differs, or when the number of threads changes a score at all.
"""

from __future__ import annotations

import argparse
import sys
import time

from alknet_firewall import Alarm, Firewall, _core
from alknet_firewall.authored.generator import generate

THREADS = (1, 2)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--detector", default="smollm2-135m-instruct", help="name or folder")
    options = parser.parse_args()
    texts = [row["text"] for row in generate(options.seed, options.rows)]
    isas = _core.build_info()["instruction sets"].split(", ")
    reference = None
    failed = False
    for isa in reversed(isas):
        one, two = (screen(options.detector, isa, threads, texts) for threads in THREADS)
        reference = reference or one
        threads_differ, _ = compare(one, two)
        difference, levels = compare(reference, one)
        print(
            f"{isa}: scores differ by at most {difference:.2e} from those of {isas[-1]}, "
            f"{levels} of {len(texts)} levels; between threads by {threads_differ:.2e}"
        )
        failed = failed or levels > 0 or threads_differ > 0.0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
