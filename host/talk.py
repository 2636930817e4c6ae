"""Talk with a model from Python: MegaModel.chat and MegaModel.complete, and the answers that they give."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from checkpoints.harmony import Setting
from checkpoints.openai_messages import conversation_of, functions_of
from host.answers import (
    CONTENT,
    CallArguments,
    CallStart,
    Event,
    Finished,
    Order,
    Text,
    ToolCall,
    Usage,
    Whole,
    answer,
    chat_order,
    completion_order,
    whole_of,
)
from host.sampling import Sampling, new_seed
from system.arguments import integer, integer_or_none, integers, number, sequence, text
from system.errors import InputError

INTERRUPTED = "interrupted"  # a finish reason: by Ctrl-C, another signal's exception, or close()


class Answer:
    """An answer that a model gives, which is generated as it is read.

    Iterating over it yields pieces of its text as they come, and `events` those of its reasoning and its calls too.
    Every iteration starts at the answer's beginning. `text`, `reasoning`, `tool_calls`, `message`, `finish_reason` and
    `usage` first read what has not been read yet.

    Reading raises what Decoder.generate raises at a token, such as GenerationOvertaken if the model has been used for
    something else. From then on every iteration yields what had come, and raises it again. An interrupt, such as Ctrl-C
    or a notebook's stop button, ends the answer instead, and so does close(): what had come is all of it.
    """

    def __init__(self, usage: Usage, steps: Iterator[list[Event]], seed: int | None):
        """usage, steps: what host.answers.answer returns. MegaModel.chat and MegaModel.complete make answers."""
        self._usage, self._steps = usage, steps
        self.seed = seed  # which draws this answer again; None if nothing is drawn
        self._events: list[Event] = []
        self._finish_reason: str | None = None
        self._error: Exception | None = None
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of the text as they come, without reasoning and calls."""
        return (event.text for event in self.events() if isinstance(event, Text) and event.field == CONTENT)

    def events(self) -> Iterator[Text | CallStart | CallArguments]:
        """Yield pieces of reasoning, text and calls as they come; Text.field is "reasoning_content" or "content"."""
        n_given = 0
        while self._has_come(n_given):
            yield self._events[n_given]
            n_given += 1

    def _has_come(self, n: int) -> bool:
        """Generate tokens until event n has come. Return False if the answer ends before it."""
        while len(self._events) <= n:
            if not self._read_token(n):
                return False
        return True

    def _read_token(self, n: int) -> bool:
        """Generate one more token, unless another thread has read event n. Return False if the answer has ended."""
        with self._lock:
            if len(self._events) > n:
                return True
            if self._finish_reason is not None:
                return False
            if self._error is not None:
                raise self._error
            try:
                events = next(self._steps)
            except Exception as error:
                self._error = error
                raise
            except BaseException:
                self._finish_reason = INTERRUPTED
                raise
            for event in events:
                if isinstance(event, Finished):
                    self._finish_reason = event.reason
                else:
                    self._events.append(event)
            return True

    def close(self) -> None:
        """End the answer, unless it has ended. Return None; the model is free for others without it, too."""
        with self._lock:
            self._finish_reason = self._finish_reason or INTERRUPTED

    def _whole(self) -> Whole:
        return whole_of(self.events())

    @property
    def text(self) -> str:
        """The whole text, without reasoning and calls."""
        return self._whole().text

    @property
    def reasoning(self) -> str:
        """The whole reasoning."""
        return self._whole().reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls of functions, each with id, name and arguments (JSON, as the model wrote it)."""
        return self._whole().tool_calls

    @property
    def message(self) -> dict:
        """The answer as a message, for the list that goes into the next call of `chat`."""
        return self._whole().as_message()

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: "stop", "length", "tool_calls" or "interrupted"."""
        self._whole()
        return self._finish_reason

    @property
    def usage(self) -> Usage:
        """The answer's tokens: prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens and total_tokens."""
        self._whole()
        return self._usage

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        """Return what has come so far, so that showing an answer generates nothing."""
        return f"Answer(text={whole_of(self._events).text!r}, finish_reason={self._finish_reason!r})"


