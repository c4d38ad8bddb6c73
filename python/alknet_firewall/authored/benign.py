"""Harmless texts, the ordinary ones and those that look like attacks."""

from __future__ import annotations

from collections.abc import Callable

from .dice import Dice
from .disguise import register
from .documents import CARRIERS, write
from .grammar import Grammar, bind
from .phrases import LANGUAGES
from .rows import Draft, Kind, Origin

__all__ = ["asides", "documents", "foreign", "native", "pasted", "prose", "section", "technical"]

_TECHNICAL = ["python", "csource", "log", "config", "csv", "json", "yaml", "sql", "readme", "issue"]


def section(
    name: str, family: str, origin: Origin, kind: Kind = "benign", typed: bool = False
) -> Callable[[Grammar, Dice], list[Draft]]:
    """Writes alternatives of one section; `typed` ones in the registers of hasty people."""

    def write_one(grammar: Grammar, dice: Dice) -> list[Draft]:
        text = grammar.draw(name, dice)
        return [Draft(register(text, dice) if typed else text, kind, family, origin)]

    return write_one


def documents(grammar: Grammar, dice: Dice) -> list[Draft]:
    """A document of any kind with nothing slipped in."""
    carrier = CARRIERS[dice.pick(sorted(CARRIERS))]
    text = write(carrier, grammar, dice).fill({})
    return [Draft(text, "benign", "document", "document", carrier=carrier.name)]


def technical(grammar: Grammar, dice: Dice) -> list[Draft]:
    """Source code, or what programs print and read."""
    if dice.chance(0.3):
        text = grammar.draw(dice.pick(["code", "code.more"]), dice)
        return [Draft(text, "benign", "code", "document")]
    carrier = CARRIERS[dice.pick(_TECHNICAL)]
    text = write(carrier, grammar, dice).fill({})
    return [Draft(text, "benign", "code", "document", carrier=carrier.name)]


def prose(grammar: Grammar, dice: Dice) -> list[Draft]:
    """An article without a trace of mark-up."""
    text = write(CARRIERS["prose"], grammar, dice).fill({})
    return [Draft(text, "benign", "document", "document", carrier="prose")]


def asides(grammar: Grammar, dice: Dice) -> list[Draft]:
    """A document with orders to people, quiz questions or notorious words slipped in.

    They stand where injections stand and are dressed alike, so that neither the place nor a change
    of subject can be mistaken for an attack.
    """
    carrier = CARRIERS[dice.pick(sorted(CARRIERS))]
    texts = [register(grammar.draw("aside", dice), dice) for _ in range(dice.between(1, 2))]
    document = write(carrier, grammar, dice)
    text = document.fill(document.place(texts, grammar, dice))
    return [Draft(text, "hard_benign", "human_aside", "document", carrier=carrier.name)]


def pasted(grammar: Grammar, dice: Dice) -> list[Draft]:
    """A request about a pasted document, with or without an aside in it."""
    carrier = CARRIERS[dice.pick(sorted(CARRIERS))]
    texts = [grammar.draw("aside", dice)] if dice.chance(0.4) else []
    document = write(carrier, grammar, dice)
    text = document.fill(document.place(texts, grammar, dice))
    request = grammar.draw("paste.request", dice)
    layout = grammar.draw("paste.layout", dice, bind(instruction=request, pasted=text))
    return [Draft(layout, "benign", "pasted_text", "user", carrier=carrier.name)]


def foreign(grammar: Grammar, dice: Dice) -> list[Draft]:
    """Requests and documents in other languages, some with words that attacks use as well."""
    lang = dice.pick(LANGUAGES)
    form = dice.weighted({"request": 3, "text": 4.5, "hard": 2.5})
    if form == "request":
        request = register(grammar.draw(f"{lang}.request", dice), dice)
        return [Draft(request, "benign", "foreign_language", "user", lang)]
    count = dice.between(1, 5) if form == "text" else dice.between(0, 3)
    texts = grammar.draw_several(f"{lang}.text", count, dice, bind())
    if form == "hard":
        # Where an injection would stand, and as hasty as one.
        hard = register(grammar.draw(f"{lang}.hard", dice), dice)
        texts.insert(dice.between(0, len(texts)), hard)
    text = dice.pick(["\n\n", "\n", " "]).join(texts)
    kind: Kind = "hard_benign" if form == "hard" else "benign"
    return [Draft(text, kind, "foreign_language", "document", lang, "prose")]


def native(grammar: Grammar, dice: Dice) -> list[Draft]:
    """The same, a third of it requests that use the words of common attacks."""
    if dice.chance(0.67):
        return foreign(grammar, dice)
    lang = dice.pick(LANGUAGES)
    request = register(grammar.draw(f"{lang}.near", dice), dice)
    return [Draft(request, "hard_benign", "foreign_language", "user", lang)]
