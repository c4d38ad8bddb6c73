"""Documents with places where something can be slipped in, and the slipping in.

A carrier is a kind of document (``data/carriers``). Its text holds ``{here}`` wherever a stranger's
sentence could stand: on a line of its own, or at the end of a sentence. The same document with and
without the insertion makes a pair.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain

from .dice import Dice
from .grammar import Grammar, bind

__all__ = ["CARRIERS", "Carrier", "Document", "write"]

# A private-use character, which no phrase file contains.
_HERE = "\ue000"

# How many paragraphs a body has: mostly few, now and then some 1500 tokens.
_BODY_LENGTHS = {1: 4.0, 2: 4.0, 3: 4.0, 5: 4.0, 9: 2.5, 16: 1.2, 26: 0.6}

# How many documents of a kind stand one after the other, as in an inbox or a list of hits.
_BUNDLE_SIZES = {1: 16.0, 2: 3.0, 4: 1.5, 9: 0.7}

# How many documents are long, some 1,000 to 4,000 tokens, and how many characters these have at
# least. Not words: a line of a log has few of them and many tokens.
_LONG_SHARE = 0.12
_LONG_CHARACTERS = (3_000, 12_000)

# How the chapters of a long body are headed.
_HEADINGS = ["{number}. {title}", "## {title}", "{title}"]


@dataclass(frozen=True)
class Carrier:
    """A kind of document.

    Attributes
    ----------
    name : str
        Section ``carrier.<name>``.
    wrapper : str
        Section ``wrap.<wrapper>``: how an insertion on a line of its own is dressed.
    one_line : bool
        Insertions may not contain line breaks.
    quoted : bool
        Insertions stand inside JSON-like strings and are escaped for them.
    """

    name: str
    wrapper: str = "plain"
    one_line: bool = False
    quoted: bool = False


CARRIERS: dict[str, Carrier] = {
    carrier.name: carrier
    for carrier in (
        Carrier("email"),
        Carrier("thread"),
        Carrier("newsletter", "markup"),
        Carrier("calendar", one_line=True),
        Carrier("chat", "chat", one_line=True),
        Carrier("html", "html"),
        Carrier("page", "markup"),
        Carrier("shop", "markup"),
        Carrier("review"),
        Carrier("forum"),
        Carrier("search"),
        Carrier("listing"),
        Carrier("social"),
        Carrier("subtitle", one_line=True),
        Carrier("issue", "markup"),
        Carrier("python", "hash", one_line=True),
        Carrier("csource", "slash", one_line=True),
        Carrier("log", "log", one_line=True),
        Carrier("csv", one_line=True, quoted=True),
        Carrier("json", quoted=True),
        Carrier("yaml", quoted=True),
        Carrier("readme", "markup"),
        Carrier("config", "hash", one_line=True),
        Carrier("resume"),
        Carrier("minutes"),
        Carrier("ticket"),
        Carrier("invoice"),
        Carrier("contract"),
        Carrier("pdf"),
        Carrier("medical"),
        Carrier("sql", one_line=True),
        Carrier("slides", "bullet", one_line=True),
        Carrier("rss", "html"),
        Carrier("prose"),
        Carrier("recipe"),
        Carrier("manual", "bullet", one_line=True),
        Carrier("todo", "bullet", one_line=True),
        Carrier("exam"),
        Carrier("notice"),
    )
}


@dataclass(frozen=True)
class Document:
    """A document that still has its open places."""

    carrier: Carrier
    marked: str

    @property
    def places(self) -> int:
        """How many insertions it has room for."""
        return self.marked.count(_HERE)

    def place(self, texts: list[str], grammar: Grammar, dice: Dice) -> dict[int, str]:
        """Gives each text a place of its own, in the order given, and dresses it for that place.

        Where there are fewer places than texts, the texts are joined.
        """
        if self.places < len(texts):
            texts = [" ".join(texts)]
        alone = self._places_alone()
        placed = {}
        for place, text in zip(self._choose(len(texts), dice), texts, strict=True):
            placed[place] = self._fit(text)
            if place in alone:
                scope = bind(payload=placed[place])
                placed[place] = grammar.draw(f"wrap.{self.carrier.wrapper}", dice, scope)
        return placed

    def fill(self, fillings: dict[int, str]) -> str:
        """The document with these texts in its places and all other places closed."""
        place, lines = 0, list[str]()
        for line in self.marked.split("\n"):
            if line.strip() == _HERE:
                if place in fillings:
                    lines.append(line.replace(_HERE, fillings[place]))
                place += 1
                continue
            filled, *rest = line.split(_HERE)
            for piece in rest:
                filled += f" {fillings[place]}{piece}" if place in fillings else piece
                place += 1
            lines.append(filled)
        return _tidy("\n".join(lines))

    def _choose(self, count: int, dice: Dice) -> list[int]:
        return sorted(dice.sample(range(self.places), count))

    def _places_alone(self) -> set[int]:
        """Numbers of the places that stand on a line of their own."""
        place, alone = 0, set[int]()
        for line in self.marked.split("\n"):
            if line.strip() == _HERE:
                alone.add(place)
            place += line.count(_HERE)
        return alone

    def _fit(self, text: str) -> str:
        """`text` as it may stand in this carrier."""
        if self.carrier.one_line:
            text = " ".join(text.split())
        return json.dumps(text, ensure_ascii=False)[1:-1] if self.carrier.quoted else text


def write(carrier: Carrier, grammar: Grammar, dice: Dice) -> Document:
    """A new document of the given kind, or several of them in one, as in an inbox."""
    if dice.chance(_LONG_SHARE):
        return Document(carrier, _long(carrier, grammar, dice))
    section = f"carrier.{carrier.name}"
    count = dice.weighted(_BUNDLE_SIZES)
    return Document(carrier, "\n\n".join(_short(section, grammar, dice) for _ in range(count)))


def _long(carrier: Carrier, grammar: Grammar, dice: Dice) -> str:
    """Pages of one kind of document: a form of its own if it has one, else as many as it takes."""
    section = f"long.{carrier.name}"
    if not grammar.names(section):
        section = f"carrier.{carrier.name}"
    wanted, text = dice.between(*_LONG_CHARACTERS), ""
    while len(text) < wanted:
        topics = _topics(24, grammar, dice)
        body = _chapters(dict(list(topics.items())[: dice.between(3, 7)]), dice)
        text += "\n\n" + _fill(section, body, topics, grammar, dice)
    return text


def _short(section: str, grammar: Grammar, dice: Dice) -> str:
    """One document on a topic drawn at random, its places open."""
    topics = _topics(8, grammar, dice)
    paragraphs = list(chain.from_iterable(topics.values()))
    body = _with_places(paragraphs[: dice.weighted(_BODY_LENGTHS)])
    return _fill(section, body, topics, grammar, dice)


def _topics(count: int, grammar: Grammar, dice: Dice) -> dict[str, list[str]]:
    """Titles, each with paragraphs on its topic."""
    return {
        grammar.draw(topic.replace("topic.", "title."), dice): list(
            dict.fromkeys(grammar.draw_several(topic, dice.between(3, 5), dice, bind()))
        )
        for topic in dice.sample(grammar.names("topic."), count)
    }


def _chapters(topics: dict[str, list[str]], dice: Dice) -> str:
    """A body with a chapter on each topic."""
    heading = dice.pick(_HEADINGS)
    return "\n\n".join(
        heading.format(number=number, title=title) + "\n\n" + _with_places(paragraphs)
        for number, (title, paragraphs) in enumerate(topics.items(), 1)
    )


def _with_places(paragraphs: list[str]) -> str:
    """Paragraphs with a place at the end of each and one below it."""
    return "".join(f"{text}{_HERE}\n\n{_HERE}\n\n" for text in paragraphs).rstrip()


def _fill(
    section: str, body: str, topics: dict[str, list[str]], grammar: Grammar, dice: Dice
) -> str:
    """A document of a section, its places open."""
    scope = bind(
        here=_HERE,
        title=next(iter(topics)),
        body=body,
        # From the other end than the body, so that no paragraph stands in both.
        para=list(chain.from_iterable(topics.values()))[::-1],
    )
    return grammar.draw(section, dice, scope)


def _tidy(text: str) -> str:
    """No blank margins, and at most one blank line in a row."""
    text = "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text