class Talks:
    """Gives a class derived from Decoder `chat` and `complete`, which take and give text."""

    _open_tokenizer: Callable[[], object] | None = None

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer (tokenizer_util.Tokenizer) of the model that from_pretrained read, None without one.

        It is opened when it is needed. Another one may be set. Raise InputError if its file is no tokenizer.
        """
        return self._open_tokenizer() if self._open_tokenizer else None

    def chat(
        self,
        messages: str | Sequence[Mapping],
        *,
        reasoning: str = "medium",
        date: str | None = None,
        tools: Sequence[Mapping] = (),
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
    ) -> Answer:
        """Return the Answer to a conversation, which is generated as it is read.

        messages: dicts as the OpenAI API takes them, or the text of one message of the user. System and developer
        messages at the start are the developer's instructions; a tool's result is a message of the role "tool".
        reasoning: "low", "medium" or "high".
        date: today's date, YYYY-MM-DD, if the model is to know it.
        tools: functions that the model may call, as the OpenAI API takes them.
        max_tokens: the most tokens of the answer, reasoning included; default: as many as the context has room for.
        temperature, seed, top_k, top_p, min_p: see host.sampling.Sampling; without a seed a new one is drawn.
        stop: strings that end the text before them. They are not looked for in reasoning and calls.

        What the conversation shares with the sequence that the model holds is not fed again. An answer starts using the
        model when it is first read, and is overtaken as Decoder says of generators.

        At the call, raise TypeError for an argument of the wrong type; InputError if one is out of range, a message or
        tool makes no sense, the conversation leaves no room in the context, or the model has no tokenizer or one
        without the tokens of a chat.
        """
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        instructions, history = conversation_of(sequence(given, "messages", "a text or a sequence of dicts"))
        functions = functions_of(sequence(tools, "tools", "a sequence of dicts"))
        date = None if date is None else text(date, "date")
        setting = Setting(text(reasoning, "reasoning"), date, instructions or None, functions)
        limit = integer_or_none(max_tokens, "max_tokens", minimum=1)
        sampling = self._sampling(temperature, seed, top_k, top_p, min_p)
        return self._answer(chat_order(setting, history, limit, sampling, _stops(stop)))

    def complete(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
    ) -> Answer:
        """Return the Answer that continues a text, which is generated as it is read.

        prompt: a text, in which control tokens are text, or token ids. The other arguments and the errors are those of
        `chat`.
        """
        prompt = prompt if isinstance(prompt, str) else integers(prompt, "prompt")
        limit = integer_or_none(max_tokens, "max_tokens", minimum=1)
        sampling = self._sampling(temperature, seed, top_k, top_p, min_p)
        return self._answer(completion_order(prompt, limit, sampling, _stops(stop)))

    def _sampling(self, temperature: float, seed: int | None, top_k: int, top_p: float, min_p: float) -> Sampling:
        temperature, seed = number(temperature, "temperature"), integer_or_none(seed, "seed")
        if seed is None:
            seed = self._new_seed() if temperature else 0
        return Sampling(temperature, seed, integer(top_k, "top_k"), number(top_p, "top_p"), number(min_p, "min_p"))

    def _new_seed(self) -> int:
        return new_seed()

    def _answer(self, order: Order) -> Answer:
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer: from_pretrained reads a checkpoint's, or set model.tokenizer"
            )
        try:
            usage, steps = answer(self, self.tokenizer, order)
        except InputError as error:
            raise InputError(f"{order.param}: {error}") from None
        return Answer(usage, steps, order.sampling.seed if order.sampling.temperature else None)


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings. Raise TypeError if one is no text, InputError if one is empty."""
    given = [stop] if isinstance(stop, str) else sequence(stop, "stop", "a text or a sequence of texts")
    stops = tuple(text(value, f"stop[{n}]") for n, value in enumerate(given))
    if "" in stops:
        raise InputError("stop: a stop string is empty")
    return stops
