"""Ordinary text that never takes part in calibration, screened with the released detector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alknet_firewall import AlarmLevel

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(("name", "most"), [("trigger_words", 0.03), ("multilingual_benign", 0.02)])
def test_few_harmless_texts_alarm(fw, name, most):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    alarms = fw.screen_batch([json.loads(line)["text"] for line in lines])
    assert len(alarms) >= 300
    assert sum(map(bool, alarms)) / len(alarms) <= most
    assert sum(alarm.level is AlarmLevel.DANGEROUS for alarm in alarms) / len(alarms) <= 0.002
