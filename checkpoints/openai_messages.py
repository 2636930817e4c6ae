"""Read messages and tools as the OpenAI API writes them, and turn them into what harmony knows.

Both serve.py and MegaModel.chat take them. Fields that are not named here are ignored; a field that is None is missing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoints.harmony import TOOLS_PREFIX, Function, Message
from system.errors import InputError

INSTRUCTING = ("system", "developer")  # roles
ROLES = (*INSTRUCTING, "user", "assistant", "tool")
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class BadField(InputError):
    """A field of a message or a tool is missing or makes no sense; `field` says where, as in messages.0.content."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field


@dataclass(frozen=True)
class _Call:
    """A call of a function in an earlier answer."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class _Given:
    """A message whose fields have the right types."""

    role: str
    text: str | None
    reasoning: str | None
    calls: tuple[_Call, ...]
    call_id: str | None
    field: str  # where it stands


def conversation_of(messages: Sequence[Any]) -> tuple[str, list[Message]]:
    """Return the developer's instructions, possibly "", and the messages behind them.

    The system and developer messages at the start are the instructions. Raise BadField if there is no message, or for
    the first one that makes no sense.
    """
    if not messages:
        raise BadField("messages", "at least one is needed")
    given = [_message(message, f"messages.{n}") for n, message in enumerate(messages)]
    start = next((n for n, message in enumerate(given) if message.role not in INSTRUCTING), len(given))
    instructions = "\n\n".join(_text_of(message) for message in given[:start] if message.text != "")
    return instructions, _harmony(given[start:])


def functions_of(tools: Iterable[Any]) -> tuple[Function, ...]:
    """Return the functions that tools are. Raise BadField for one that is something else."""
    return tuple(_function(tool, f"tools.{n}") for n, tool in enumerate(tools))


def _harmony(given: Sequence[_Given]) -> list[Message]:
    name_of: dict[str, str] = {}  # of the function behind a call's id
    messages = []
    for message in given:
        if message.role == "assistant":
            messages += _said(message)
            name_of |= {call.id: call.name for call in message.calls}
        elif message.role == "tool":
            messages.append(_result(message, name_of))
        elif message.role in INSTRUCTING:
            messages.append(Message("developer", f"# Instructions\n\n{_text_of(message)}"))
        else:
            messages.append(Message("user", _text_of(message)))
    return messages


def _said(message: _Given) -> list[Message]:
    """Return an earlier answer's reasoning, text and calls. Text before calls is commentary."""
    said = [Message("assistant", message.reasoning, "analysis")] if message.reasoning else []
    if message.text is not None:
        said.append(Message("assistant", message.text, "commentary" if message.calls else "final"))
    said += [
        Message("assistant", call.arguments, "commentary", TOOLS_PREFIX + call.name, None, "json")
        for call in message.calls
    ]
    if not said:
        raise BadField(f"{message.field}.content", "there is neither content nor tool_calls")
    return said


def _result(message: _Given, name_of: Mapping[str, str]) -> Message:
    if message.call_id not in name_of:
        raise BadField(f"{message.field}.tool_call_id", "names no earlier tool call")
    return Message("tool", _text_of(message), "commentary", "assistant", TOOLS_PREFIX + name_of[message.call_id])


def _text_of(message: _Given) -> str:
    if message.text is None:
        raise BadField(f"{message.field}.content", "is missing")
    return message.text


# ---------------------------------------------------------------- types of fields


def _message(value: Any, field: str) -> _Given:
    _check(value, Mapping, field)
    role = _get(value, "role", field, str, is_required=True)
    if role not in ROLES:
        raise BadField(f"{field}.role", f"expected one of {', '.join(ROLES)}")
    calls = enumerate(_get(value, "tool_calls", field, list) or ())
    return _Given(
        role,
        _content(value, field),
        _get(value, "reasoning_content", field, str),
        tuple(_call(call, f"{field}.tool_calls.{n}") for n, call in calls),
        _get(value, "tool_call_id", field, str),
        field,
    )


def _content(message: Mapping, field: str) -> str | None:
    """Return a message's text, whose parts stand on lines of their own."""
    content = _get(message, "content", field, str | list)
    if not isinstance(content, list):
        return content
    return "\n".join(_part(part, f"{field}.content.{n}") for n, part in enumerate(content))


def _part(value: Any, field: str) -> str:
    _check_type_field(value, "text", field)
    return _get(value, "text", field, str, is_required=True)


def _call(value: Any, field: str) -> _Call:
    _check_type_field(value, "function", field, is_required=False)
    function = _get(value, "function", field, Mapping, is_required=True)
    return _Call(
        _get(value, "id", field, str, is_required=True),
        _function_name(function, f"{field}.function"),
        _get(function, "arguments", f"{field}.function", str, is_required=True),
    )


def _function(value: Any, field: str) -> Function:
    _check_type_field(value, "function", field)
    function = _get(value, "function", field, Mapping, is_required=True)
    field = f"{field}.function"
    return Function(
        _function_name(function, field),
        _get(function, "description", field, str) or "",
        _get(function, "parameters", field, dict),
    )


def _function_name(function: Mapping, field: str) -> str:
    name = _get(function, "name", field, str, is_required=True)
    if not FUNCTION_NAME.fullmatch(name):
        raise BadField(f"{field}.name", "expected 1 to 64 letters, digits, underscores and hyphens")
    return name


def _check_type_field(value: Any, expected: str, field: str, is_required: bool = True) -> None:
    """Raise BadField unless a value is a dict whose `type` is the expected one, or missing if it may be."""
    _check(value, Mapping, field)
    kind = _get(value, "type", field, str, is_required)
    if kind not in (expected, None):
        raise BadField(f"{field}.type", f"expected {expected!r}")


TYPE_NAMES = {str: "text", list: "a list", Mapping: "a dict", dict: "a dict", str | list: "text or a list of parts"}


def _get(value: Mapping, name: str, field: str, expected_type: Any, is_required: bool = False) -> Any:
    """Return a field's value, None if it is missing. Raise BadField for another type, or if a needed one is missing."""
    found = value.get(name)
    if found is not None:
        _check(found, expected_type, f"{field}.{name}")
    elif is_required:
        raise BadField(f"{field}.{name}", "is missing")
    return found


def _check(value: Any, expected_type: Any, field: str) -> None:
    if not isinstance(value, expected_type):
        raise BadField(field, f"expected {TYPE_NAMES[expected_type]}, not {type(value).__name__}")
