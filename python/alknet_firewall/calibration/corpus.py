"""Rows of labelled text from JSON-lines folders."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

__all__ = [
    "FOLDS",
    "Row",
    "for_other_languages",
    "is_authored",
    "read_corpora",
    "row_from",
    "sha256_of",
]

# Public sources that are left out together when a detector is evaluated: each fold holds attack and
# benign sources. How others are left out is in `crossfit.folds_of`.
FOLDS: tuple[tuple[str, ...], ...] = (
    ("sep", "gsm8k", "peps"),
    ("agentdojo", "arena_hard_v01", "cse_codegen"),
    ("asb", "garak", "giskard", "awesome_prompts", "llmail_benign"),
    ("hackaprompt", "gptfuzzer", "cse_frr", "self_instruct_seed"),
    ("inthewild_jailbreaks", "neuralchemy", "oss_docs_code", "security_docs"),
)

# Whose text the benign rows of these sources are; rows of others say so themselves, in `origin`.
_SOURCE_ORIGINS = {
    "sep": "document",
    "agentdojo": "document",
    "asb": "document",
    "llmail_benign": "document",
    "peps": "document",
    "security_docs": "document",
    "oss_docs_code": "document",
    "arena_hard_v01": "user",
    "gsm8k": "user",
    "self_instruct_seed": "user",
    "awesome_prompts": "user",
    "cse_frr": "user",
    "cse_codegen": "user",
    "neuralchemy": "user",
}
_ATTACK_ORIGINS = {
    "indirect_injection": "document",
    "direct_injection": "user",
    "jailbreak": "user",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled text.

    ``origin`` is ``"user"``, ``"document"`` or None where the text could be either.
    """

    text: str
    attack: bool
    kind: str
    source: str
    origin: str | None
    family: str = ""
    lang: str = ""
    pair: str = ""

    @property
    def digest(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def read_corpora(paths: Iterable[Path | str]) -> list[Row]:
    """Read every ``*.jsonl`` and ``*.jsonl.gz`` below some folders, or such files, in order.

    A row needs ``text`` and ``label`` (1 = attack); ``kind``, ``source`` (by default the file's
    name), ``origin``, ``family``, ``lang`` and ``pair`` are used where present. Rows of kind
    ``harmful_request`` hold no injection and are left out; repeated texts are kept once.

    Raises
    ------
    InputError
        If a path holds no such file or a line is not such a row; the message says which line.
    """
    rows: dict[str, Row] = {}
    for path in map(Path, paths):
        files = sorted(_files(path)) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path} holds no *.jsonl or *.jsonl.gz file")
        for file in files:
            for row in _read(file):
                rows.setdefault(row.text, row)
    return list(rows.values())


def sha256_of(rows: Iterable[Row]) -> str:
    """Digest of texts, labels, sources and origins, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.attack:d}\0{row.source}\0{row.origin}\0{row.text}\0".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz")))


def _read(path: Path) -> Iterator[Row]:
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = _parse(line, name, f"{path}:{number}") if line.strip() else None
                if row is not None:
                    yield row
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _parse(line: str, default_source: str, where: str) -> Row | None:
    try:
        return row_from(json.loads(line), default_source)
    # Besides what is no JSON: numbers and nesting beyond what Python reads.
    except (ValueError, RecursionError, InputError) as error:
        raise InputError(f"{where}: {error}") from None


# Some corpora spell out what others abbreviate.
_LANGUAGES = {
    "English": "en",
    "French": "fr",
    "German": "de",
    "Hindi": "hi",
    "Italian": "it",
    "Portuguese": "pt",
    "Spanish": "es",
    "Thai": "th",
}


def row_from(values: Any, default_source: str) -> Row | None:
    """The row of a JSON object, or None if it is one that is left out.

    Raises
    ------
    InputError
        If it has no text and label, a kind or source that is no string, or an unknown origin.
    """
    try:
        text, label = values["text"], values["label"]
    except (KeyError, TypeError):
        raise InputError("not a JSON object with text and label") from None
    if not isinstance(text, str) or label not in (0, 1):
        raise InputError("text must be a string, label 0 or 1 (1 = attack)")
    kind = values.get("kind") or ("attack" if label else "benign")
    source = values.get("source") or default_source
    if not isinstance(kind, str) or not isinstance(source, str):
        raise InputError("kind and source must be strings")
    if kind == "harmful_request" or not text.strip():
        return None
    known = _ATTACK_ORIGINS.get(kind) if label else _SOURCE_ORIGINS.get(source)
    origin = values.get("origin") or known
    if origin not in ("user", "document", None):
        raise InputError("origin must be user or document")
    extras = {name: str(values.get(name) or "") for name in ("family", "lang", "pair")}
    extras["lang"] = _LANGUAGES.get(extras["lang"], extras["lang"])
    return Row(text, bool(label), kind, source, origin, **extras)


def for_other_languages(source: str) -> bool:
    """Whether a source was written for the direction of other languages alone.

    In the direction for all it costs more than it brings.
    """
    return source.startswith("authored/language_")


def is_authored(source: str) -> bool:
    """Whether a source was written for this project."""
    return source.startswith("authored")
