"""A model that says what it is told to, and a server around it on a thread of this process."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import openai

from checkpoints.config import check_token
from checkpoints.harmony import Message, encode, parts_of
from endpoint.app import Endpoint, Settings
from endpoint.server import Server, address_of, bound_socket
from endpoint.worker import Worker
from host.sampling import Sampling

SECONDS = 30  # that anything may take on a loaded machine
KEY = "not-checked"
BLOCK = 10  # tokens of a prompt
JSON = {"Content-Type": "application/json"}


def answer_ids(tokenizer, *messages: Message) -> list[int]:
    """Return an answer's tokens, behind a prompt that ends with the assistant's name."""
    parts = [part for message in messages for part in parts_of(message)]
    ids = encode(tokenizer, parts)[1 + len(tokenizer.encode_plain("assistant")) :]
    return ids if messages[-1].recipient else [*ids[:-1], tokenizer.token_id("<|return|>")]


def said(content: str, reasoning: str | None = None) -> list[Message]:
    """Return an answer's messages."""
    before = [Message("assistant", reasoning, "analysis")] if reasoning else []
    return [*before, Message("assistant", content, "final")]


class PreparedModel:
    """Stands for host.decoder.Decoder. Its answers are `answers`, one after another, then the last one forever."""

    def __init__(self, tokenizer, max_context: int = 1000):
        self.tokenizer, self.max_context = tokenizer, max_context
        self.config = SimpleNamespace(stop_ids=(tokenizer.token_id("<|return|>"),), vocab_size=tokenizer.vocab_size)
        self.n_reused = 0
        self.restore()

    def restore(self) -> None:
        """Forget what a test has set and seen."""
        self.answers: list[list[int]] = [answer_ids(self.tokenizer, *said("a b c", "hm"))]
        self.token_seconds = self.block_seconds = 0.0
        self.error: Exception | None = None  # that the next answer raises after two tokens
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.n_tokens = self.n_blocks = self.n_resets = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def say(self, *messages: Message) -> None:
        """Set the next answers to one."""
        self.answers = [answer_ids(self.tokenizer, *messages)]

    def reset(self) -> None:
        self.n_resets += 1

    def generate(
        self, prompt: Sequence[int], n: int, sampling: Sampling, on_block: Callable[[], None] | None = None
    ) -> Iterator[int]:
        for token_id in prompt:
            check_token(token_id, self.config)
        return self._generate(prompt, n, sampling, on_block)

    def _generate(
        self, prompt: Sequence[int], n: int, sampling: Sampling, on_block: Callable[[], None] | None
    ) -> Iterator[int]:
        self.prompts.append(list(prompt))
        self.samplings.append(sampling)
        for _ in prompt[::BLOCK] if on_block else ():
            on_block()
            self.n_blocks += 1
            time.sleep(self.block_seconds)
        ids = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        for count, token_id in enumerate(ids[:n]):
            if self.error and count == 2:
                error, self.error = self.error, None
                raise error
            assert self.may_go_on.wait(SECONDS)
            time.sleep(self.token_seconds)
            self.n_tokens += 1
            yield token_id


@dataclass
class Serving:
    """A server that runs."""

    url: str
    port: int
    worker: Worker
    drain: Callable[[], None]

    def client(self, **options) -> openai.OpenAI:
        """Return a client that sends each request once."""
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": SECONDS} | options
        )


@contextlib.contextmanager
def serving(model, max_waiting: int = 32, drain_seconds: float = 5, **settings) -> Iterator[Serving]:
    """Serve a model in the body."""
    bound, ready, loop = bound_socket("127.0.0.1", 0), threading.Event(), asyncio.new_event_loop()
    worker = Worker(model, model.tokenizer, max_waiting)
    server = Server(Endpoint(worker, Settings("prepared", **settings)).app(), worker, ready.set, drain_seconds)
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([bound])), daemon=True)
    url, port = address_of(bound), bound.getsockname()[1]
    thread.start()
    try:
        assert ready.wait(SECONDS)
        yield Serving(url, port, worker, lambda: loop.call_soon_threadsafe(server.drain))
    finally:
        loop.call_soon_threadsafe(server.drain)
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server does not end"
        loop.close()


def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait until a condition holds. AssertionError if it does not within these seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)
