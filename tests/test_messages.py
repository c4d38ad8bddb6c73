"""Chat messages: the role says who wrote them."""

from __future__ import annotations

import json

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


QUIET, LOUD = {"city": "Lyon"}, {"city": ORDER}


def call(arguments):
    return {"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}


class TestToolCalls:
    """What the model asks of tools: its own words, whose origin is unknown."""

    @pytest.mark.parametrize(
        "message",
        [
            {"role": "assistant", "content": None, "tool_calls": [call(json.dumps(LOUD))]},
            {"role": "assistant", "content": "", "tool_calls": [call("{}"), call(f"not {ORDER}")]},
            {"role": "assistant", "tool_calls": [call(json.dumps({ORDER: 5}))]},
            {"role": "assistant", "tool_calls": [call(f'{{"a": "{ORDER}", "a": "twice"}}')]},
            {"role": "assistant", "tool_calls": [call('"' + "\\u0041" * 24 + '"')]},
            {"role": "assistant", "tool_calls": [call("[" * 100_000 + ORDER)]},
            {"role": "assistant", "tool_calls": [call(LOUD)]},
            {"role": "assistant", "function_call": {"name": "look", "arguments": f'["{ORDER}"]'}},
            {
                "role": "assistant",
                "tool_calls": [{"type": "custom", "custom": {"name": "look", "input": ORDER}}],
            },
            {"role": "assistant", "content": [{"type": "tool_use", "name": "l", "input": LOUD}]},
            {
                "role": "assistant",
                "content": [{"type": "server_tool_use", "name": "search", "input": {"q": [ORDER]}}],
            },
            {"type": "function_call", "name": "look", "arguments": json.dumps(LOUD)},
            {"type": "custom_tool_call", "name": "look", "input": ORDER},
            {"type": "mcp_call", "name": "look", "arguments": "{}", "output": ORDER},
            {"role": "assistant", "content": "fine", "reasoning_content": ORDER},
            {"role": "assistant", "content": None, "refusal": ORDER},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": ORDER}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": ORDER}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": ORDER}]},
        ],
    )
    def test_every_string_is_read(self, tiny, message):
        (alarm,) = tiny.screen_messages([message])
        assert alarm.level is DANGEROUS
        (quiet,) = tiny.screen_messages([json.loads(json.dumps(message).replace(ORDER, "Lyon"))])
        if "u0041" not in json.dumps(message):
            assert (quiet.level, quiet.reason) == (CLEAR, None)

    def test_arguments_and_text_are_read_together(self, tiny):
        message = {
            "role": "assistant",
            "content": BENIGN[0],
            "tool_calls": [call('{"a": "b\\nc"}')],
        }
        assert tiny.screen_messages([message]) == [tiny.screen(f"{BENIGN[0]}\nlook\na\nb\nc")]

    @pytest.mark.parametrize("arguments", [{"a": b"bytes"}, {"a": object()}, {1, 2}])
    def test_arguments_that_are_no_json_are_refused(self, tiny, arguments):
        with pytest.raises(InputError):
            tiny.screen_messages([{"role": "assistant", "tool_calls": [call(arguments)]}])


class TestResults:
    """What tools give back, and documents that a user attaches: read as documents."""

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "tool_result", "tool_use_id": "1", "content": ORDER},
            {"type": "tool_result", "content": [{"type": "text", "text": ORDER}]},
            {"type": "mcp_tool_result", "content": [{"type": "text", "text": ORDER}]},
            {"type": "document", "source": {"type": "text", "data": ORDER}},
            {"type": "document", "source": {"type": "content", "content": ORDER}},
            {
                "type": "document",
                "title": ORDER,
                "source": {"type": "content", "content": [{"type": "text", "text": "Fine."}]},
            },
            {"type": "search_result", "source": "s", "title": "t", "content": [{"text": ORDER}]},
        ],
    )
    def test_they_are_documents_in_a_users_message(self, tiny, part):
        user = {"type": "text", "text": ORDER}
        (alarm,) = tiny.screen_messages([{"role": "user", "content": [user]}])
        assert alarm.level is CLEAR, "a user may order"
        (alarm,) = tiny.screen_messages([{"role": "user", "content": [part, user]}])
        assert (alarm.level, alarm.origin) == (DANGEROUS, "document")
        assert alarm.reason is None

    @pytest.mark.parametrize("kind", ["function_call_output", "custom_tool_call_output"])
    @pytest.mark.parametrize("output", [ORDER, [{"type": "input_text", "text": ORDER}]])
    def test_items_without_a_role(self, tiny, kind, output):
        alarms = tiny.screen_messages([{"type": kind, "call_id": "1", "output": output}])
        assert alarms == [tiny.screen_document(ORDER)]

    def test_a_result_that_is_an_image_is_suspicious(self, tiny):
        part = {"type": "tool_result", "content": [IMAGE]}
        (alarm,) = tiny.screen_messages([{"role": "user", "content": [part]}])
        assert alarm.level is SUSPICIOUS
        assert alarm.reason == "the text is empty; the message holds parts that are not text"


