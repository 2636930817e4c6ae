"""Generate an answer and cut it into what its reader gets: text, reasoning, tool calls, and why it ended."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from checkpoints.harmony import CALL, RETURN, TOOLS_PREFIX, Message, Parser, Setting, encode, prompt_parts
from host.sampling import Sampling
from system.errors import InputError

CONTENT, REASONING = "content", "reasoning_content"


@dataclass(frozen=True)
class Text:
    """More of an answer's text."""

    field: str  # CONTENT or REASONING
    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a tool call's arguments."""

    index: int
    text: str


@dataclass
class Usage:
    """The tokens that an answer has taken so far."""

    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt, that the model's cache held
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion

    @property
    def total_tokens(self) -> int:
        """The tokens of prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Finished:
    """The answer's end, and the tokens that it took."""

    reason: str  # "stop", "length" or "tool_calls"
    usage: Usage


Event = Text | CallStart | CallArguments | Finished


@dataclass
class ToolCall:
    """A call of a function, as far as it has come."""

    id: str
    name: str
    arguments: str = ""  # JSON, as the model wrote it

    def as_dict(self) -> dict:
        """Return the call as the OpenAI API writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Whole:
    """What the events of an answer add up to."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def as_message(self) -> dict:
        """Return the answer as a message of the OpenAI API, whose reasoning is None if there was none."""
        content = self.text or (None if self.tool_calls else "")
        message = {"role": "assistant", "content": content, "reasoning_content": self.reasoning or None}
        return message | ({"tool_calls": [call.as_dict() for call in self.tool_calls]} if self.tool_calls else {})


def whole_of(events: Iterable[Event]) -> Whole:
    """Return what events add up to."""
    parts: dict[str, list[str]] = {CONTENT: [], REASONING: []}
    calls: list[ToolCall] = []
    for event in events:
        if isinstance(event, Text):
            parts[event.field].append(event.text)
        elif isinstance(event, CallStart):
            calls.append(ToolCall(event.id, event.name))
        elif isinstance(event, CallArguments):
            calls[event.index].arguments += event.text
    return Whole("".join(parts[CONTENT]), "".join(parts[REASONING]), calls)


class PromptTooLong(InputError):
    """A prompt leaves no room for an answer in the context."""


class Reader(Protocol):
    """Turns an answer's tokens into events."""

    is_reasoning: bool
    n_calls: int

    def push(self, token_id: int) -> Iterator[Event]:
        """Read a token, and yield what it completes."""

    def end(self) -> Iterator[Event]:
        """Yield what was held back."""


@dataclass(frozen=True)
class Order:
    """An answer that is wanted."""

    encode: Callable[..., list[int]]  # of a tokenizer, to the prompt
    reader: Callable[..., Reader]  # of a tokenizer
    param: str  # the request's field, or the function's argument, that the prompt comes from
    limit: int | None  # of tokens
    sampling: Sampling
    stops: tuple[str, ...]
    end_tokens: tuple[str, ...] = ()  # besides the model's own


def chat_order(
    setting: Setting, messages: Sequence[Message], limit: int | None, sampling: Sampling, stops: Sequence[str]
) -> Order:
    """Return the order of a conversation's next message."""
    parts = prompt_parts(setting, messages)
    return Order(
        lambda tokenizer: encode(tokenizer, parts),
        ChatReader,
        "messages",
        limit,
        sampling,
        tuple(stops),
        (CALL, RETURN),
    )


def completion_order(prompt: str | list[int], limit: int | None, sampling: Sampling, stops: Sequence[str]) -> Order:
    """Return the order of a prompt's continuation. Control tokens that a text spells are text."""
    return Order(
        lambda tokenizer: tokenizer.encode_plain(prompt) if isinstance(prompt, str) else prompt,
        TextReader,
        "prompt",
        limit,
        sampling,
        tuple(stops),
    )


