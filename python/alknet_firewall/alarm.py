"""Verdicts: what a firewall says about a text, without the text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from html import escape
from typing import Any, Literal
from unicodedata import category

__all__ = ["Alarm", "AlarmLevel", "Origin", "Signal", "Span", "Thresholds"]

Origin = Literal["user", "document"]


class AlarmLevel(IntEnum):
    """How alarming a text is; ordered, so that ``level >= AlarmLevel.SUSPICIOUS`` works."""

    CLEAR = 0
    SUSPICIOUS = 1
    DANGEROUS = 2


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Scores at which the level rises: ``0 < suspicious <= dangerous <= 1``.

    The score is a fixed map of the p-value, so the defaults are a promise about benign text like
    the calibration text: at most 1 % of it is SUSPICIOUS or worse, at most 0.1 % DANGEROUS.
    """

    suspicious: float = 0.3
    dangerous: float = 0.7


@dataclass(frozen=True, slots=True)
class Signal:
    """A behaviour that fired, with its probability in [0, 1] where it is strongest."""

    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Span:
    """Characters that an alarm fired on: ``text[start:end]``, with a score in [0, 1]."""

    start: int
    end: int
    score: float
    signal: str


# What a gateway's log should say about a behaviour, after "it".
_BEHAVIOURS = {
    "attack": "reads like an attack on the model",
    "foreign_attack": "reads like an attack on the model in another language than English",
    "instruction_override": "tries to replace the model's instructions",
    "embedded_instruction": "gives the model an order from inside a document",
    "jailbreak": "tries to talk the model out of its rules",
    "extraction": "tries to get hidden instructions or secrets out",
    "hidden_text": "hides text in characters that people do not see",
    "novelty": "is unlike any text the detector was calibrated with",
}


@dataclass(frozen=True, slots=True)
class Alarm:
    """The verdict on one text.

    Attributes
    ----------
    level : AlarmLevel
        CLEAR, SUSPICIOUS or DANGEROUS.
    score : float
        In [0, 1], higher is worse; a fixed monotone map of ``p_value``.
    p_value : float
        Share of benign text that scores at least as high, in (0, 1]; 0 if there is no verdict.
    novelty_p_value : float
        Share of benign text that is at least as far from everything seen. Novelty alone never
        raises DANGEROUS.
    signals : tuple of Signal
        Behaviours that fired, most probable first; empty when CLEAR.
    spans : tuple of Span
        The characters they fired on, in order; empty when CLEAR.
    origin : "user", "document" or None
        The origin given.
    n_tokens : int
        Tokens of the text.
    unread_chars : int
        Characters at the end that were not read; if any, the level is at least SUSPICIOUS.
    reason : str or None
        Why the verdict is not simply that of the score, such as ``"the text is empty"``.
    detector : str
        Name of the detector that judged.
    """

    level: AlarmLevel
    score: float
    p_value: float
    novelty_p_value: float
    signals: tuple[Signal, ...]
    spans: tuple[Span, ...]
    origin: Origin | None
    n_tokens: int
    unread_chars: int
    reason: str | None
    detector: str

    @classmethod
    def _from_core(cls, fields: tuple[Any, ...], detector: str) -> Alarm:
        level, score, p_value, novelty, signals, spans, origin, n_tokens, unread, reason = fields
        return cls(
            level=AlarmLevel(level),
            score=score,
            p_value=p_value,
            novelty_p_value=novelty,
            signals=tuple(Signal(*signal) for signal in signals),
            spans=tuple(Span(*span) for span in spans),
            origin=origin,
            n_tokens=n_tokens,
            unread_chars=unread,
            reason=reason,
            detector=detector,
        )

    @classmethod
    def _blocked(
        cls, error: Exception, detector: str, unread_chars: int, origin: Origin | None
    ) -> Alarm:
        """The alarm that stands for an error when the caller asked for ``on_error="block"``."""
        return cls(
            level=AlarmLevel.DANGEROUS,
            score=1.0,
            p_value=0.0,
            novelty_p_value=1.0,
            signals=(),
            spans=(),
            origin=origin,
            n_tokens=0,
            unread_chars=unread_chars,
            reason=f"not screened: {type(error).__name__}: {error}",
            detector=detector,
        )

    def _at_least(self, level: AlarmLevel, reason: str) -> Alarm:
        reasons = "; ".join(filter(None, (self.reason, reason)))
        return replace(self, level=max(self.level, level), reason=reasons)

    def __bool__(self) -> bool:
        """Whether there is anything to worry about: true unless the level is CLEAR."""
        return self.level is not AlarmLevel.CLEAR

    def __str__(self) -> str:
        text = f"{self.level.name} (score {self.score:.2f}, p = {self.p_value:.2g})"
        if self.signals:
            text += ": " + ", ".join(f"{s.name} {s.probability:.0%}" for s in self.signals)
        return f"{text} [{self.reason}]" if self.reason else text

    def explain(self) -> str:
        """The verdict in at most two sentences for people, without the text."""
        if self.p_value <= 0 or not self.n_tokens:
            return f"{self.level.name}: {self.reason}."
        one_in = max(1, round(1 / self.p_value))
        rarity = f"about one benign text in {one_in:,} scores as high" if one_in > 1 else "ordinary"
        first = f"{self.level.name}: {rarity}."
        if self.level is AlarmLevel.CLEAR:
            return first
        name = self.spans[0].signal if self.spans else None
        if self.spans:
            name = max(self.spans, key=lambda span: span.score).signal
        elif self.signals:
            name = self.signals[0].name
        what = _BEHAVIOURS.get(name or "", f"shows {name}") if name else "was judged by its limits"
        where = ""
        if self.spans:
            worst = max(self.spans, key=lambda span: span.score)
            where = f", most clearly in characters {worst.start} to {worst.end}"
        why = f" ({self.reason})" if self.reason else ""
        return f"{first} It {what}{where}{why}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the level by its name."""
        return asdict(self) | {"level": self.level.name}

    def to_json(self, **options: Any) -> str:
        """JSON of `to_dict`; options go to `json.dumps`."""
        return json.dumps(self.to_dict(), **options)

    def highlight(self, text: str) -> str:
        """The screened text with its spans in reverse video, for a terminal.

        Control characters of the text, with which it could move the cursor or hide what it says,
        are shown as a replacement character.
        """
        parts, end = [], 0
        for span in self.spans:
            marked = printable(text[span.start : span.end])
            parts += [printable(text[end : span.start]), "\x1b[7m", marked, "\x1b[0m"]
            end = span.end
        return "".join([*parts, printable(text[end:])])

    def _repr_html_(self) -> str:
        colour = ("#2e7d32", "#b26a00", "#b71c1c")[self.level]
        rows = "".join(
            f"<tr><td>{escape(s.signal)}</td><td>{s.start}–{s.end}</td><td>{s.score:.2f}</td></tr>"
            for s in self.spans
        )
        why = f" ({escape(self.reason)})" if self.reason else ""
        return (
            f'<div><b style="color:{colour}">{self.level.name}</b> score {self.score:.2f}, '
            f"p = {self.p_value:.2g}{why}<table>{rows}</table></div>"
        )


def printable(text: str) -> str:
    """The text with everything replaced that a terminal would obey instead of showing it."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if category(c).startswith("C") and c not in "\n\t" else c
        for c in text
    )
