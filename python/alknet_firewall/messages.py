"""Chat messages: what a model would read in them, and who wrote it.

Understood are messages of OpenAI's chat completions, items of its Responses API, and messages of
Anthropic's API, all as the plain mappings that go over the wire.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .alarm import Origin
from .errors import InputError

__all__ = ["Reading", "read_message"]

_Author = Origin | None  # None: the model itself, or nobody knows.

# Who writes what a chat message of this role holds. The owner's own prompts are read like a user's.
_ROLES: dict[str, _Author] = {
    "system": "user",
    "developer": "user",
    "user": "user",
    "assistant": None,
    "tool": "document",
    "function": "document",
}

_CALLS = {"tool_use", "server_tool_use", "mcp_tool_use", "function_call", "custom_tool_call"}
_RESULTS = {
    "tool_result",
    "mcp_tool_result",
    "function_call_output",
    "custom_tool_call_output",
    "search_result",
}
_ITEMS = {"function_call", "custom_tool_call", "function_call_output", "custom_tool_call_output"}
_ITEMS |= {"reasoning", "mcp_call"}

# Fields that are texts themselves, whatever type of part they stand in.
_TEXTS = ("name", "title", "context", "text", "refusal", "thinking", "reasoning_content", "error")
# Fields that hold parts, or a text in their place.
_PARTS = ("content", "output", "summary")
# Fields with the arguments of a call: JSON, or an object.
_ARGUMENTS = ("arguments", "input")
# Fields that are calls themselves, or wrap one.
_NESTED = ("tool_calls", "function_call", "function", "custom")
# Fields that a model does not read.
_UNREAD = {
    "role", "type", "id", "call_id", "tool_call_id", "tool_use_id", "status", "index", "is_error",
    "cache_control", "citations", "annotations", "logprobs", "signature", "server_label",
    "server_name", "approval_request_id", "model", "stop_reason", "stop_sequence", "usage", "phase",
}  # fmt: skip
# Parts whose fields are all read; of every other type of part, it is said that it was not.
_KNOWN = _CALLS | _RESULTS | {"text", "input_text", "output_text", "summary_text", "reasoning_text"}
_KNOWN |= {"refusal", "thinking", "document", "reasoning", "mcp_call", "function", "custom"}

_MAX_DEPTH = 16


@dataclass
class Reading:
    """What a model would read in one message.

    Attributes
    ----------
    passages : list of (origin, text)
        In order.
    complete : bool
        Whether that is all; images, files and what is not known here cannot be screened.
    """

    passages: list[tuple[_Author, str]] = field(default_factory=list)
    complete: bool = True

    def texts(self) -> list[tuple[_Author, str]]:
        """One text for each author: their passages, a line each, so that none is torn apart."""
        authors = dict.fromkeys(author for author, _ in self.passages)
        return [
            (author, "\n".join(text for other, text in self.passages if other == author))
            for author in authors
        ]

    def add(self, author: _Author, text: object) -> None:
        if not isinstance(text, str):
            raise InputError(f"a text must be str, not {type(text).__name__}: decode bytes first")
        if text:
            self.passages.append((author, text))


def read_message(message: Mapping[str, Any]) -> Reading:
    """Read one message or item.

    Raises
    ------
    InputError
        If it is not of a known form. The message does not quote it.
    """
    if not isinstance(message, Mapping):
        raise InputError(f"a message must be a mapping, not {type(message).__name__}")
    reading = Reading()
    role, kind = message.get("role"), message.get("type")
    if isinstance(role, str) and role in _ROLES:
        author = _ROLES[role]
    elif role is None and isinstance(kind, str) and kind in _ITEMS:
        author = "document" if kind in _RESULTS else None
    else:
        raise InputError(
            f"a message needs a role, one of {', '.join(_ROLES)}, or a type, one of "
            f"{', '.join(sorted(_ITEMS))}; found role {type(role).__name__}, type "
            f"{type(kind).__name__}"
        )
    # The content first, so that spans count from its beginning.
    parts = {name: message[name] for name in _PARTS if name in message}
    _read_fields(reading, author, {**parts, **message}, depth=0)
    # An empty text is one by that author.
    reading.passages = reading.passages or [(author, "")]
    return reading


def _read_fields(reading: Reading, author: _Author, part: Mapping[str, Any], depth: int) -> None:
    """Read every field of a message, item, call or part."""
    results = author if part.get("type") != "mcp_call" else "document"
    for name, value in part.items():
        if value is None or name in _UNREAD:
            continue
        if name in _TEXTS:
            reading.add(results if name == "error" else author, value)
        elif name in _PARTS:
            _read_parts(reading, results if name == "output" else author, value, depth)
        elif name in _ARGUMENTS:
            for text in _argument_texts(value):
                reading.add(author, text)
        elif name in _NESTED and isinstance(value, Mapping) and depth < _MAX_DEPTH:
            _read_fields(reading, author, value, depth + 1)
        elif name in _NESTED:
            _read_parts(reading, author, value, depth)
        elif name == "source" and isinstance(value, str):  # of a search result
            reading.add(author, value)
        elif name == "source" and isinstance(value, Mapping):
            _read_source(reading, author, value, depth)
        elif not isinstance(value, bool | int | float) and value not in ("", [], {}):
            reading.complete = False


def _read_parts(reading: Reading, author: _Author, parts: object, depth: int) -> None:
    """Read what is a text, or a list of parts."""
    if isinstance(parts, str):
        reading.add(author, parts)
        return
    if not isinstance(parts, Sequence) or isinstance(parts, bytes | bytearray):
        raise InputError(f"content must be str or a list of parts, not {type(parts).__name__}")
    for part in parts:
        if not isinstance(part, Mapping) or depth == _MAX_DEPTH:
            reading.complete = False
            continue
        kind = part.get("type")
        if kind is None and ("text" in part or "function" in part):
            kind = "text" if "text" in part else "function"
        if isinstance(kind, str) and kind in _KNOWN:
            fetched = kind in _RESULTS or kind == "document"
            _read_fields(reading, "document" if fetched else author, part, depth + 1)
            continue
        reading.complete = False
        if "text" in part:
            reading.add(author, part["text"])


def _read_source(reading: Reading, author: _Author, source: Mapping[str, Any], depth: int) -> None:
    """Read the source of a document, if it is text."""
    kind = source.get("type")
    if kind == "text":
        reading.add(author, source.get("data"))
    elif kind == "content":
        _read_parts(reading, author, source.get("content"), depth)
    else:
        reading.complete = False


def _argument_texts(arguments: object) -> Iterator[str]:
    """All strings in the arguments of a call, keys included, as they read without JSON's escapes.

    What is no JSON is a text. Of a key that stands twice, both values are read.
    """
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps(arguments)
        except (TypeError, ValueError, RecursionError):
            raise InputError("the arguments of a call must be a str or JSON values") from None
    try:
        values = [json.loads(arguments, object_pairs_hook=lambda pairs: [*map(list, pairs)])]
    except (ValueError, RecursionError):
        yield arguments
        return
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            values.extend(reversed(value))
