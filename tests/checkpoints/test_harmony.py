"""checkpoints/harmony.py against openai-harmony 0.0.8, whose results tools/record_harmony.py has recorded."""

import gzip
import json
from pathlib import Path

import pytest
from shipped import FOLDER

from checkpoints.harmony import (
    Function,
    Message,
    Parser,
    Setting,
    chat_ids,
    encode,
    functions_text,
    message_of,
    parts_of,
    pieces,
    prompt_parts,
    without_old_reasoning,
)
from system.errors import InputError
from tokenizer_util import Tokenizer

RECORDED = json.loads(gzip.decompress((Path(__file__).parent / "harmony_conversations.json.gz").read_bytes()))
CONTROLS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
ANSWER = [
    Message("assistant", "Which one? <|end|>", "analysis"),
    Message("assistant", '{"number": 18}', "commentary", recipient="functions.find", content_type="json"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


def parts_of_record(record: dict) -> list:
    functions = tuple(Function(**fields) for fields in record["functions"])
    return prompt_parts(
        Setting(**record["setting"], functions=functions), [Message(**fields) for fields in record["messages"]]
    )


def test_conversations_are_those_of_openai_harmony():
    assert len(RECORDED) == 400
    for record in RECORDED:
        assert "".join(map(str, parts_of_record(record))) == record["text"]


def test_texts_never_become_control_tokens(tokenizer):
    controls = {tokenizer.token_id(token) for token in CONTROLS}
    for record in RECORDED[:200]:
        parts = parts_of_record(record)
        ids = encode(tokenizer, parts)
        assert tokenizer.decode(ids) == record["text"]
        assert [tokenizer.decode([i]) for i in ids if i in controls] == [
            p.token for p in parts if not isinstance(p, str)
        ]


def test_reasoning_before_the_last_final_answer_is_dropped():
    messages = [
        Message("user", "a"),
        Message("assistant", "1", "analysis"),
        Message("assistant", "b", "final"),
        Message("user", "c"),
        Message("assistant", "2", "analysis"),
        Message("assistant", "d", "final"),
        Message("user", "e"),
        Message("assistant", "3", "analysis"),
        Message("assistant", "{}", "commentary", recipient="functions.f"),
    ]
    assert [m.content for m in without_old_reasoning(messages)] == ["a", "b", "c", "d", "e", "3", "{}"]
    assert without_old_reasoning(messages[:2]) == messages[:2]
    assert without_old_reasoning([]) == []


@pytest.mark.parametrize(
    "header, channel, recipient, content_type",
    [
        ("<|channel|>final", "final", None, None),
        ("<|channel|>commentary to=functions.f <|constrain|>json", "commentary", "functions.f", "json"),
        (" to=functions.f<|channel|>commentary <|constrain|>json", "commentary", "functions.f", "json"),
        (" to=functions.f<|channel|>commentary", "commentary", "functions.f", None),
        ("", None, None, None),
    ],
)
def test_headers(header, channel, recipient, content_type):
    """The model writes a recipient before or behind the channel."""
    assert message_of(header) == Message("assistant", "", channel, recipient, content_type=content_type)


def answer_ids(tokenizer, messages: list[Message]) -> list[int]:
    """Return what the model generates behind <|start|>assistant."""
    ids = [token for message in messages for token in encode(tokenizer, parts_of(message))]
    return ids[len(encode(tokenizer, prompt_parts(Setting(), [])[-2:])) :]


def test_an_answer_is_parsed(tokenizer):
    parser = Parser(tokenizer)
    found = list(pieces(answer_ids(tokenizer, ANSWER), parser))
    assert parser.messages == ANSWER
    for message in ANSWER:
        text = "".join(piece.text for piece in found if piece.channel == message.channel)
        assert text == message.content


def test_an_answer_that_is_cut_keeps_what_came(tokenizer):
    whole = answer_ids(tokenizer, ANSWER[:1])
    for n in range(len(whole)):
        parser = Parser(tokenizer)
        text = "".join(piece.text for piece in pieces(whole[:n], parser))
        assert ANSWER[0].content.startswith(text)
        assert [m.content for m in parser.messages] in ([], [text])


def test_pieces_are_whole_characters(tokenizer):
    message = Message("assistant", "naïve 日本語 😀", "final")
    found = list(pieces(answer_ids(tokenizer, [message]), Parser(tokenizer)))
    assert "".join(piece.text for piece in found) == message.content
    assert not any("\ufffd" in piece.text for piece in found)


def test_tokens_out_of_place_do_no_harm(tokenizer):
    ids = [tokenizer.token_id(token) for token in CONTROLS]
    for first in ids:
        for second in ids:
            parser = Parser(tokenizer)
            list(pieces([first, second, *tokenizer.encode_plain("text"), second, first], parser))
            assert all(message.role == "assistant" for message in parser.messages)


@pytest.mark.parametrize(
    "schema",
    [
        None,
        3,
        "x",
        [],
        {"type": 3},
        {"type": []},
        {"type": {}},
        {"oneOf": [3, None]},
        {"type": "object", "properties": 3},
    ],
)
def test_schemas_that_are_none_are_any(schema):
    parameters = {"type": "object", "properties": {"a": schema}, "required": 3}
    assert "a?:" in functions_text([Function("f", "", parameters)])


def test_a_vocabulary_without_control_tokens_is_refused():
    class Words:
        def token_id(self, token):
            return None if token == "<|message|>" else 1

    with pytest.raises(InputError, match=r"has no <\|message\|>: it cannot take a chat prompt"):
        chat_ids(Words(), "Hi")
