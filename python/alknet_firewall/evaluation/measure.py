"""What a compiled detector does: disguises, long documents, speed.

The texts are composed of the phrases of `alknet_firewall.authored` with a seed of their own, and
none is among those the package ships for calibration. They are made of the same phrases, though, so
that how many attacks are caught plain says little: every figure here is a comparison of a text with
itself, plain and disguised, short and long.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median
from typing import Any

from ..alarm import Alarm, Origin
from ..authored import Row, calibration_rows, generate
from ..authored.dice import Dice
from ..firewall import Firewall
from .transforms import TRANSFORMS

__all__ = [
    "MeasureOptions",
    "Pair",
    "measure_buried",
    "measure_detector",
    "measure_evasion",
    "measure_long",
    "measure_speed",
]

Progress = Callable[[str, int, int | None], None]

# Groups of the authored text.
_TYPED_ATTACKS = ["overrides", "personas", "extraction", "influence"]
_HARMLESS = ["requests", "chatter", "asides", "orders_to_people"]
_INJECTED = [
    "slipped_orders",
    "mail_injections",
    "web_injections",
    "public_injections",
    "office_injections",
]
_FILLER = ["documents", "prose"]

# In characters, the longest text to disguise (many disguises make it several times as long), the
# longest document to bury, and the longest of those it is buried among.
_MAX_DISGUISED, _MAX_BURIED, _MAX_FILLER = 300, 1500, 2500

# Screens of which a time is the median, and those before them that do not count.
_REPEATS, _WARM_UP = 7, 2


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How much is measured; the defaults take a few minutes on two cores.

    Attributes
    ----------
    seed : int
        Of the texts; another one than that of the shipped calibration text.
    attacks : int
        Attacks caught plain that are disguised.
    harmless : int
        Harmless texts that are disguised the same way.
    long_documents : dict
        Number of documents for each length in tokens.
    speeds : tuple of int
        Lengths in tokens to time.
    """

    seed: int = 20_270_611
    attacks: int = 30
    harmless: int = 20
    long_documents: dict[int, int] = field(
        default_factory=lambda: {2_000: 24, 6_000: 12, 20_000: 5}
    )
    speeds: tuple[int, ...] = (16, 128, 512, 1024)