def test_no_messages(tiny):
    assert tiny.screen_messages([]) == []


class TestParts:
    def test_parts_are_read_as_one_text(self, tiny):
        parts = [{"type": "text", "text": BENIGN[0]}, {"type": "text", "text": ATTACK}]
        alarms = tiny.screen_messages([{"role": "user", "content": parts}])
        assert alarms == [tiny.screen(f"{BENIGN[0]}\n{ATTACK}", origin="user")]
        assert alarms[0].level is DANGEROUS

    @pytest.mark.parametrize(
        "other",
        [
            IMAGE,
            "a string",
            None,
            {},
            {"type": "input_audio", "input_audio": {"data": "AAAA"}},
            {"type": "file", "file": {"file_id": "1"}},
            {"type": "redacted_thinking", "data": "AAAA"},
            {"type": "invented", "text": "Fine."},
            {"type": ["text"], "text": "Fine."},
            {"type": "text", "text": "Fine.", "more": "text"},
            {"type": "document", "source": {"type": "base64", "data": "AAAA"}},
        ],
    )
    def test_a_part_that_is_not_text_is_suspicious(self, tiny, other):
        parts = [{"type": "text", "text": BENIGN[0]}, other]
        (alarm,) = tiny.screen_messages([{"role": "user", "content": parts}])
        assert alarm.level is SUSPICIOUS
        assert alarm.reason == "the message holds parts that are not text"

    def test_the_text_of_an_unknown_part_is_read(self, tiny):
        (alarm,) = tiny.screen_messages(
            [{"role": "user", "content": [{"type": "x", "text": ATTACK}]}]
        )
        assert alarm.level is DANGEROUS

    def test_unknown_fields_of_a_message_are_suspicious(self, tiny):
        (alarm,) = tiny.screen_messages([{"role": "user", "content": "fine", "appendix": ATTACK}])
        assert alarm.level is SUSPICIOUS

    def test_parts_inside_each_other_end_somewhere(self, tiny):
        part = {"type": "tool_result", "content": []}
        part["content"].append(part)
        (alarm,) = tiny.screen_messages([{"role": "user", "content": [part]}])
        assert alarm.level is SUSPICIOUS

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
        {"role": "assistant", "tool_calls": [call('"\\ud800"')]},
        {"role": "assistant", "tool_calls": 5},
        {"role": "user", "name": 5, "content": "fine"},
        {"type": "message", "content": "no role"},
        {"type": "item_reference", "id": "1"},
        {"type": ["reasoning"]},
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
    messages.append({"role": "user", "content": 5})
    alarms = blocking.screen_messages(messages)
    assert alarms[0] == tiny.screen(BENIGN[0], origin="user")
    assert [alarm.level for alarm in alarms] == [CLEAR, DANGEROUS, DANGEROUS]


def test_spans_count_from_the_beginning_of_the_content(tiny):
    content = f"{BENIGN[0]} {ATTACK}"
    message = {"role": "user", "name": "Bob", "content": content}
    (alarm,) = tiny.screen_messages([message])
    assert alarm == tiny.screen(f"{content}\nBob", origin="user")
    assert alarm.spans
