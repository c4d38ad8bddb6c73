"""Harmless strings that no person wrote: checksums, keys, encoded bytes, addresses, mashed keys.

They read like nothing else, and must neither alarm nor make random characters look like attacks.
"""

from __future__ import annotations

import base64

from .dice import Dice
from .grammar import Grammar
from .rows import Draft, Origin

__all__ = ["hex_byte", "machine_made"]

_HEX = "0123456789abcdef"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_FILES = (
    "backup.tar",
    "report.pdf",
    "image.iso",
    "model.bin",
    "photos.zip",
    "notes.md",
)
_HOSTS = ("cdn.example.com", "static.example.org", "files.example.net", "img.example.com")


def machine_made(grammar: Grammar, dice: Dice) -> list[Draft]:
    """Such strings alone, a list of them, or one amid ordinary sentences."""
    origin: Origin = dice.pick(["document", "document", "user"])
    write = dice.pick(_WRITERS)
    form = dice.pick(["alone", "list", "prose", "prose"])
    if form == "alone":
        text = write(dice)
    elif form == "list":
        text = "\n".join(write(dice) for _ in range(dice.between(2, 8)))
    else:
        text = _in_prose(write(dice), origin, grammar, dice)
    return [Draft(text, "hard_benign", "machine_made", origin)]


def hex_byte(dice: Dice) -> str:
    """Two hexadecimal digits, lower case."""
    return dice.pick(_HEX) + dice.pick(_HEX)


def _in_prose(string: str, origin: Origin, grammar: Grammar, dice: Dice) -> str:
    # A request belongs to users: in a document it would be an order to the model.
    before = grammar.draw("request" if origin == "user" else "chatter", dice)
    gap = dice.pick(["\n", "\n\n", " "])
    lead = dice.pick(["", "Here it is: ", "For reference: ", "ID ", "The value is ", "Attached: "])
    after = gap + grammar.draw("chatter", dice) if dice.chance(0.5) else ""
    return f"{before}{gap}{lead}{string}{after}"


def _run(alphabet: str, dice: Dice, low: int, high: int) -> str:
    return "".join(dice.pick(alphabet) for _ in range(dice.between(low, high)))


def _checksum(dice: Dice) -> str:
    digest = "".join(dice.pick(_HEX) for _ in range(dice.pick([32, 40, 64])))
    return f"{digest}  {dice.pick(_FILES)}" if dice.chance(0.5) else digest


def _uuid(dice: Dice) -> str:
    return "-".join("".join(dice.pick(_HEX) for _ in range(n)) for n in (8, 4, 4, 4, 12))


def _encoded(dice: Dice) -> str:
    data = bytes(dice.between(0, 255) for _ in range(dice.between(12, 240)))
    if dice.chance(0.3):
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return base64.b64encode(data).decode()


def _token(dice: Dice) -> str:
    return ".".join(_run(_LETTERS + _DIGITS + "-_", dice, 20, 60) for _ in range(3))


def _key(dice: Dice) -> str:
    prefix = dice.pick(["key-", "id_", "tok_", "ref:", ""])
    return prefix + _run(_LETTERS + _DIGITS, dice, 12, 40)


def _address(dice: Dice) -> str:
    path = "/".join(_run(_HEX, dice, 2, 16) for _ in range(dice.between(1, 4)))
    query = "&".join(
        f"{dice.pick(['id', 'v', 'sig', 'utm', 't'])}={_run(_LETTERS + _DIGITS, dice, 3, 30)}"
        for _ in range(dice.between(0, 3))
    )
    return f"https://{dice.pick(_HOSTS)}/{path}" + (f"?{query}" if query else "")


def _dump(dice: Dice) -> str:
    """A line of a memory dump."""
    data = " ".join(hex_byte(dice) for _ in range(16))
    return f"{_run(_HEX, dice, 8, 8)}  {data}"


def _numbers(dice: Dice) -> str:
    return dice.pick([" ", ", ", ";", "\t"]).join(
        _run(_DIGITS, dice, 1, 9) for _ in range(dice.between(4, 30))
    )


def _mashed(dice: Dice) -> str:
    """What a cat on the keyboard types."""
    words = (_run(dice.pick(_KEYBOARD), dice, 2, 9) for _ in range(dice.between(1, 8)))
    return " ".join(words)


_WRITERS = (_checksum, _uuid, _encoded, _token, _key, _address, _dump, _numbers, _mashed)
