"""The hand-written phrases, loaded once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .grammar import Grammar, load

__all__ = ["LANGUAGES", "phrases"]

#: Languages besides English. Each has the sections ``<code>.override``, ``.classic`` (the common
#: forms of it in many combinations), ``.order``, ``.request``, ``.near``, ``.text`` and ``.hard``.
LANGUAGES = ("ar", "de", "es", "fr", "hi", "it", "ja", "ko", "nl", "pl", "pt", "ru", "tr", "zh")

# What the code supplies: the parts of documents, and what goes into frames and wrappers.
_BOUND = ("here", "body", "payload", "hidden", "cipher", "pasted", "instruction")


@cache
def phrases() -> Grammar:
    """The grammar of all phrase files of this package."""
    return load(Path(__file__).parent / "data", _BOUND)
