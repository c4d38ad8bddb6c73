"""Write letter_pairs.rs: what one letter after another costs in English, counted on docstrings.

The text is the documentation of Python's own standard library, so anyone can count again:
``python letter_pairs.py > letter_pairs.rs``. Another Python version moves a few entries by one.
"""

import ast
import math
import sys
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

SYMBOLS = "_abcdefghijklmnopqrstuvwxyz"  # _ stands for everything that is not a letter
UNITS_PER_NAT = 16
SMOOTHING = 0.5  # added to every count, so that no pair is impossible
MAX_COST = 88  # so that one rare pair does not outweigh a word
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings() -> Iterator[str]:
    """Yield every docstring of the standard library, its tests left out."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED):
                yield ast.get_docstring(node) or ""


def plain_words(text: str) -> Iterator[str]:
    """Yield the words that are prose: no identifiers, no capitals inside, no digits."""
    for token in text.split():
        word = token.strip(".,;:!?()'\"`")
        if word.isascii() and word.isalpha() and word[1:] == word[1:].lower():
            yield word.lower()


def pair_costs() -> list[list[int]]:
    """Return ``-ln P(second | first)`` in sixteenths of a nat, `_` before and after each word."""
    counts = [[SMOOTHING] * len(SYMBOLS) for _ in SYMBOLS]
    for text in docstrings():
        for word in plain_words(text):
            symbols = [0, *(SYMBOLS.index(letter) for letter in word), 0]
            for first, second in pairwise(symbols):
                counts[first][second] += 1
    return [
        [min(MAX_COST, round(-UNITS_PER_NAT * math.log(count / sum(row)))) for count in row]
        for row in counts
    ]


def main() -> None:
    """Print the table as Rust."""
    out = sys.stdout
    out.write("// Written by letter_pairs.py; do not edit.\n")
    out.write("/// Cost of the second letter after the first in English, in sixteenths of a nat.\n")
    out.write(
        "///\n/// Row: first, column: second; 0 is anything but a letter, 1 to 26 are a to z.\n"
    )
    out.write("#[rustfmt::skip]\n")
    out.write("pub(super) const PAIR_COST: [[u8; 27]; 27] = [\n")
    for symbol, row in zip(SYMBOLS, pair_costs(), strict=True):
        out.write(f"    [{', '.join(map(str, row))}], // {symbol}\n")
    out.write("];\n")


if __name__ == "__main__":
    main()
