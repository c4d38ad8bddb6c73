"""Other forms of the same words: ciphers and encodings, and the registers in which people type."""

from __future__ import annotations

import base64
import codecs
from collections.abc import Callable

from .dice import Dice

__all__ = ["CIPHERS", "register"]

_LEET = str.maketrans("aeiostAEIOST", "4310574310$7")
_NEIGHBOURS = {"a": "s", "e": "r", "i": "o", "n": "m", "o": "p", "r": "t", "s": "d", "t": "y"}


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _hexadecimal(text: str) -> str:
    return text.encode().hex()


def _rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


def _leet(text: str) -> str:
    return text.translate(_LEET)


def _spaced(text: str) -> str:
    """Letters apart, words further apart."""
    return "   ".join(" ".join(word) for word in text.split())


def _reversed(text: str) -> str:
    return text[::-1]


#: Ways to hide an attack from a reader who looks for words.
CIPHERS: dict[str, Callable[[str], str]] = {
    "base64": _base64,
    "hex": _hexadecimal,
    "rot13": _rot13,
    "leet": _leet,
    "spaced": _spaced,
    "reversed": _reversed,
}


def register(text: str, dice: Dice) -> str:
    """`text` as most people write it, or in one case of five hasty, loud or without punctuation."""
    if dice.chance(0.8):
        return text
    style = dice.pick(["lower", "bare", "upper", "typos"])
    if style == "lower":
        return text.lower()
    if style == "bare":
        return text.lower().translate(str.maketrans("", "", ".,!?;:'\""))
    if style == "upper":
        return text.upper()
    return _mistyped(text, dice)


def _mistyped(text: str, dice: Dice) -> str:
    """About one slip in twenty-five characters: left out, doubled, swapped or the key beside it."""
    letters = list(text)
    for position in range(len(letters) - 1):
        if not letters[position].isalpha() or not dice.chance(0.04):
            continue
        slip = dice.pick(["omit", "double", "swap", "neighbour"])
        if slip == "omit":
            letters[position] = ""
        elif slip == "double":
            letters[position] *= 2
        elif slip == "swap":
            letters[position], letters[position + 1] = letters[position + 1], letters[position]
        else:
            letters[position] = _NEIGHBOURS.get(letters[position], letters[position])
    return "".join(letters)
