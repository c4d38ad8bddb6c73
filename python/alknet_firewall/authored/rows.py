"""What one calibration text is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

__all__ = ["Draft", "Kind", "Origin", "Row"]

Kind = Literal["direct_injection", "indirect_injection", "jailbreak", "benign", "hard_benign"]
Origin = Literal["user", "document"]


class Row(TypedDict):
    """One line of a calibration file.

    Attributes
    ----------
    id : str
        Unique within one run.
    label : int
        1 for an attack, else 0.
    source : str
        ``authored/<group>``; whole groups can be left out together.
    family : str
        What the attack does, or what kind of harmless text this is.
    carrier : str
        Kind of document, empty for prompts.
    origin : str
        ``user`` for what people type to a model, ``document`` for what a model fetches.
    lang : str
        Two-letter code of the main language.
    pair : str
        Shared by a document with and without its injection, else empty.
    """

    id: str
    text: str
    label: int
    kind: Kind
    source: str
    family: str
    carrier: str
    origin: Origin
    lang: str
    pair: str
    split: str


@dataclass(frozen=True)
class Draft:
    """A text before it has a place in a run; fields as in :class:`Row`."""

    text: str
    kind: Kind
    family: str
    origin: Origin
    lang: str = "en"
    carrier: str = ""

    @property
    def label(self) -> int:
        """1 for an attack, else 0."""
        return 0 if self.kind in ("benign", "hard_benign") else 1
