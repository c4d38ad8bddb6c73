"""The phrase files: a small grammar for text with many hand-written alternatives.

A phrase file (``data/**/*.txt``) consists of sections::

    == greeting ==
    Good morning {person},
    {Hello|Hi} all,

    == notice blocks ==
    Dear {person#1},
    the lift is out of order until {day}.
    %%
    Water is off from {8..10} to {11..12}. Ask {person#1}.

In a plain section every line is one alternative and lines that begin with ``#`` and a
space are remarks. In a
``blocks`` section alternatives span lines and are separated by ``%%``. In a ``raw`` section they do
too, and braces mean themselves.

Slots inside an alternative:

=================  ===============================================================
``{name}``         an alternative of that section
``{name#1}``       the same, but equal wherever this mark appears in one text
``{^name}``        with a capital first letter
``{a|b|}``         one of these, which may hold slots themselves
``{3..9}``         an integer in that range
``{2..4*name}``    that many alternatives on lines of their own
``{hex:8}``        that many hexadecimal digits
=================  ===============================================================

Any other brace is an ordinary character, so JSON and code need no escapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from .dice import Dice

__all__ = ["Grammar", "GrammarError", "Scope", "bind", "load"]

_HEADER = re.compile(r"== ([a-z][a-z0-9_.]*)( blocks| raw)? ==")
_REFERENCE = re.compile(r"(\^?)([a-z][a-z0-9_.]*)(#\d+)?")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_REPEAT = re.compile(r"(\d+)\.\.(\d+)\*([a-z][a-z0-9_.]*)")
_HEX = re.compile(r"hex:(\d+)")


class GrammarError(ValueError):
    """A phrase file is malformed or names a section that does not exist."""


_TRIES = 4


@dataclass
class Scope:
    """What one text has fixed so far.

    Attributes
    ----------
    bound : dict of str to iterator of str
        Endless texts that take the place of a section: each draw of the name takes the next one.
        See :func:`bind`.
    marked : dict of str to str
        What ``{name#1}`` stood for the first time.
    used : set of (str, int)
        Alternatives taken so far, by section and number.
    """

    bound: dict[str, Iterator[str]] = field(default_factory=dict)
    marked: dict[str, str] = field(default_factory=dict)
    used: set[tuple[str, int]] = field(default_factory=set)


def bind(**texts: str | list[str]) -> Scope:
    """A scope in which each name stands for a text, or for the texts of a list in turn."""
    return Scope(
        {name: cycle([text] if isinstance(text, str) else text) for name, text in texts.items()}
    )


# A compiled alternative writes itself with the given choices.
_Template = Callable[["Grammar", Dice, Scope], str]


class Grammar:
    """All sections of all phrase files, ready to be drawn from.

    Parameters
    ----------
    sections : mapping of str to sequence of (alternative, literal)
        `literal` alternatives keep their braces.
    bindable : iterable of str
        Names a caller supplies through :class:`Scope`.

    Raises
    ------
    GrammarError
        A slot names neither a section nor a bindable name.
    """

    def __init__(
        self, sections: Mapping[str, list[tuple[str, bool]]], bindable: Iterable[str] = ()
    ) -> None:
        self._known = {*sections, *bindable}
        self._sections = {
            name: [self._compile(text, literal, name) for text, literal in alternatives]
            for name, alternatives in sections.items()
        }

    def names(self, prefix: str = "") -> list[str]:
        """Section names that begin with `prefix`, sorted."""
        return sorted(name for name in self._sections if name.startswith(prefix))

    def draw(self, name: str, dice: Dice, scope: Scope | None = None) -> str:
        """One alternative of section `name`, its slots filled.

        Raises
        ------
        GrammarError
            No such section, and nothing bound to the name.
        """
        scope = Scope() if scope is None else scope
        if name in scope.bound:
            return next(scope.bound[name])
        if name not in self._sections:
            raise GrammarError(f"nothing is bound to the name {name!r}")
        return self._unused(name, dice, scope)(self, dice, scope)

    def draw_several(self, name: str, count: int, dice: Dice, scope: Scope) -> list[str]:
        """`count` alternatives of a section, different ones as long as there are enough.

        Marks made inside one of them are not seen by the others.
        """
        templates = dice.sample(self._sections[name], count)
        return [template(self, dice, Scope(scope.bound)) for template in templates]

    def _unused(self, name: str, dice: Dice, scope: Scope) -> _Template:
        """An alternative that this text does not have yet, as far as some tries find one."""
        templates = self._sections[name]
        for _ in range(_TRIES):
            number = dice.between(0, len(templates) - 1)
            if (name, number) not in scope.used:
                break
        scope.used.add((name, number))
        return templates[number]

    def _compile(self, text: str, literal: bool, section: str) -> _Template:
        if literal:
            return lambda _grammar, _dice, _scope: text
        return _join(list(self._parts(text, section)))

    def _parts(self, text: str, section: str) -> Iterator[_Template | str]:
        start = 0
        while (opening := text.find("{", start)) >= 0:
            closing = _closing_brace(text, opening)
            slot = None if closing < 0 else self._slot(text[opening + 1 : closing], section)
            if slot is None:
                yield text[start : opening + 1]
                start = opening + 1
            else:
                yield text[start:opening]
                yield slot
                start = closing + 1
        yield text[start:]

    def _slot(self, inside: str, section: str) -> _Template | None:
        """The template for what stands between two braces, or None if they are mere braces."""
        if match := _REFERENCE.fullmatch(inside):
            self._check(match[2], section)
            return _reference(match[2], match[3], capital=bool(match[1]))
        if match := _REPEAT.fullmatch(inside):
            self._check(match[3], section)
            return _repetition(int(match[1]), int(match[2]), match[3])
        if match := _RANGE.fullmatch(inside):
            low, high = int(match[1]), int(match[2])
            return lambda _grammar, dice, _scope: str(dice.between(low, high))
        if match := _HEX.fullmatch(inside):
            return _hexadecimal(int(match[1]))
        if "\n" not in inside and len(branches := _split_branches(inside)) > 1:
            return _choice([self._compile(branch, False, section) for branch in branches])
        return None

    def _check(self, name: str, section: str) -> None:
        if name not in self._known:
            raise GrammarError(f"section {section!r} refers to {name!r}, which does not exist")


def load(folder: Path, bindable: Iterable[str] = ()) -> Grammar:
    """Reads every phrase file below `folder`.

    Parameters
    ----------
    folder : Path
    bindable : iterable of str
        Names that callers will bind.

    Raises
    ------
    GrammarError
        A malformed file, a section defined twice, or a slot that names nothing.
    """
    sections: dict[str, list[tuple[str, bool]]] = {}
    for path in sorted(folder.rglob("*.txt")):
        for name, alternatives in _read_sections(path):
            if name in sections:
                raise GrammarError(f"{path.name}: section {name!r} is defined twice")
            sections[name] = alternatives
    return Grammar(sections, bindable)


def _read_sections(path: Path) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    name, style, lines = "", "", list[str]()
    for line in [*path.read_text(encoding="utf-8").splitlines(), "== end =="]:
        header = _HEADER.fullmatch(line)
        if header is None:
            lines.append(line)
            continue
        alternatives = _alternatives(lines, style)
        if bool(name) != bool(alternatives):
            raise GrammarError(f"{path.name}: text without a section, or section {name!r} is empty")
        if name:
            yield name, alternatives
        name, style, lines = header[1], (header[2] or "").strip(), []


def _alternatives(lines: list[str], style: str) -> list[tuple[str, bool]]:
    if not style:
        return [(line, False) for line in lines if line.strip() and not line.startswith("# ")]
    blocks = "\n".join(lines).split("\n%%\n") if lines else []
    return [(block.strip("\n"), style == "raw") for block in blocks if block.strip()]


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for position in range(opening, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
    return -1


def _split_branches(inside: str) -> list[str]:
    """Splits at the bars that stand outside inner braces."""
    branches, depth, start = list[str](), 0, 0
    for position, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if character == "|" and depth == 0:
            branches.append(inside[start:position])
            start = position + 1
    return [*branches, inside[start:]]


def _join(parts: list[_Template | str]) -> _Template:
    def write(grammar: Grammar, dice: Dice, scope: Scope) -> str:
        return "".join(
            part if isinstance(part, str) else part(grammar, dice, scope) for part in parts
        )

    return write


def _choice(branches: list[_Template]) -> _Template:
    return lambda grammar, dice, scope: dice.pick(branches)(grammar, dice, scope)


def _reference(name: str, mark: str | None, capital: bool) -> _Template:
    def write(grammar: Grammar, dice: Dice, scope: Scope) -> str:
        key = name + (mark or "")
        text = scope.marked.get(key) if mark else None
        if text is None:
            text = grammar.draw(name, dice, scope)
        if mark:
            scope.marked[key] = text
        return text[:1].upper() + text[1:] if capital else text

    return write


def _repetition(low: int, high: int, name: str) -> _Template:
    def write(grammar: Grammar, dice: Dice, scope: Scope) -> str:
        return "\n".join(grammar.draw_several(name, dice.between(low, high), dice, scope))

    return write


def _hexadecimal(digits: int) -> _Template:
    return lambda _grammar, dice, _scope: "".join(
        dice.pick("0123456789abcdef") for _ in range(digits)
    )
