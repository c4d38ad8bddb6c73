"""The texts of ``examples/`` get the alarms that a person would give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alknet_firewall import AlarmLevel

EXAMPLES = Path(__file__).parents[1] / "examples"
EXPECTED = json.loads((Path(__file__).parent / "data/examples.json").read_text(encoding="utf-8"))


def test_every_example_has_an_expectation():
    assert sorted(EXPECTED) == sorted(path.name for path in EXAMPLES.iterdir())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(fw, name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    alarm = fw.screen(text)
    wanted = EXPECTED[name]
    if "level" in wanted:
        assert alarm.level == AlarmLevel[wanted["level"]], str(alarm)
        return
    assert alarm.level >= AlarmLevel[wanted["at_least"]], str(alarm)
    # Where no passage is named, the whole text is the attack and any part of it may be marked.
    marks = wanted.get("marks", text)
    found = text.index(marks)
    attack = range(found, found + len(marks))
    assert any(s.start < attack.stop and s.end > attack.start for s in alarm.spans), alarm.spans