class ChatReader:
    """Reads the harmony messages of an answer."""

    def __init__(self, tokenizer):
        self._parser = Parser(tokenizer)
        self._called: int | None = None  # the message that the last call is in
        self.n_calls = 0

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token belongs to reasoning."""
        message = self._parser.current
        return message is not None and _is_reasoning(message)

    def push(self, token_id: int) -> Iterator[Event]:
        n_before = len(self._parser.messages)
        piece = self._parser.push(token_id)
        message = self._message(n_before)
        if message is not None:
            yield from self._events(n_before, message, piece.text if piece else "")

    def end(self) -> Iterator[Event]:
        n_before, message = len(self._parser.messages), self._parser.current
        self._parser.end()
        if message is not None:
            yield from self._events(n_before, message, self._message(n_before).content[len(message.content) :])

    def _message(self, n: int) -> Message | None:
        """Return message n of the answer, which may be open, or None if it has not begun."""
        return self._parser.messages[n] if n < len(self._parser.messages) else self._parser.current

    def _events(self, n: int, message: Message, text: str) -> Iterator[Event]:
        if message.recipient is not None:
            if self._called != n:
                self._called, self.n_calls = n, self.n_calls + 1
                name = message.recipient.removeprefix(TOOLS_PREFIX)
                yield CallStart(self.n_calls - 1, f"call_{secrets.token_hex(12)}", name)
            if text:
                yield CallArguments(self.n_calls - 1, text)
        elif text:
            yield Text(REASONING if _is_reasoning(message) else CONTENT, text)


def _is_reasoning(message: Message) -> bool:
    return message.channel == "analysis" and message.recipient is None


class TextReader:
    """Reads plain text."""

    is_reasoning = False
    n_calls = 0

    def __init__(self, tokenizer):
        self._stream = tokenizer.stream()

    def push(self, token_id: int) -> Iterator[Event]:
        return self._events(self._stream.push(token_id))

    def end(self) -> Iterator[Event]:
        return self._events(self._stream.flush())

    def _events(self, text: str) -> Iterator[Event]:
        if text:
            yield Text(CONTENT, text)


class StopSearch:
    """Passes text on until a stop string comes, of which nothing is passed on."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string
        self.is_found = False

    def push(self, text: str) -> str:
        """Return the text that surely stands before a stop string."""
        text = self._held + text
        starts = [start for start in (text.find(stop) for stop in self._stops) if start >= 0]
        if starts:
            self.is_found, self._held = True, ""
            return text[: min(starts)]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop string begins with, shorter than the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def answer(
    model, tokenizer, order: Order, on_block: Callable[[], None] | None = None
) -> tuple[Usage, Iterator[list[Event]]]:
    """Return the tokens that an answer takes, which are counted as it comes, and an iterator over its events.

    The iterator yields the events of each token, possibly none; the last one is Finished. model: host.decoder.Decoder,
    whose generate calls on_block.
    At the call, raise InputError if the prompt cannot be encoded, is empty or has a token outside the vocabulary, and
    PromptTooLong (an InputError) if it leaves no room; at an event what Decoder.generate raises then.
    """
    prompt = order.encode(tokenizer)
    if not prompt:
        raise InputError("the prompt is empty")
    limit = answer_limit(model, prompt, order.limit)
    usage = Usage(len(prompt))
    tokens = model.generate(prompt, limit, sampling=order.sampling, on_block=on_block)
    return usage, _events(model, tokenizer, order, tokens, usage)


def answer_limit(model, prompt: Sequence[int], requested: int | None) -> int:
    """Return how many tokens may follow a prompt: those that are requested, or fewer if the context has less room.

    Raise PromptTooLong if there is no room at all.
    """
    room = model.max_context - len(prompt) + 1
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens: a context of {model.max_context} has no room for an answer"
        )
    return room if requested is None else min(room, requested)


def _events(model, tokenizer, order: Order, tokens: Iterator[int], usage: Usage) -> Iterator[list[Event]]:
    reader, search, reason = order.reader(tokenizer), StopSearch(order.stops), "length"
    end_ids = {*model.config.stop_ids, *map(tokenizer.token_id, order.end_tokens)}
    for token_id in tokens:
        if usage.completion_tokens == 0:  # before another use of the model says what it reuses
            usage.cached_tokens = min(model.n_reused, usage.prompt_tokens)
        usage.completion_tokens += 1
        usage.reasoning_tokens += reader.is_reasoning
        if token_id in end_ids:  # it has no text
            reason = "tool_calls" if reader.n_calls else "stop"
            break
        yield list(_until_stop(reader.push(token_id), search))
        if search.is_found:
            break
    last = [] if search.is_found else [*_until_stop(reader.end(), search), *_texts(search.flush())]
    if search.is_found:  # in what the reader or the search had held back, too
        reason = "stop"
    yield [*last, Finished(reason, usage)]


def _until_stop(events: Iterator[Event], search: StopSearch) -> Iterator[Event]:
    """Yield the events before a stop string in the content."""
    for event in events:
        if not isinstance(event, Text) or event.field != CONTENT:
            yield event
        elif not search.is_found:
            yield from _texts(search.push(event.text))


def _texts(text: str) -> list[Text]:
    return [Text(CONTENT, text)] if text else []
