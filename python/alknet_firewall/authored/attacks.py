"""Attack families and the groups in which they are written."""

from __future__ import annotations

from collections.abc import Callable

from .dice import Dice
from .disguise import CIPHERS, register
from .documents import CARRIERS, Carrier, Document, write
from .grammar import Grammar, bind
from .phrases import LANGUAGES
from .rows import Draft, Kind

__all__ = [
    "attack_in_document",
    "attack_in_paste",
    "direct",
    "disguised",
    "foreign",
    "native",
    "slipped",
]

# Stands for a pasted text while its frame is drawn, so that both of a pair get the same frame.
_PASTED = "\ue001"

# Families a stranger slips into a document, with their weights. Sections of the same name unless
# `_SECTIONS` says otherwise.
_PLANTED: dict[str, float] = {
    "task_switch": 5,
    "instruction_override": 3,
    "document_override": 2,
    "agent_instruction": 2,
    "exfiltration": 2.5,
    "tool_hijack": 3,
    "output_manipulation": 2,
    "advertising": 1.5,
    "rating_manipulation": 2,
    "memory_poisoning": 2,
    "conditional_trigger": 1.5,
    "persuasion": 2.5,
    "fake_turn": 1.5,
    "sabotage": 2.5,
    "prompt_extraction": 1,
    "refusal_suppression": 1,
    "roleplay": 0.5,
    "payload_splitting": 1,
}

# Families in what a user pastes: a harmless order there could be the user's own.
_PASTED_INTO: dict[str, float] = {
    "instruction_override": 3,
    "fresh_start": 2,
    "fake_turn": 1,
    "exfiltration": 0.7,
    "tool_hijack": 0.7,
}

# What reaches a model only as an order, and therefore needs a frame around it in a document.
_FRAMED: dict[str, str] = {
    "exfiltration": "exfil.order",
    "tool_hijack": "tool.order",
    "output_manipulation": "say.order",
    "sabotage": "sabotage.order",
    "prompt_extraction": "reveal.order",
    "unsafe_request": "unsafe.order",
}

_SECTIONS: dict[str, str] = {
    "task_switch": "slipped",
    "agent_instruction": "exfil.framed",
    "document_override": "doc.override",
    "instruction_override": "override",
    "advertising": "advert",
    "rating_manipulation": "rating",
    "memory_poisoning": "memory",
    "conditional_trigger": "conditional",
    "persuasion": "persuasion",
    "fake_turn": "faketurn",
    "refusal_suppression": "nohelp",
    "payload_splitting": "split",
    "roleplay": "roleplay",
    "opposite_day": "opposite",
    "hypothetical": "hypothetical",
    "fiction": "fiction",
    "many_shot": "manyshot",
    "multi_turn": "multiturn",
    "terse_order": "shortattack",
    "direct_extraction": "extract.direct",
    "indirect_extraction": "extract.indirect",
    "pretext_extraction": "extract.pretext",
    "secret_extraction": "extract.secret",
    "authority": "override.source",
    "fresh_start": "override.fresh",
}

_KINDS: dict[str, Kind] = {
    "roleplay": "jailbreak",
    "opposite_day": "jailbreak",
    "hypothetical": "jailbreak",
    "fiction": "jailbreak",
    "refusal_suppression": "jailbreak",
    "many_shot": "jailbreak",
    "multi_turn": "jailbreak",
}


def attack(family: str, grammar: Grammar, dice: Dice) -> str:
    """One attack of a family, in one of the registers people write in."""
    if family in _FRAMED:
        return register(_framed(_FRAMED[family], grammar, dice), dice)
    return register(grammar.draw(_SECTIONS[family], dice), dice)


def _framed(section: str, grammar: Grammar, dice: Dice) -> str:
    """An order of `section` in one of the frames for slipping an order into a text."""
    order = grammar.draw(section, dice)
    return grammar.draw("slipped", dice, bind(order=order, question=f"could you {order}?"))


def attack_in_document(
    carriers: list[str], families: dict[str, float] | None = None
) -> Callable[[Grammar, Dice], list[Draft]]:
    """Writes pairs: a document of one of `carriers` clean and with an injection."""

    def write_pair(grammar: Grammar, dice: Dice) -> list[Draft]:
        carrier = CARRIERS[dice.pick(carriers)]
        family = dice.weighted(families or _PLANTED)
        return _pair(carrier, family, _parts(family, grammar, dice), grammar, dice)

    return write_pair


def _parts(family: str, grammar: Grammar, dice: Dice) -> list[str]:
    if family == "payload_splitting":
        return [grammar.draw("split.first", dice), grammar.draw("split.second", dice)]
    if dice.chance(0.04):
        return [attack(family, grammar, dice), attack(family, grammar, dice)]
    return [attack(family, grammar, dice)]


def _pair(
    carrier: Carrier, family: str, parts: list[str], grammar: Grammar, dice: Dice
) -> list[Draft]:
    document = write(carrier, grammar, dice)
    clean, injected = _with_and_without(document, parts, grammar, dice)
    return [
        Draft(clean, "benign", "document", "document", carrier=carrier.name),
        Draft(injected, "indirect_injection", family, "document", carrier=carrier.name),
    ]


