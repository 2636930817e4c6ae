"""A model's answers to text, for Python: what is said, as it comes, and what it took."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from checkpoints.harmony import Message, Setting
from host.answers import CONTENT, Finished, Order, Text, answer, chat_order, completion_order
from host.sampling import GREEDY, Sampling, new_seed
from system.errors import InputError

INSTRUCTING = ("system", "developer")  # roles
ROLES = (*INSTRUCTING, "user", "assistant")


@dataclass(frozen=True)
class Usage:
    """The tokens that an answer took."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, that the model's cache held
    answer_tokens: int
    reasoning_tokens: int


class Answer:
    """A model's answer, generated as it is read: iterate over the pieces of its text, or ask for the whole.

    `text`, `reasoning`, `finish_reason` and `usage` read what is left of it first. An answer that nobody reads costs
    nothing. Another use of the model ends one that is not complete: reading on raises GenerationOvertaken.
    """

    def __init__(self, model, tokenizer, order: Order):
        """Raise InputError if the prompt cannot be encoded or does not fit the context."""
        self._events = answer(model, tokenizer, order)
        self._parts: dict[str, list[str]] = {}
        self._finished: Finished | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield the text as it comes, without reasoning. At a piece, raise what Decoder.generate raises."""
        return (part.text for part in self.parts() if part.field == CONTENT)

    def parts(self) -> Iterator[Text]:
        """Yield text and reasoning as they come: each has a `field`, "content" or "reasoning_content", and a `text`."""
        for events in self._events:
            for event in events:
                if isinstance(event, Finished):
                    self._finished = event
                elif isinstance(event, Text):
                    self._parts.setdefault(event.field, []).append(event.text)
                    yield event

    def _read(self) -> Finished:
        for _ in self.parts():
            pass
        if self._finished is None:
            raise InputError("the answer was not read to its end, and cannot be read on")
        return self._finished

    def _whole(self, field: str) -> str:
        self._read()
        return "".join(self._parts.get(field, ()))

    @property
    def text(self) -> str:
        """The whole text, without reasoning."""
        return self._whole(CONTENT)

    @property
    def reasoning(self) -> str:
        """What the model said to itself first."""
        return self._whole("reasoning_content")

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: "stop", or "length" if a limit or the context cut it."""
        return self._read().reason

    @property
    def usage(self) -> Usage:
        """The tokens that the answer took."""
        end = self._read()
        return Usage(end.prompt_tokens, end.cached_tokens, end.answer_tokens, end.reasoning_tokens)


def drawing(
    temperature: float = 0.0, seed: int | None = None, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Sampling:
    """Return how tokens are drawn, with a new seed if none is given. Raise InputError for a value out of range."""
    if temperature == 0:
        return GREEDY
    return Sampling(temperature, new_seed() if seed is None else seed, top_k, top_p, min_p)


def chat_order_of(
    messages: Sequence[Mapping[str, str]],
    reasoning: str,
    date: str | None,
    limit: int | None,
    sampling: Sampling,
    stops: Sequence[str],
) -> Order:
    """Return the order of a conversation's next message. See Decoder.chat for the arguments and what is raised."""
    instructions, said = harmony_messages(messages)
    return chat_order(Setting(reasoning, date, instructions), said, limit, sampling, texts(stops, "stop"))


def completion_order_of(text: str, limit: int | None, sampling: Sampling, stops: Sequence[str]) -> Order:
    """Return the order of a text's continuation. Raise TypeError if it is none."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    return completion_order(text, limit, sampling, texts(stops, "stop"))


def texts(values: Sequence[str], name: str) -> tuple[str, ...]:
    """Return texts, none of which may be empty; one text is a sequence of one."""
    values = (values,) if isinstance(values, str) else tuple(values)
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} must be a text, or a sequence of texts")
    if not all(values):
        raise InputError(f"{name}: an empty text")
    return values


def harmony_messages(messages: Sequence[Mapping[str, str]]) -> tuple[str | None, list[Message]]:
    """Return the instructions, which system and developer messages at the beginning are, and the messages behind them.

    messages: dictionaries with a role and a content, as the OpenAI API has them. Raise TypeError for another type, and
    InputError, naming the message, for a role that is unknown or an instruction behind other messages.
    """
    instructions, said = [], []
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise TypeError(f"messages[{n}] must be a dict with the texts 'role' and 'content'")
        role, content = message["role"], message["content"]
        if role not in ROLES or (role in INSTRUCTING and said):
            allowed = ROLES if role not in ROLES else ROLES[2:]
            raise InputError(f"messages[{n}]: role {role!r}: expected one of {', '.join(allowed)}")
        if role in INSTRUCTING:
            instructions.append(content)
        else:
            said.append(Message(role, content, "final" if role == "assistant" else None))
    return "\n\n".join(filter(None, instructions)) or None, said
