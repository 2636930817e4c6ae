"""host.conversation with a model that says what it is told to."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from shipped import FOLDER

from checkpoints.harmony import Message, Setting, encode, parts_of, prompt_parts
from gpt_oss_megakernel import MegaModel
from host.conversation import Conversation
from host.launch import BLOCKS_CPU
from host.sampling import GREEDY, Sampling
from load_model import open_checkpoint
from system.errors import InputError
from tokenizer_util import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


class Scripted:
    """A model that answers with the next of some lists of messages, and remembers its prompts."""

    def __init__(self, tokenizer, *answers: list[Message], max_context: int = 500):
        self.tokenizer, self.answers, self.max_context = tokenizer, list(answers), max_context
        self.stop_id = tokenizer.token_id("<|return|>")
        self.config = SimpleNamespace(stop_ids=(self.stop_id, tokenizer.token_id("<|call|>")))
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.n_resets = 0

    def reset(self):
        self.n_resets += 1

    def generate(self, prompt, n, sampling=GREEDY):
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        ids = [token for message in self.answers.pop(0) for token in encode(self.tokenizer, parts_of(message))]
        start = len(encode(self.tokenizer, prompt_parts(Setting(), [])[-2:]))
        is_call = ids[-1] in self.config.stop_ids
        yield from (ids[start:] if is_call else [*ids[start:-1], self.stop_id])[:n]


def said(*contents: str) -> list[Message]:
    """Return reasoning and an answer, or an answer alone."""
    channels = ("analysis", "final")[-len(contents) :]
    return [Message("assistant", content, channel) for content, channel in zip(contents, channels)]


def test_an_answer_and_its_history(tokenizer):
    model = Scripted(tokenizer, said("hm", "b"), said("d"))
    conversation = Conversation(model, tokenizer)
    found = list(conversation.answer("a"))
    assert "".join(piece.text for piece in found) == "hmb"
    assert [piece.channel for piece in found] == ["analysis"] * (len(found) - 1) + ["final"]
    assert conversation.messages == [Message("user", "a"), *said("b")]
    assert "".join(p.text for p in conversation.answer("c", Sampling(1.0, 4))) == "d"
    history = [Message("user", "a"), *said("b"), Message("user", "c")]
    assert model.prompts[1] == encode(tokenizer, prompt_parts(Setting(), history))
    assert model.samplings == [GREEDY, Sampling(1.0, 4)]
    assert (conversation.turn.finish, conversation.turn.prompt_tokens) == ("stop", len(model.prompts[1]))
    conversation.reset()
    assert conversation.messages == [] and model.n_resets == 1


def test_a_conversation_repeats_bit_for_bit_after_a_reset(tokenizer):
    """Though the one between them shares the beginning of its prompt, so that less would be fed, in another way."""
    blocks = dataclasses.replace(BLOCKS_CPU, min_tokens=8)  # of which 73 and 18 have fewer behind them
    model = MegaModel(open_checkpoint(FOLDER), max_context=80, kv_dtype=torch.float32, blocks=blocks)
    conversation, sampling = Conversation(model, tokenizer), Sampling(1.5, seed=5)
    answers, caches = [], []
    for sonnet in (18, 73, 18):
        pieces = conversation.answer(f"Recite sonnet {sonnet}.", sampling, max_new_tokens=4)
        answers.append([piece.text for piece in pieces])
        caches.append(model.state.v_cache[:, :, : model.n_fed].clone())
        conversation.reset()
    assert answers[0] == answers[2]
    assert torch.equal(caches[0], caches[2])


def test_a_prompt_begins_with_the_one_before(tokenizer):
    """So that the cache holds all but what is new, reasoning aside."""
    model = Scripted(tokenizer, said("b"), said("d"))
    conversation = Conversation(model, tokenizer)
    list(conversation.answer("a"))
    list(conversation.answer("c"))
    first, second = model.prompts
    assert second[: len(first)] == first


def test_the_setting_changes_the_next_prompt(tokenizer):
    model = Scripted(tokenizer, said("b"), said("d"))
    conversation = Conversation(model, tokenizer)
    list(conversation.answer("a"))
    conversation.change(reasoning="high", instructions="Be brief.")
    list(conversation.answer("c"))
    assert "Reasoning: high" in tokenizer.decode(model.prompts[1])
    assert "# Instructions\n\nBe brief." in tokenizer.decode(model.prompts[1])
    with pytest.raises(InputError, match="huge"):
        conversation.change(reasoning="huge")
    assert conversation.setting.reasoning == "high"


def test_an_answer_that_is_cut(tokenizer):
    conversation = Conversation(Scripted(tokenizer, said("thinking", "b")), tokenizer)
    list(conversation.answer("a", max_new_tokens=5))
    assert (conversation.turn.finish, conversation.turn.answer_tokens) == ("length", 5)
    assert conversation.messages == [Message("user", "a")]  # reasoning alone is of no use


def test_an_answer_that_is_interrupted_keeps_what_came(tokenizer):
    conversation = Conversation(Scripted(tokenizer, said("one two three four")), tokenizer)
    pieces = conversation.answer("a")
    with contextlib.closing(pieces):
        text = next(pieces).text + next(pieces).text
    assert conversation.turn.finish == "interrupted"
    assert conversation.messages == [Message("user", "a"), *said(text)]


def test_the_context_limits_an_answer(tokenizer):
    length = len(encode(tokenizer, prompt_parts(Setting(), [Message("user", "a")])))
    conversation = Conversation(Scripted(tokenizer, said("many words"), max_context=length + 4), tokenizer)
    list(conversation.answer("a"))
    assert (conversation.turn.finish, conversation.turn.answer_tokens) == ("length", 5)


def test_a_conversation_that_does_not_fit_is_refused_and_stays(tokenizer):
    conversation = Conversation(Scripted(tokenizer, max_context=20), tokenizer)
    with pytest.raises(InputError, match="a context of 20 has no room for an answer; see --max-context"):
        conversation.answer("a")
    assert conversation.messages == []


def test_calls_stay_in_the_history(tokenizer):
    call = Message("assistant", "{}", "commentary", recipient="functions.f", content_type="json")
    conversation = Conversation(Scripted(tokenizer, [*said("hm", "x")[:1], call]), tokenizer)
    list(conversation.answer("a"))
    assert conversation.messages == [Message("user", "a"), call]
    assert conversation.turn.finish == "stop"