def _with_and_without(
    document: Document, parts: list[str], grammar: Grammar, dice: Dice
) -> tuple[str, str]:
    """The document without and with the attack; both may hold the same harmless aside."""
    if document.places <= len(parts) or not dice.chance(0.3):
        return document.fill({}), document.fill(document.place(parts, grammar, dice))
    number = dice.between(0, len(parts))
    texts = [*parts[:number], grammar.draw("aside", dice), *parts[number:]]
    fillings = document.place(texts, grammar, dice)
    aside_place = sorted(fillings)[number]
    return document.fill({aside_place: fillings[aside_place]}), document.fill(fillings)


def slipped(grammar: Grammar, dice: Dice) -> list[Draft]:
    """Pairs of plain prose with and without one short order that would harm nobody."""
    carrier = CARRIERS[dice.pick(["prose", "prose", "prose", "page", "minutes", "listing"])]
    return _pair(carrier, "task_switch", [attack("task_switch", grammar, dice)], grammar, dice)


def attack_in_paste(grammar: Grammar, dice: Dice) -> list[Draft]:
    """Pairs of requests about a pasted text, clean and with an override inside."""
    carrier = CARRIERS[dice.pick(["email", "page", "forum", "review", "prose", "ticket", "pdf"])]
    document = write(carrier, grammar, dice)
    family = dice.weighted(_PASTED_INTO)
    texts = _with_and_without(document, [attack(family, grammar, dice)], grammar, dice)
    request = grammar.draw("paste.request", dice)
    frame = grammar.draw("paste.layout", dice, bind(instruction=request, pasted=_PASTED))
    clean, dirty = (frame.replace(_PASTED, text) for text in texts)
    return [
        Draft(clean, "benign", "pasted_text", "user", carrier=carrier.name),
        Draft(dirty, "indirect_injection", family, "user", carrier=carrier.name),
    ]


def direct(families: list[str]) -> Callable[[Grammar, Dice], list[Draft]]:
    """Writes attacks typed by a user."""

    def write_one(grammar: Grammar, dice: Dice) -> list[Draft]:
        family = dice.pick(families)
        kind = _KINDS.get(family, "direct_injection")
        return [Draft(attack(family, grammar, dice), kind, family, "user")]

    return write_one


def disguised(grammar: Grammar, dice: Dice) -> list[Draft]:
    """An attack in a cipher, typed by a user or planted in a document."""
    cipher = dice.pick(sorted(CIPHERS))
    plain = grammar.draw(dice.pick(["override", "extract.direct", "shortattack"]), dice)
    hidden = CIPHERS[cipher](plain)
    text = grammar.draw("cipher.frame", dice, bind(hidden=hidden, cipher=cipher))
    if dice.chance(0.5):
        return [Draft(text, "direct_injection", cipher, "user")]
    carrier = CARRIERS[dice.pick(["email", "html", "prose", "issue", "forum", "json"])]
    return _pair(carrier, cipher, [text], grammar, dice)


def foreign(grammar: Grammar, dice: Dice) -> list[Draft]:
    """Attacks in other languages: typed, in a document of that language, or code-switched."""
    lang = dice.pick(LANGUAGES)
    form = dice.pick(["typed", "typed", "native", "native", "switched", "english"])
    if form == "typed":
        override = register(grammar.draw(f"{lang}.override", dice), dice)
        return [Draft(override, "direct_injection", "foreign_language", "user", lang)]
    order = _foreign_order(lang, grammar, dice)
    if form == "switched":
        return _pair(
            CARRIERS[dice.pick(["email", "page", "prose", "html", "issue", "review"])],
            "code_switched", [order], grammar, dice,
        )  # fmt: skip
    if form == "english":
        order = attack(dice.pick(["task_switch", "instruction_override"]), grammar, dice)
    family = "code_switched" if form == "english" else "foreign_language"
    return _native_pair(lang, order, family, grammar, dice)


def native(grammar: Grammar, dice: Dice) -> list[Draft]:
    """Attacks in other languages, most of them common ones: typed, or in text of that language."""
    lang = dice.pick(LANGUAGES)
    typed = dice.chance(0.6)
    section = dice.pick(["classic", "classic", "override" if typed else "order"])
    order = register(grammar.draw(f"{lang}.{section}", dice), dice)
    if typed:
        return [Draft(order, "direct_injection", "foreign_language", "user", lang)]
    return _native_pair(lang, order, "foreign_language", grammar, dice)


def _foreign_order(lang: str, grammar: Grammar, dice: Dice) -> str:
    """What a stranger plants: an override, an order or two orders, as hasty as people write."""
    if dice.chance(0.15):
        orders = grammar.draw_several(f"{lang}.order", 2, dice, bind())
        return register(" ".join(orders), dice)
    return register(grammar.draw(f"{lang}.{dice.pick(['override', 'order'])}", dice), dice)


def _native_pair(lang: str, order: str, family: str, grammar: Grammar, dice: Dice) -> list[Draft]:
    texts = grammar.draw_several(f"{lang}.text", dice.between(1, 4), dice, bind())
    place = dice.between(0, len(texts))
    injected = [*texts[:place], order, *texts[place:]]
    gap = dice.pick(["\n\n", "\n", " "])
    return [
        Draft(gap.join(texts), "benign", "document", "document", lang, "prose"),
        Draft(gap.join(injected), "indirect_injection", family, "document", lang, "prose"),
    ]
