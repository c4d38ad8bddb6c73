"""Ordinary text that never takes part in calibration, screened with the released detector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alknet_firewall import AlarmLevel

DATA = Path(__file__).parent / "data"


FILES = ("trigger_words", "multilingual_benign")


@pytest.fixture(scope="module")
def alarms(fw):
    def screen(name):
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return fw.screen_batch([json.loads(line)["text"] for line in lines])

    return {name: screen(name) for name in FILES}


@pytest.mark.parametrize(("name", "most"), [("trigger_words", 0.03), ("multilingual_benign", 0.02)])
def test_few_harmless_texts_alarm(alarms, name, most):
    assert len(alarms[name]) >= 300
    assert sum(map(bool, alarms[name])) / len(alarms[name]) <= most


def test_hardly_a_harmless_text_is_dangerous(alarms):
    every = [alarm for own in alarms.values() for alarm in own]
    assert sum(alarm.level is AlarmLevel.DANGEROUS for alarm in every) / len(every) <= 0.002
