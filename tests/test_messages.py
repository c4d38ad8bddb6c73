"""Chat messages: the role says who wrote them."""

from __future__ import annotations

import pytest
from alknet_firewall import AlarmLevel, Firewall, InputError
from tiny_detector import ATTACK, BENIGN, ORDER

CLEAR, SUSPICIOUS, DANGEROUS = AlarmLevel
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("role", "origin"),
    [
        ("system", "user"),
        ("developer", "user"),
        ("user", "user"),
        ("assistant", None),
        ("tool", "document"),
        ("function", "document"),
    ],
)
def test_roles_are_origins(tiny, role, origin):
    for text in (BENIGN[0], ORDER, ATTACK):
        alarms = tiny.screen_messages([{"role": role, "content": text}])
        assert alarms == [tiny.screen(text, origin=origin)]


def test_a_conversation(tiny):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": BENIGN[1]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": ORDER, "tool_call_id": "1"},
        {"role": "user", "content": ORDER},
    ]
    alarms = tiny.screen_messages(messages)
    assert [alarm.level for alarm in alarms] == [CLEAR, CLEAR, CLEAR, DANGEROUS, CLEAR]
    assert alarms[2].reason == "the text is empty"


def test_no_messages(tiny):
    assert tiny.screen_messages([]) == []


class TestParts:
    def test_parts_are_read_as_one_text(self, tiny):
        parts = [{"type": "text", "text": BENIGN[0]}, {"type": "text", "text": ATTACK}]
        alarms = tiny.screen_messages([{"role": "user", "content": parts}])
        assert alarms == [tiny.screen(f"{BENIGN[0]}\n{ATTACK}", origin="user")]
        assert alarms[0].level is DANGEROUS

    @pytest.mark.parametrize("other", [IMAGE, "a string", None, {}])
    def test_a_part_that_is_not_text_is_suspicious(self, tiny, other):
        parts = [{"type": "text", "text": BENIGN[0]}, other]
        (alarm,) = tiny.screen_messages([{"role": "user", "content": parts}])
        assert alarm.level is SUSPICIOUS
        assert alarm.reason == "the message holds parts that are not text"

    def test_it_does_not_lower_the_alarm(self, tiny):
        parts = [{"type": "text", "text": ATTACK}, IMAGE]
        (alarm,) = tiny.screen_messages([{"role": "user", "content": parts}])
        assert alarm.level is DANGEROUS

    def test_no_parts(self, tiny):
        (alarm,) = tiny.screen_messages([{"role": "user", "content": []}])
        assert (alarm.level, alarm.reason) == (CLEAR, "the text is empty")

    def test_only_parts_that_are_not_text(self, tiny):
        (alarm,) = tiny.screen_messages([{"role": "user", "content": [IMAGE]}])
        assert alarm.level is SUSPICIOUS


@pytest.mark.parametrize(
    "message",
    [
        None,
        "text",
        ["user", "text"],
        {},
        {"content": "text"},
        {"role": "User", "content": "text"},
        {"role": "critic", "content": "text"},
        {"role": None, "content": "text"},
        {"role": ["user"], "content": "text"},
        {"role": "user", "content": 5},
        {"role": "user", "content": b"bytes"},
        {"role": "user", "content": {"text": "text"}},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "user", "content": [{"type": "text", "text": b"bytes"}]},
        {"role": "user", "content": "\ud800"},
    ],
)
def test_what_is_not_a_message_is_refused(tiny, message):
    with pytest.raises(InputError):
        tiny.screen_messages([{"role": "user", "content": "fine"}, message])


def test_a_refusal_does_not_quote_the_content(tiny):
    with pytest.raises(InputError) as caught:
        tiny.screen_messages([{"role": "zyxcanaryzyx", "content": "zyxcanaryzyx"}])
    assert "zyxcanaryzyx" not in str(caught.value)


def test_block_blocks_the_message_that_fails(tiny, tiny_folder):
    blocking = Firewall(tiny_folder, on_error="block")
    messages = [{"role": "user", "content": BENIGN[0]}, {"role": "tool", "content": "\ud800"}]
    alarms = blocking.screen_messages(messages)
    assert alarms[0] == tiny.screen(BENIGN[0], origin="user")
    assert alarms[1].level is DANGEROUS