def measure_detector(
    firewall: Firewall, options: MeasureOptions | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Everything that is measured on a compiled detector.

    Returns
    -------
    dict
        ``seed`` and ``engine``; ``evasion``, ``long_documents`` and ``speed`` as described at
        `measure_evasion`, `measure_long` and `measure_speed`.
    """
    options = options or MeasureOptions()
    report = progress or (lambda stage, done, total: None)
    return {
        "seed": options.seed,
        "engine": firewall.engine,
        "speed": measure_speed(firewall, options),
        "evasion": measure_evasion(firewall, options, progress=report),
        "long_documents": measure_long(firewall, options, progress=report),
    }


def measure_evasion(
    firewall: Firewall, options: MeasureOptions, *, progress: Progress
) -> dict[str, Any]:
    """How many attacks that are caught plain pass when they are disguised.

    Returns
    -------
    dict
        ``screened``, ``caught`` (attacks screened plain, and how many of them were SUSPICIOUS or
        worse; these are disguised), ``harmless`` (harmless texts disguised), and
        ``transformations``: for each ``passed`` (share of the caught attacks that are CLEAR in this
        disguise) and ``false_alarms`` (share of the harmless texts that are SUSPICIOUS or worse in
        it). ``mean_passed`` and ``mean_false_alarms`` are the means of these. Shares of nothing are
        None.
    """
    screened, caught = _caught_plain(firewall, options)
    harmless = _texts(options.seed, 4 * options.harmless, _HARMLESS, _MAX_DISGUISED)
    harmless = _interleaved(harmless)[: options.harmless]
    shares = {}
    for done, (name, transform) in enumerate(TRANSFORMS.items(), 1):
        alarms = _alarms(firewall, caught, transform)
        shares[name] = {
            "passed": _share([not alarm for alarm in alarms]),
            "false_alarms": _share([bool(a) for a in _alarms(firewall, harmless, transform)]),
        }
        progress("disguises", done, len(TRANSFORMS))
    return {
        "screened": screened,
        "caught": len(caught),
        "harmless": len(harmless),
        "mean_passed": _mean([own["passed"] for own in shares.values()]),
        "mean_false_alarms": _mean([own["false_alarms"] for own in shares.values()]),
        "transformations": shares,
    }


def measure_long(
    firewall: Firewall, options: MeasureOptions, *, progress: Progress
) -> dict[str, Any]:
    """How many injections that are caught in a short document are caught in a long one.

    A long document is a short one with an injection, at a random place among others without; its
    twin is the same without the injection.

    Returns
    -------
    dict
        ``screened``, ``caught`` (short documents with an injection, and how many of them were
        SUSPICIOUS or worse), ``located`` (share of the caught with a span that overlaps the
        injection), ``lengths``: a list of dicts with ``tokens`` (wanted), ``mean_tokens`` (had),
        ``documents`` (number; all of them caught when short), ``caught`` (share still caught),
        ``located`` (share of those with a span that overlaps the injection) and ``false_alarms``
        (share of their twins that are SUSPICIOUS or worse). Shares of nothing are None.
    """
    pairs = _pairs(options.seed, 12 * max(options.long_documents.values()))
    filler = [row["text"] for row in _texts(options.seed, 400, _FILLER, _MAX_FILLER)]
    alarms = [firewall.screen_document(pair.injected) for pair in pairs]
    caught = [pair for pair, alarm in zip(pairs, alarms, strict=True) if alarm]
    located = [pair.is_located(alarm) for pair, alarm in zip(pairs, alarms, strict=True) if alarm]
    # Characters per token, of documents like those to come.
    density = sum(len(p.injected) for p in pairs) / max(sum(a.n_tokens for a in alarms), 1)
    lengths = []
    for done, (tokens, number) in enumerate(options.long_documents.items(), 1):
        dice = Dice(f"{options.seed}/{tokens}")
        long = [
            pair.buried(filler, int(tokens * density), dice)
            for pair in islice(cycle(caught), number)
        ]
        lengths.append({"tokens": tokens} | measure_buried(firewall, long))
        progress("long documents", done, len(options.long_documents))
    return {
        "screened": len(pairs),
        "caught": len(caught),
        "located": _share(located),
        "lengths": lengths,
    }


def _caught_plain(firewall: Firewall, options: MeasureOptions) -> tuple[int, list[Row]]:
    """How many attacks were screened, and those caught, as many as are wanted."""
    candidates = _texts(options.seed, 6 * options.attacks, _TYPED_ATTACKS, _MAX_DISGUISED)
    caught: list[Row] = []
    screened = 0
    for row in _interleaved(candidates):
        if len(caught) == options.attacks:
            break
        screened += 1
        if firewall.screen(row["text"], origin=row["origin"]):
            caught.append(row)
    return screened, caught


def measure_buried(firewall: Firewall, long: Sequence[Pair]) -> dict[str, Any]:
    """What is caught of documents with an injection, as in ``lengths`` of `measure_long`."""
    found = [firewall.screen_document(pair.injected) for pair in long]
    clean = [firewall.screen_document(pair.clean) for pair in long]
    overlaps = [p.is_located(a) for p, a in zip(long, found, strict=True) if a]
    return {
        "mean_tokens": sum(a.n_tokens for a in found) / len(found) if found else None,
        "documents": len(long),
        "caught": _share([bool(alarm) for alarm in found]),
        "located": _share(overlaps),
        "false_alarms": _share([bool(alarm) for alarm in clean]),
    }


def measure_speed(firewall: Firewall, options: MeasureOptions) -> list[dict[str, float]]:
    """Time of one screen, one text at a time.

    Returns
    -------
    list of dict
        For each length ``tokens`` (that the text had), ``median_ms`` and ``best_ms``.
    """
    words = " ".join(row["text"] for row in _texts(options.seed, 60, _FILLER, _MAX_FILLER)).split()
    rows = []
    for tokens in options.speeds:
        text, actual = _of_length(firewall, words, tokens)
        times = []
        for _ in range(_WARM_UP + _REPEATS):
            start = time.perf_counter()
            firewall.screen_document(text)
            times.append((time.perf_counter() - start) * 1e3)
        counted = times[_WARM_UP:]
        rows.append({"tokens": actual, "median_ms": median(counted), "best_ms": min(counted)})
    return rows


@dataclass(frozen=True, slots=True)
class Pair:
    """A document without and with an injection, which is ``injected[start:end]``."""

    clean: str
    injected: str
    start: int
    end: int

    @classmethod
    def of(cls, clean: str, injected: str) -> Pair:
        """Finds the injection: what is left between the beginning and the end they share."""
        start = _common(clean, injected)
        rest = min(len(clean), len(injected)) - start
        end = len(injected) - min(_common(clean[::-1], injected[::-1]), rest)
        return cls(clean, injected, start, end)

    def is_located(self, alarm: Alarm) -> bool:
        """Whether a span of the alarm on the injected document overlaps the injection."""
        return any(span.start < self.end and span.end > self.start for span in alarm.spans)

    def buried(self, filler: Sequence[str], length: int, dice: Dice) -> Pair:
        """The pair among other documents, about ``length`` characters in all."""
        before: list[str] = []
        after: list[str] = []
        place = dice.between(0, 100) / 100
        missing = length - len(self.injected)
        while missing > 0:
            text = dice.pick(filler)
            (before if dice.chance(place) else after).append(text)
            missing -= len(text) + 2
        head = "".join(f"{text}\n\n" for text in before)
        tail = "".join(f"\n\n{text}" for text in after)
        return Pair(
            f"{head}{self.clean}{tail}",
            f"{head}{self.injected}{tail}",
            len(head) + self.start,
            len(head) + self.end,
        )


def _common(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def _texts(seed: int, rows: int, parts: list[str], longest: int) -> list[Row]:
    """Texts of some groups that are not among the shipped ones, none of them long."""
    shipped = {row["text"] for row in calibration_rows()}
    drawn = generate(seed, rows, parts)
    return [row for row in drawn if len(row["text"]) <= longest and row["text"] not in shipped]


def _pairs(seed: int, rows: int) -> list[Pair]:
    clean = {}
    pairs = []
    for row in _interleaved(_texts(seed, rows, _INJECTED, _MAX_BURIED)):
        if not row["label"]:
            clean[row["pair"]] = row["text"]
        elif row["pair"] in clean:
            pairs.append(Pair.of(clean[row["pair"]], row["text"]))
    return pairs


def _interleaved(rows: Iterable[Row]) -> list[Row]:
    """One row of every source in turn, so that the first few hold something of all."""
    rank: dict[str, int] = {}
    ranked = []
    for row in rows:
        rank[row["source"]] = rank.get(row["source"], -1) + 1
        ranked.append((rank[row["source"]], row))
    return [row for _, row in sorted(ranked, key=lambda item: item[0])]


def _alarms(
    firewall: Firewall, rows: Sequence[Row], transform: Callable[[str], str]
) -> list[Alarm]:
    origins: list[Origin | None] = [row["origin"] for row in rows]
    return firewall.screen_batch([transform(row["text"]) for row in rows], origin=origins)


def _of_length(firewall: Firewall, words: Sequence[str], tokens: int) -> tuple[str, int]:
    """The shortest text of the first words that has so many tokens, and how many it has."""

    def text_of(number: int) -> str:
        return " ".join(islice(cycle(words), number))

    def tokens_of(number: int) -> int:
        return firewall.screen_document(text_of(number)).n_tokens

    # A word has a token at least, so that the text is among these.
    number = 1 + bisect_left(range(1, tokens), tokens, key=tokens_of)
    return text_of(number), tokens_of(number)


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _mean(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None
