"""A chat with a model: what was said, and what the model says next."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from checkpoints.harmony import DEFAULT_SETTING, Message, Parser, Piece, Setting, encode, pieces, prompt_parts
from host.answers import PromptTooLong, answer_limit
from host.sampling import GREEDY, Sampling
from system.errors import InputError

FINAL = "final"


@dataclass
class Turn:
    """What one answer took."""

    prompt_tokens: int
    answer_tokens: int = 0
    finish: str = "interrupted"  # "stop" behind a stop token, "length" at the limit or the context's end
    ttft_ms: float | None = None
    tpot_ms: float | None = None  # mean time of the tokens after the first


class Conversation:
    """Keeps the messages of a chat, and feeds them to a model.

    Reasoning is dropped from the history once its answer is complete, as the harmony format asks. The model's cache
    holds the prefix that a prompt shares with the one before it, which is not fed again.
    """

    def __init__(self, model, tokenizer, setting: Setting = DEFAULT_SETTING):
        """model: host.decoder.Decoder. tokenizer: tokenizer_util.Tokenizer. The first answer checks that they fit."""
        self._model, self._tokenizer = model, tokenizer
        self.setting = setting
        self.messages: list[Message] = []
        self.turn: Turn | None = None  # of the last answer

    def reset(self) -> None:
        """Forget all messages and what the model's cache holds of them; the setting stays.

        So a conversation that begins then is answered as by a new model. A prompt that goes on from a cache is fed in
        other blocks, whose sums differ in their last bits.
        """
        self._model.reset()
        self.messages = []

    def change(self, **fields) -> None:
        """Change fields of the setting. Raise InputError for a bad value."""
        self.setting = replace(self.setting, **fields)

    def answer(self, text: str, sampling: Sampling = GREEDY, max_new_tokens: int | None = None) -> Iterator[Piece]:
        """Say something, and yield the model's answer as it comes. What came is kept if the iterator is closed early.

        Raise InputError, and keep nothing, if the conversation does not fit the context or the model cannot chat; at
        a piece what Decoder.generate raises.
        """
        messages = [*self.messages, Message("user", text)]
        prompt = encode(self._tokenizer, prompt_parts(self.setting, messages))
        try:
            limit = answer_limit(self._model, prompt, max_new_tokens)
        except PromptTooLong as error:
            raise InputError(f"{error}; see --max-context") from None
        tokens = self._model.generate(prompt, limit, sampling=sampling)
        return self._answer(messages, len(prompt), limit, tokens)

    def _answer(self, messages: list[Message], n_prompt: int, limit: int, tokens: Iterator[int]) -> Iterator[Piece]:
        turn = self.turn = Turn(n_prompt)
        parser = Parser(self._tokenizer)
        try:
            yield from pieces(self._timed(tokens, turn, limit), parser)
        finally:
            parser.end()
            # Reasoning without an answer behind it is of no use to later turns.
            said = [message for message in parser.messages if message.channel != "analysis" and message.content]
            self.messages = messages + said

    def _timed(self, tokens: Iterator[int], turn: Turn, limit: int) -> Iterator[int]:
        start = first = time.perf_counter()
        for token in tokens:
            now = time.perf_counter()
            turn.answer_tokens += 1
            if turn.answer_tokens == 1:
                first, turn.ttft_ms = now, (now - start) * 1e3
            else:
                turn.tpot_ms = (now - first) * 1e3 / (turn.answer_tokens - 1)
            if token in self._model.config.stop_ids:
                turn.finish = "stop"
            elif turn.answer_tokens == limit:
                turn.finish = "length"
            yield token
