"""Harmony, the chat format of GPT-OSS: messages become token ids, and the model's tokens become messages.

    <|start|>ROLE[ to=RECIPIENT][<|channel|>CHANNEL[ <|constrain|>TYPE]]<|message|>CONTENT<|end|>

A call of a tool ends with <|call|>, and the model ends its answer with <|return|>; a tool's result has the tool's name
as role. The definition is the package openai-harmony, whose tokens tests compare with these.
"""

import contextlib
import datetime
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from system.errors import InputError

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
REASONING_EFFORTS = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")
ROLES = ("system", "developer", "user", "assistant", "tool")
START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
TOOLS_PREFIX = "functions."  # before a function's name, as a recipient and as a role


@dataclass(frozen=True)
class Message:
    """A message of a conversation."""

    role: str  # of ROLES
    content: str
    channel: str | None = None  # of CHANNELS; the assistant's, and of tools
    recipient: str | None = None  # whom it is sent to: a tool, or "assistant"
    name: str | None = None  # a tool's
    content_type: str | None = None  # "json" where the content is bound to it


@dataclass(frozen=True)
class Function:
    """A tool that the model may call."""

    name: str
    description: str = ""
    parameters: dict | None = None  # a JSON schema of an object


@dataclass(frozen=True)
class Setting:
    """What stands before the first message."""

    reasoning: str = "medium"  # of REASONING_EFFORTS
    date: str | None = None  # YYYY-MM-DD
    instructions: str | None = None  # the developer's
    functions: tuple[Function, ...] = ()
    identity: str = IDENTITY

    def __post_init__(self):
        """Raise InputError for an unknown reasoning effort, a date that is none, or text that is not valid Unicode."""
        if self.reasoning not in REASONING_EFFORTS:
            raise InputError(f"reasoning effort {self.reasoning!r}: expected one of {', '.join(REASONING_EFFORTS)}")
        if self.date is not None and not is_date(self.date):
            raise InputError(f"date {self.date!r}: expected YYYY-MM-DD")
        for name, text in (("identity", self.identity), ("instructions", self.instructions or "")):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"the {name} is not valid UTF-8")

    def messages(self) -> list[Message]:
        """Return the system message and, if there is something to say, the developer's."""
        lines = [self.identity, f"Knowledge cutoff: {KNOWLEDGE_CUTOFF}"]
        lines += [f"Current date: {self.date}"] if self.date else []
        lines += ["", f"Reasoning: {self.reasoning}", ""]
        lines += [f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."]
        if self.functions:
            lines += ["Calls to these tools must go to the commentary channel: 'functions'."]
        parts = [f"# Instructions\n\n{self.instructions}"] if self.instructions else []
        parts += [functions_text(self.functions)] if self.functions else []
        system = [Message("system", "\n".join(lines))]
        return system + ([Message("developer", "\n\n".join(parts))] if parts else [])


DEFAULT_SETTING = Setting()


def is_date(text: str) -> bool:
    """Return whether a text is a day's date, YYYY-MM-DD."""
    with contextlib.suppress(ValueError):
        return datetime.date.fromisoformat(text).isoformat() == text
    return False


# ---------------------------------------------------------------- tools as text


def functions_text(functions: Sequence[Function]) -> str:
    """Return the declarations of functions, as TypeScript."""
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for function in functions:
        lines += [f"// {line}" for line in function.description.splitlines()]
        argument = f"_: {typescript(function.parameters)}" if function.parameters else ""
        lines += [f"type {function.name} = ({argument}) => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def typescript(schema: Any, indent: str = "") -> str:
    """Return a JSON schema as a TypeScript type."""
    if not isinstance(schema, dict):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return "".join(f"\n{line}" for line in _variants(schema["oneOf"], indent))
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "string":
        values = _strings(schema.get("enum"))
        return " | ".join(f'"{value}"' for value in values) if values else "string"
    if kind == "array":
        return f"{typescript(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    names = {"number": "number", "integer": "number", "boolean": "boolean"}
    return names.get(kind, "any") if isinstance(kind, str) else "any"


def _schema(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _variants(variants: list, indent: str, above: str | None = None, is_above: bool = False) -> list[str]:
    """Return a line for each type of a oneOf.

    above: the description of the property; is_above: whether it stands above, in place of the first type's.
    """
    lines = []
    for n, variant in enumerate(map(_schema, variants)):
        description = _description(variant)
        is_said = description is None or description == above or (n == 0 and is_above)
        comments = ([] if is_said else [description]) + ([_default(variant)] if "default" in variant else [])
        comment = f" // {' '.join(comments)}" if comments else ""
        lines.append(f"{indent} | {_nullable(variant, typescript(variant, indent + '   '))}{comment}")
    return lines


def _object(schema: dict, indent: str) -> str:
    lines = [*_comment(_description(schema), indent), "{"]
    required = _strings(schema.get("required"))
    for key, value in _schema(schema.get("properties")).items():
        value = _schema(value)
        name, description = f"{indent}{key}{'' if key in required else '?'}:", _description(value)
        lines += _title(value, indent)
        if isinstance(value.get("oneOf"), list):
            lines += _examples(value, indent)
            is_above = description not in (None, *(_description(_schema(first)) for first in value["oneOf"][:1]))
            lines += _comment(description, indent) if is_above else []
            lines += _comment(_default(value), indent) if "default" in value else []
            lines += [name, *_variants(value["oneOf"], indent, description, is_above), f"{indent},"]
        else:
            lines += [*_comment(description, indent), *_examples(value, indent)]
            text = _nullable(value, typescript(value, indent + "    "))
            lines.append(f"{name} {text},{f' // {_default(value)}' if 'default' in value else ''}")
    return "\n".join([*lines, f"{indent}}}"])


def _description(schema: dict) -> str | None:
    description = schema.get("description")
    return description if isinstance(description, str) else None


def _comment(text: str | None, indent: str) -> list[str]:
    return [] if text is None else [f"{indent}// {text}"]


def _title(schema: dict, indent: str) -> list[str]:
    title = schema.get("title")
    return [f"{indent}// {title}", f"{indent}//"] if isinstance(title, str) else []


def _examples(schema: dict, indent: str) -> list[str]:
    examples = _strings(schema.get("examples"))
    return [f"{indent}// Examples:", *(f'{indent}// - "{example}"' for example in examples)] if examples else []


def _default(schema: dict) -> str:
    value = schema["default"]
    if isinstance(value, str):
        return f"default: {value}" if "enum" in schema else f'default: "{value}"'
    return f"default: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}"


def _nullable(schema: dict, text: str) -> str:
    return f"{text} | null" if schema.get("nullable") is True and "null" not in text else text


def _strings(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


# ---------------------------------------------------------------- messages to tokens


def without_old_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without the assistant's reasoning before its last final answer, as the format asks."""
    finals = [n for n, message in enumerate(messages) if message.channel == "final"]
    last = finals[-1] if finals else 0
    return [message for n, message in enumerate(messages) if n >= last or message.channel != "analysis"]


@dataclass(frozen=True)
class Control:
    """A control token, which no text is equal to."""

    token: str

    def __str__(self) -> str:
        return self.token


def parts_of(message: Message) -> list[Control | str]:
    """Return a message as control tokens and texts."""
    parts = [Control(START), (message.name or "") if message.role == "tool" else message.role]
    if message.recipient:
        parts += [f" to={message.recipient}"]
    if message.channel:
        parts += [Control(CHANNEL), message.channel]
    if message.content_type:
        parts += [" ", Control(CONSTRAIN), message.content_type]
    is_call = message.role == "assistant" and message.recipient is not None
    return [*parts, Control(MESSAGE), message.content, Control(CALL if is_call else END)]


def prompt_parts(setting: Setting, messages: Sequence[Message]) -> list[Control | str]:
    """Return a conversation whose next message is the assistant's, as control tokens and texts."""
    everything = [*setting.messages(), *without_old_reasoning(messages)]
    return [part for message in everything for part in parts_of(message)] + [Control(START), "assistant"]


def encode(tokenizer, parts: Sequence[Control | str]) -> list[int]:
    """Return the token ids of control tokens and texts, which never become control tokens.

    tokenizer: tokenizer_util.Tokenizer.

    Raise InputError if the vocabulary lacks a control token, and for a text that Tokenizer.encode_plain refuses.
    """
    controls = {part: tokenizer.token_id(part.token) for part in parts if isinstance(part, Control)}
    missing = [part.token for part, token_id in controls.items() if token_id is None]
    if missing:
        raise InputError(f"this checkpoint's tokenizer has no {', '.join(missing)}: it cannot take a chat prompt")
    ids: list[int] = []
    for part in parts:
        ids += [controls[part]] if isinstance(part, Control) else tokenizer.encode_plain(part)
    return ids


def chat_ids(tokenizer, user_text: str, setting: Setting = DEFAULT_SETTING) -> list[int]:
    """Return the prompt for an answer to one message of the user. Raise the errors of `encode`."""
    return encode(tokenizer, prompt_parts(setting, [Message("user", user_text)]))


def chat_text(user_text: str, setting: Setting = DEFAULT_SETTING) -> str:
    """Return the prompt for an answer to one message of the user, as text.

    Control tokens that user_text spells cannot be told from the prompt's own here: text that is not trusted must go
    through `chat_ids`.
    """
    return "".join(map(str, prompt_parts(setting, [Message("user", user_text)])))


# ---------------------------------------------------------------- tokens to messages


@dataclass(frozen=True)
class Piece:
    """Text that a token adds to a message of the assistant."""

    channel: str | None
    recipient: str | None
    text: str


class Parser:
    """Reads the assistant's tokens behind a prompt: pieces as they arrive, and whole messages."""

    def __init__(self, tokenizer):
        self._controls = {}
        for token in (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN):
            token_id = tokenizer.token_id(token)
            if token_id is not None:
                self._controls[token_id] = token
        self._stream = tokenizer.stream()
        self._header = ""  # of the message that begins, with its control tokens
        self._open: Message | None = None
        self.messages: list[Message] = []  # complete ones

    @property
    def current(self) -> Message | None:
        """The message that is being read, behind its header."""
        return self._open

    def push(self, token_id: int) -> Piece | None:
        """Read a token. Return the text that it completes, None if it completes none."""
        control = self._controls.get(token_id)
        if control in (END, CALL, RETURN):
            piece = self._add(self._stream.flush())
            self.end()
            return piece
        if control == START:
            self.end()
            return None
        if control == MESSAGE and self._open is None:
            self._header += self._stream.flush()
            self._open = message_of(self._header)
            return None
        if self._open is None:
            self._header += self._stream.flush() + control if control else self._stream.push(token_id)
            return None
        return self._add(control or self._stream.push(token_id))

    def _add(self, text: str) -> Piece | None:
        if self._open is None or not text:
            return None
        self._open = replace(self._open, content=self._open.content + text)
        return Piece(self._open.channel, self._open.recipient, text)

    def end(self) -> None:
        """End the open message, if there is one: the answer was cut, or the model has begun another."""
        self._add(self._stream.flush())
        if self._open is not None:
            self.messages.append(self._open)
        self._open, self._header = None, ""


def message_of(header: str) -> Message:
    """Return an empty message of the assistant from the text between <|start|> and <|message|>."""
    before, _, rest = header.partition(CHANNEL)
    rest, _, content_type = rest.partition(CONSTRAIN)
    recipient = re.search(r"(?:^|\s)to=(\S+)", f"{before} {rest}")
    words = [word for word in rest.split() if not word.startswith("to=")]
    return Message(
        "assistant",
        "",
        channel=words[0] if words else None,
        recipient=recipient[1] if recipient else None,
        content_type=content_type.strip() or None,
    )


def pieces(tokens: Iterable[int], parser: Parser) -> Iterator[Piece]:
    """Yield the pieces of an answer as its tokens arrive."""
    for token_id in tokens:
        piece = parser.push(token_id)
        if piece:
            yield piece
    before = parser.current
    parser.end()
    if before is not None and len(parser.messages[-1].content) > len(before.content):
        yield Piece(before.channel, before.recipient, parser.messages[-1].content[len(before.content) :])
