"""What the first stage of a codebook finds ordinary, and what it leaves to the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from alknet_firewall import AlarmLevel, ConfigError, Firewall, _core

EXAMPLES = Path(__file__).parents[1] / "examples"
ORDINARY = ("chinese.txt", "email.txt", "german.txt")
ATTACKS = ("email_hidden_instruction.txt", "jailbreak.txt", "report_with_injection.txt")

# Says that a text ended there: what goes on may have any p-value.
ABOVE = 0.5


@pytest.fixture(scope="module")
def early(real_folder) -> Firewall:
    return Firewall(real_folder, early_exit=True)


def read(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_text_is_clear(early, name):
    alarm = early.screen(read(name))
    assert alarm.level is AlarmLevel.CLEAR
    assert alarm.p_value > ABOVE


@pytest.mark.parametrize("name", ORDINARY)
def test_it_is_judged_by_the_first_stage(early, fw, name):
    assert early.screen(read(name)).p_value != fw.screen(read(name)).p_value


@pytest.mark.parametrize("origin", [None, "user", "document"])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_the_alarm_that_it_gets_without(early, fw, name, origin):
    text = read(name)
    assert early.screen(text, origin=origin) == fw.screen(text, origin=origin)


def test_texts_in_a_batch_and_in_a_stream_too(early):
    texts = [read(name) for name in (*ORDINARY, *ATTACKS)]
    alone = [early.screen(text) for text in texts]
    assert early.screen_batch(texts) == alone
    for text, alarm in zip(texts, alone, strict=True):
        stream = early.stream()
        for start in range(0, len(text), 500):
            stream.feed(text[start : start + 500])
        assert stream.finish() == alarm


def test_instruction_sets_and_threads_change_nothing(real_folder, early):
    texts = [read(name) for name in (*ORDINARY, *ATTACKS)]
    expected = early.screen_batch(texts)
    for isa in _core.build_info()["instruction sets"].split(", "):
        if isa != "scalar":  # Which is too slow for long texts.
            other = Firewall(real_folder, isa=isa, threads=1, early_exit=True)
            assert other.screen_batch(texts) == expected


def test_the_reference_engine_ends_there_as_well(real_folder, early):
    reference = Firewall(real_folder, engine="candle", early_exit=True)
    for name in ORDINARY:
        found, expected = reference.screen(read(name)), early.screen(read(name))
        assert found.level is AlarmLevel.CLEAR
        assert found.p_value == pytest.approx(expected.p_value, abs=0.1)


def test_a_codebook_without_a_first_stage(tiny_folder):
    with pytest.raises(ConfigError, match="early_exit: the codebook has no first stage"):
        Firewall(tiny_folder, early_exit=True)
