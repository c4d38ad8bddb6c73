"""Alarms as values: ordered, frozen, ready for JSON, and readable without the text."""

from __future__ import annotations

import dataclasses
import json

import pytest
from alknet_firewall import Alarm, AlarmLevel, Signal, Span, Thresholds
from alknet_firewall.alarm import printable

CLEAR = Alarm(
    level=AlarmLevel.CLEAR,
    score=0.0,
    p_value=1.0,
    novelty_p_value=0.8,
    signals=(),
    spans=(),
    origin="user",
    n_tokens=9,
    unread_chars=0,
    reason=None,
    detector="tiny",
)
DANGEROUS = dataclasses.replace(
    CLEAR,
    level=AlarmLevel.DANGEROUS,
    score=0.85,
    p_value=0.00025,
    signals=(Signal("jailbreak", 0.97), Signal("extraction", 0.6)),
    spans=(Span(4, 9, 0.4, "extraction"), Span(12, 20, 0.85, "jailbreak")),
)
EMPTY = dataclasses.replace(CLEAR, n_tokens=0, reason="the text is empty")


def sentences(text: str) -> int:
    return text.count(". ") + text.endswith(".")


def test_levels_are_ordered():
    assert AlarmLevel.CLEAR < AlarmLevel.SUSPICIOUS < AlarmLevel.DANGEROUS
    assert max(AlarmLevel.CLEAR, AlarmLevel.DANGEROUS) is AlarmLevel.DANGEROUS
    assert [level.name for level in sorted(AlarmLevel)] == ["CLEAR", "SUSPICIOUS", "DANGEROUS"]


@pytest.mark.parametrize("value", [CLEAR, Signal("a", 0.5), Span(0, 1, 0.5, "a"), Thresholds()])
def test_values_are_frozen_and_hashable(value):
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, getattr(value, field))
    assert len({value, dataclasses.replace(value)}) == 1


def test_an_alarm_is_true_unless_it_is_clear():
    assert not CLEAR
    assert DANGEROUS
    assert dataclasses.replace(CLEAR, level=AlarmLevel.SUSPICIOUS)


def test_to_dict_holds_every_field_as_plain_values():
    values = DANGEROUS.to_dict()
    assert values.keys() == {field.name for field in dataclasses.fields(Alarm)}
    assert values["level"] == "DANGEROUS"
    assert values["signals"][0] == {"name": "jailbreak", "probability": 0.97}
    assert values["spans"][1] == {"start": 12, "end": 20, "score": 0.85, "signal": "jailbreak"}


def test_to_json_is_to_dict():
    values = DANGEROUS.to_dict()
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    assert json.loads(DANGEROUS.to_json()) == plain
    assert DANGEROUS.to_json(indent=1).startswith("{\n")


def test_repr_evaluates_to_the_alarm():
    names = {"Alarm": Alarm, "AlarmLevel": AlarmLevel, "Signal": Signal, "Span": Span}
    text = repr(DANGEROUS).replace("<AlarmLevel.DANGEROUS: 2>", "AlarmLevel.DANGEROUS")
    assert eval(text, names) == DANGEROUS


def test_str_names_level_score_and_signals():
    assert str(DANGEROUS) == "DANGEROUS (score 0.85, p = 0.00025): jailbreak 97%, extraction 60%"
    assert str(EMPTY) == "CLEAR (score 0.00, p = 1) [the text is empty]"


class TestExplain:
    def test_a_dangerous_text(self):
        text = DANGEROUS.explain()
        assert text.startswith("DANGEROUS: about one benign text in 4,000 scores as high.")
        assert "tries to talk the model out of its rules" in text
        assert "characters 12 to 20" in text

    def test_an_ordinary_text(self):
        assert CLEAR.explain() == "CLEAR: ordinary."

    def test_an_empty_text(self):
        assert EMPTY.explain() == "CLEAR: the text is empty."

    def test_a_limit(self):
        reason = "the text is longer than max_tokens and was not read to its end"
        level = AlarmLevel.SUSPICIOUS
        text = dataclasses.replace(CLEAR, level=level, reason=reason, unread_chars=7).explain()
        assert text.startswith("SUSPICIOUS")
        assert reason in text

    @pytest.mark.parametrize("signal", ["attack", "hidden_text", "novelty", "of_their_own"])
    def test_every_signal_gives_at_most_two_sentences(self, signal):
        span = Span(0, 3, 0.9, signal)
        alarm = dataclasses.replace(DANGEROUS, signals=(Signal(signal, 0.9),), spans=(span,))
        assert 1 <= sentences(alarm.explain()) <= 2

    def test_a_signal_without_spans(self):
        assert "model out of its rules" in dataclasses.replace(DANGEROUS, spans=()).explain()


class TestDisplay:
    TEXT = "see also <b>rules</b> here"

    def test_highlight_marks_the_spans_and_keeps_the_text(self):
        shown = DANGEROUS.highlight(self.TEXT)
        assert shown.count("\x1b[7m") == shown.count("\x1b[0m") == 2
        assert f"\x1b[7m{self.TEXT[12:20]}\x1b[0m" in shown
        assert shown.replace("\x1b[7m", "").replace("\x1b[0m", "") == self.TEXT

    def test_a_hostile_text_cannot_steer_the_terminal(self):
        hostile = "a\x1b[2Jb\x9b31mc\rd\x07e\u202ef\x00"
        assert DANGEROUS.highlight(hostile).replace("\x1b[7m", "").replace("\x1b[0m", "") == (
            "a\ufffd[2Jb\ufffd31mc\ufffdd\ufffde\ufffdf\ufffd"
        )

    def test_printable_keeps_what_only_prints(self):
        text = "Größe:\t3\u00a0m\n你好 שלום 👍"
        assert printable(text) == text

    def test_html_escapes_names(self):
        span = Span(0, 3, 0.5, "<script>")
        html = dataclasses.replace(DANGEROUS, spans=(span,), reason="unread < all")._repr_html_()
        assert "<script>" not in html
        assert "DANGEROUS" in html
        assert "unread &lt; all" in html
