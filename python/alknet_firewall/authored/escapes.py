r"""Harmless source code with bytes and characters written as escapes: `"\xff\xfe"`, `"caf\u00e9"`.

Attacks are encoded like this too, and are read decoded: the escapes themselves must not alarm.
"""

from __future__ import annotations

from collections.abc import Callable

from .dice import Dice
from .grammar import Grammar
from .machine import hex_byte
from .rows import Draft

__all__ = ["escapes"]

_WORDS = (
    "foo",
    "bar",
    "abc",
    "end",
    "key",
    "id",
    "name",
    "zip",
    "ok",
    "total",
    "GET",
    "PNG",
    "RIFF",
)
_NAMES = (
    "header",
    "needle",
    "haystack",
    "magic",
    "sample",
    "expected",
    "prefix",
    "sep",
    "buf",
    "raw",
)
# Beginnings of files as the formats define them, and marks of byte order.
_KNOWN = (
    r"\x89PNG",
    r"\x7fELF\x02\x01\x01",
    r"PK\x03\x04\x14\x00",
    r"GIF89a\x01\x00\x01\x00",
    r"\xff\xd8\xff\xe0\x00\x10JFIF",
    r"\x1f\x8b\x08\x00",
    r"\xef\xbb\xbf",
    r"\xff\xfe\x00\x00",
    r"\x00\x00\x00\x01",
    r"\xca\xfe\xba\xbe",
)
_COLOURS = (r"\x1b[", r"\u001b[")
_TERMINAL = ("done", "failed", "ok", "warning", "3 passed", "built in 2 s", "cache miss", "ready")
_ACCENTED = (
    r"caf\u00e9",
    r"na\u00efve",
    r"M\u00fcller",
    r"S\u00e3o Paulo",
    r"pi\u00f1ata",
    r"\u00a9 2024",
    r"25\u00a0\u20ac",
    r"\u4f60\u597d",
    r"\ud83d\ude00",
    r"\u{1F600}",
    r"\U0001F4A9",
    r"\u2603",
)
# Statements around a string, in several languages.
_STATEMENTS = (
    'const {name}: &[u8] = b"{s}";',
    'let {name} = b"{s}";',
    'assert_eq!(parse(b"{s}"), Err(Error::Invalid));',
    'static const char {name}[] = "{s}";',
    'if (memcmp({name}, "{s}", {n}) == 0) return {n};',
    'printf("{s}", {name});',
    '{name} = b"{s}"',
    'if data.startswith(b"{s}"):',
    'assert decode(b"{s}") == {n}',
    "{name}.split('{s}')",
    'const {name} = "{s}";',
    '"{name}": "{s}",',
    "echo -e '{s}'",
    '{name} := []byte("{s}")',
)
_COMMENTS = (
    "Not valid UTF-8: the second byte is missing.",
    "The first bytes of a file say what it is.",
    "Searching bytes works even where they are no text.",
    "Byte order mark, little endian.",
    "Two surrogates, one character.",
    "Ends the table; must stay last.",
)


def escapes(grammar: Grammar, dice: Dice) -> list[Draft]:
    """One such line or several, sometimes with a comment, or at the end of other code."""
    lines = [dice.pick(_WRITERS)(dice) for _ in range(dice.pick([1, 1, 2, 3, 5]))]
    if dice.chance(0.3):
        lines.insert(0, dice.pick(["// ", "# ", "-- "]) + dice.pick(_COMMENTS))
    if dice.chance(0.3):
        lines.insert(0, grammar.draw(dice.pick(["code", "code.more"]), dice))
    return [Draft("\n".join(lines), "hard_benign", "code", "document")]


def _byte(dice: Dice) -> str:
    digits = hex_byte(dice)
    return r"\x" + (digits.upper() if dice.chance(0.3) else digits)


def _bytes(dice: Dice) -> str:
    """A string of escaped bytes, some with words between them."""
    parts = []
    for _ in range(dice.between(1, 4)):
        parts.append("".join(_byte(dice) for _ in range(dice.between(1, 6))))
        if dice.chance(0.5):
            parts.append(dice.pick(_WORDS))
    return "".join(parts)


def _colour(dice: Dice) -> str:
    start = dice.pick(_COLOURS)
    return (
        f"{start}{dice.pick(['1;', '', '0;'])}3{dice.between(1, 7)}m{dice.pick(_TERMINAL)}{start}0m"
    )


def _array(dice: Dice) -> str:
    data = ", ".join("0x" + hex_byte(dice) for _ in range(dice.between(4, 16)))
    return f"static const uint8_t {dice.pick(_NAMES)}[] = {{ {data} }};"


def _statement(string: Callable[[Dice], str]) -> Callable[[Dice], str]:
    """Writes a line of code around a string."""

    def write(dice: Dice) -> str:
        line = dice.pick(_STATEMENTS).replace("{n}", str(dice.between(2, 40)))
        return line.replace("{name}", dice.pick(_NAMES)).replace("{s}", string(dice))

    return write


def _one_of(strings: tuple[str, ...]) -> Callable[[Dice], str]:
    return lambda dice: dice.pick(strings)


_WRITERS: tuple[Callable[[Dice], str], ...] = (
    _statement(_bytes),
    _statement(_bytes),
    _statement(_one_of(_KNOWN)),
    _statement(_one_of(_ACCENTED)),
    _statement(_colour),
    _array,
    _bytes,
)
