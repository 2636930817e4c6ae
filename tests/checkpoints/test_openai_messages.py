"""Messages of the OpenAI API as harmony messages. tests/host and tests/endpoint have what is refused."""

import pytest

from checkpoints.harmony import Function, Message
from checkpoints.openai_messages import BadField, conversation_of, functions_of

CALL = {"id": "i", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_a_conversation():
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "system", "content": ""},
        {"role": "user", "content": "d", "name": "ignored", "tool_calls": None},
        {"role": "assistant", "content": "e", "reasoning_content": "f", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "i", "content": "g"},
        {"role": "assistant", "content": "h", "reasoning_content": None},
        {"role": "system", "content": "j"},
    ]
    assert conversation_of(messages) == (
        "a\n\nb\nc",
        [
            Message("user", "d"),
            Message("assistant", "f", "analysis"),
            Message("assistant", "e", "commentary"),
            Message("assistant", "{}", "commentary", "functions.f", None, "json"),
            Message("tool", "g", "commentary", "assistant", "functions.f"),
            Message("assistant", "h", "final"),
            Message("developer", "# Instructions\n\nj"),
        ],
    )


def test_instructions_alone():
    assert conversation_of([{"role": "system", "content": "a"}]) == ("a", [])


def test_functions():
    schema = {"type": "object"}
    tools = [
        {"type": "function", "function": {"name": "f", "description": "a", "parameters": schema}},
        {"type": "function", "function": {"name": "g-1", "description": None, "strict": True}},
    ]
    assert functions_of(tools) == (Function("f", "a", schema), Function("g-1"))


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool"])
def test_a_message_without_content_names_it(role):
    call = {"role": "assistant", "tool_calls": [CALL]}
    with pytest.raises(BadField, match="^messages.1.content: is missing$") as caught:
        conversation_of([call, {"role": role, "tool_call_id": "i"}])
    assert caught.value.field == "messages.1.content"


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "f\n", "ä", None, 3])
def test_a_function_name_of_other_characters(name):
    with pytest.raises(BadField) as caught:
        functions_of([{"type": "function", "function": {"name": name}}])
    assert caught.value.field == "tools.0.function.name"
