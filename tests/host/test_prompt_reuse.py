"""MegaModel.generate feeds what a prompt has not in common with the sequence before it, and nothing else.

What is fed is counted; the tokens are those of a model that knew nothing before.
"""

import dataclasses
import functools

import pytest
import torch
from made_up_models import loud_checkpoint, random_token_ids, small_config

from gpt_oss_megakernel import MegaModel
from host.launch import BLOCKS_CPU
from system.errors import InputError

CONTEXT, BLOCK, WINDOW = 28, 6, 8
PROMPT = 14  # tokens: more than the window and than two blocks


@pytest.fixture(scope="module")
def checkpoint():
    sizes = dict(n_layers=2, layer_is_sliding=(True, False), sliding_window=WINDOW, stop_ids=())
    return loud_checkpoint(small_config(**sizes))


def make_model(checkpoint, quant: bool = False) -> MegaModel:
    blocks = dataclasses.replace(BLOCKS_CPU, tokens=BLOCK)
    return MegaModel(checkpoint, quant, CONTEXT, kv_dtype=torch.float32, blocks=blocks)


@pytest.fixture(scope="module")
def fresh(checkpoint):
    """Return a function: the tokens of a model that was fed nothing before."""
    model = make_model(checkpoint)

    @functools.cache
    def answer(prompt: tuple[int, ...], n: int) -> list[int]:
        model.reset()
        return list(model.generate(prompt, n))

    return lambda prompt, n: answer(tuple(prompt), n)


@pytest.fixture
def prompt(checkpoint):
    return random_token_ids(PROMPT, checkpoint.config)


class Watched:
    """A model, and the positions that it was fed, in order."""

    def __init__(self, model: MegaModel, monkeypatch: pytest.MonkeyPatch):
        self.model, self._monkeypatch = model, monkeypatch
        self._watch()

    def _watch(self) -> None:
        self.positions, self.blocks = [], []
        model, feed_block, launch = self.model, self.model.prefill._feed_block, self.model._launch

        def watched_block(position, n):
            self.positions += range(position, position + n)
            self.blocks.append(n)
            feed_block(position, n)

        def watched_launch(position, *args, **options):
            self.positions.append(position)
            launch(position, *args, **options)

        self._monkeypatch.setattr(model.prefill, "_feed_block", watched_block)
        self._monkeypatch.setattr(model, "_launch", watched_launch)

    def switch_path(self, quant: bool) -> None:
        self._monkeypatch.undo()
        self.model.switch_path(quant)
        self._watch()

    def generate(self, prompt: list[int], n: int) -> tuple[list[int], list[int]]:
        """Return (tokens, positions fed)."""
        self.positions.clear()
        return list(self.model.generate(prompt, n)), list(self.positions)


@pytest.fixture
def watched(checkpoint, monkeypatch):
    return Watched(make_model(checkpoint), monkeypatch)


def assert_goes_on(watched: Watched, fresh, prompt: list[int], held: int, n: int = 3) -> None:
    """Assert that positions from `held` on are each fed once: the prompt's, and the answer's except the last."""
    tokens, fed = watched.generate(prompt, n)
    assert fed == list(range(held, len(prompt) - 1 + n))
    assert tokens == fresh(prompt, n)


def other_than(token_id: int) -> int:
    return (token_id + 1) % 160


def test_a_first_prompt_is_fed_in_blocks(watched, fresh, prompt):
    assert_goes_on(watched, fresh, prompt, held=0)
    assert watched.blocks == [6, 6, 1]  # but for its last token


def test_the_same_prompt_again_feeds_its_last_token(watched, fresh, prompt):
    """The prompt's last token is fed again, because what follows it is not known."""
    for held in (0, PROMPT - 1, PROMPT - 1):
        assert_goes_on(watched, fresh, prompt, held)


def test_a_conversation_feeds_only_what_is_new(watched, fresh, prompt):
    """Each turn begins with the previous one and its answer, whose last token has not been fed."""
    start, held = prompt[:6], 0
    for turn in range(3):
        tokens, fed = watched.generate(start, 4)
        assert fed == list(range(held, len(start) + 3))
        assert tokens == fresh(start, 4)
        held = len(start) + 3
        start = start + tokens + prompt[6 + turn : 9 + turn]


@pytest.mark.parametrize("n", [1, 2, 9, PROMPT - 1])
def test_a_prompt_that_the_cache_holds_more_of(n, watched, fresh, prompt):
    watched.generate(prompt, 4)
    assert_goes_on(watched, fresh, prompt[:n], held=n - 1)
    # Of the longer one no more is held than the shorter one, and of its answer what happens to be the same.
    answer = fresh(prompt[:n], 4)[:3]
    same = next((i for i, (a, b) in enumerate(zip(answer, prompt[n:])) if a != b), min(3, PROMPT - n))
    assert_goes_on(watched, fresh, prompt, held=min(n + same, PROMPT - 1))


@pytest.mark.parametrize("at", [0, 1, 5, 6, 11, PROMPT - 2, PROMPT - 1])
def test_a_prompt_is_fed_from_the_first_difference_on(at, watched, fresh, prompt):
    """One token differs and all later ones are equal; those must not be taken from the cache."""
    watched.generate(prompt, 4)
    differing = [*prompt[:at], other_than(prompt[at]), *prompt[at + 1 :]]
    assert_goes_on(watched, fresh, differing, held=at)
    assert_goes_on(watched, fresh, prompt, held=at)


def test_nothing_in_common(watched, fresh, prompt):
    watched.generate(prompt, 4)
    others = [other_than(token) for token in prompt]
    assert_goes_on(watched, fresh, others, held=0)


@pytest.mark.parametrize("n_new", [1, 2, 3, 4, 9])
def test_few_new_tokens_are_fed_one_by_one(n_new, watched, fresh, prompt):
    """Tokens too few for a block are fed one by one."""
    watched.generate(prompt[:5], 1)
    watched.blocks.clear()
    assert_goes_on(watched, fresh, prompt[: 5 + n_new], held=5)
    in_blocks = n_new - 1  # the last one by the kernel
    assert sum(watched.blocks) == (in_blocks if in_blocks >= BLOCKS_CPU.min_tokens else 0)


@pytest.mark.parametrize("taken", [1, 3])
@pytest.mark.parametrize("closed", [True, False])
def test_an_answer_that_was_not_waited_for(taken, closed, watched, fresh, prompt):
    answer = watched.model.generate(prompt, 9)
    tokens = [next(answer) for _ in range(taken)]
    if closed:
        answer.close()
    longer = prompt + tokens + prompt[:5]
    assert_goes_on(watched, fresh, longer, held=PROMPT + taken - 1)


def test_a_generator_that_never_ran(watched, fresh, prompt):
    watched.generate(prompt, 4)
    watched.model.generate(prompt[::-1], 4)
    assert_goes_on(watched, fresh, prompt, held=PROMPT - 1)


@pytest.mark.parametrize("differs_at", [5, PROMPT - 1])
def test_an_answer_of_no_tokens_feeds_nothing(differs_at, watched, fresh, prompt):
    """The cache does not hold what such a prompt did not feed, though the prompt stands among the tokens."""
    watched.generate(prompt, 6)
    differing = [*prompt[:differs_at], other_than(prompt[differs_at]), *prompt[differs_at + 1 :]]
    tokens, fed = watched.generate(differing, 0)
    assert (tokens, fed) == ([], list(range(differs_at, PROMPT - 1)))
    assert_goes_on(watched, fresh, differing + prompt[:6], held=PROMPT - 1)


def test_a_stop_token_is_not_fed(checkpoint, fresh, prompt, monkeypatch):
    """A prompt that goes on behind a stop token feeds it, and finds what came before it in the cache."""
    answer = fresh(prompt, 4)
    stop = next(token for token in answer if token not in answer[: answer.index(token)] and token != answer[0])
    n = answer.index(stop) + 1
    watched = Watched(make_model(checkpoint.with_config(stop_ids=(stop,))), monkeypatch)
    tokens, fed = watched.generate(prompt, 9)
    assert tokens == answer[:n]
    assert fed == list(range(PROMPT + n - 1))
    longer = prompt + tokens + prompt[:4]
    tokens, fed = watched.generate(longer, 1)
    assert fed == list(range(PROMPT + n - 1, len(longer)))
    assert tokens == fresh(longer, 1)


def test_after_a_reset(watched, fresh, prompt):
    watched.generate(prompt, 4)
    watched.model.reset()
    assert_goes_on(watched, fresh, prompt, held=0)


@pytest.mark.parametrize("call", ["step", "logits", "hidden", "decode"])
@pytest.mark.parametrize("token", ["the same", "another"])
@pytest.mark.parametrize("position", [0, 7, PROMPT - 1])
def test_a_step_back_forgets_what_came_after(call, token, position, watched, fresh, prompt):
    """What came after a position that was fed again is forgotten; so is that position, if not all layers were fed."""
    watched.generate(prompt, 4)
    model, token_id = watched.model, prompt[position] if token == "the same" else other_than(prompt[position])
    if call == "hidden":
        model.hidden(token_id, position, 1)
    elif call == "decode":
        assert len(list(model.decode(token_id, position, 1))) == 1
    else:
        getattr(model, call)(token_id, position)
    held = position + (token == "the same" and call != "hidden")
    assert_goes_on(watched, fresh, prompt, held=min(held, PROMPT - 1))


def test_a_step_behind_a_gap_is_not_held(watched, fresh, prompt):
    """Keys behind a gap come from positions never fed, or forgotten, though their tokens still stand there."""
    watched.generate(prompt[:5], 1)
    watched.model.step(prompt[9], 9)
    assert_goes_on(watched, fresh, prompt, held=5)
    watched.model.reset()
    watched.model.step(prompt[9], 9)
    assert_goes_on(watched, fresh, prompt, held=0)


def test_steps_count_as_fed(watched, fresh, prompt):
    for position, token_id in enumerate(prompt[:7]):
        watched.model.step(token_id, position)
    assert_goes_on(watched, fresh, prompt, held=7)


def test_another_path_reuses_nothing(checkpoint, watched, fresh, prompt):
    """The cache holds another path's keys and values, whatever tokens a new state begins with."""
    prompt = [0, 0, *prompt[2:]]
    watched.generate(prompt, 4)
    watched.switch_path(quant=True)
    tokens, fed = watched.generate(prompt, 4)
    assert fed == list(range(PROMPT + 3))
    assert tokens == list(make_model(checkpoint, quant=True).generate(prompt, 4))
    watched.switch_path(quant=False)
    assert_goes_on(watched, fresh, prompt, held=0)


def test_all_logits_need_all_positions(watched, fresh, prompt):
    """The prompt's positions are all fed, none is taken from the cache; afterwards the cache holds them."""
    watched.generate(prompt, 4)
    watched.positions.clear()
    rows = []
    tokens = list(watched.model.generate(prompt, 3, on_logits=lambda row: rows.append(int(row.argmax()))))
    assert watched.positions == list(range(PROMPT + 2))
    assert len(rows) == PROMPT + 2
    assert tokens == rows[-3:] == fresh(prompt, 3)
    assert_goes_on(watched, fresh, prompt + tokens[:2] + prompt[:4], held=PROMPT + 2)


def test_a_full_context_has_one_token_of_answer(watched, fresh, checkpoint):
    """A prompt as long as the context has an answer of one token."""
    full = random_token_ids(CONTEXT, checkpoint.config, seed=9)
    for held in (0, CONTEXT - 1):
        tokens, fed = watched.generate(full, 5)
        assert fed == list(range(held, CONTEXT))
        assert len(tokens) == 1
        assert tokens == fresh(full, 5)


def test_an_answer_that_fills_the_context(watched, fresh, prompt):
    tokens, fed = watched.generate(prompt, 99)
    assert fed == list(range(CONTEXT))
    assert len(tokens) == CONTEXT - PROMPT + 1
    again, fed = watched.generate((prompt + tokens)[:CONTEXT], 5)
    assert fed == [CONTEXT - 1]
    assert again == tokens[-1:]


REFUSED = {
    "longer than the context": lambda prompt: [*prompt, *prompt, 7],
    "longer, with nothing in common": lambda prompt: [other_than(token) for token in prompt * 3],
    "empty": lambda prompt: [],
    "beyond the vocabulary": lambda prompt: [*prompt, 160],
    "a negative id": lambda prompt: [-1, *prompt],
}


@pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED.keys())
def test_a_prompt_that_is_refused_does_no_harm(bad, watched, fresh, prompt):
    """Positions that the cache holds stay held."""
    tokens, _ = watched.generate(prompt, 4)
    watched.positions.clear()
    with pytest.raises(InputError):
        list(watched.model.generate(bad(prompt), 4))
    assert watched.positions == []
    assert_goes_on(watched, fresh, prompt + tokens[:3] + prompt[:3], held=PROMPT + 3)


def test_an_interrupted_prompt_counts_the_blocks_before(watched, fresh, prompt, monkeypatch):
    """Ctrl-C comes in the second block: the first one counts, and so do positions held before."""
    watched.generate(prompt[:6], 1)
    feed_block, blocks = watched.model.prefill._feed_block, []

    def interrupted(position, n):
        blocks.append(n)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        feed_block(position, n)

    with monkeypatch.context() as patch:
        patch.setattr(watched.model.prefill, "_feed_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(watched.model.generate(prompt, 4))
    assert_goes_on(watched, fresh, prompt, held=6 + blocks[0])


@pytest.mark.parametrize("n_blocks", [0, 1, 2])
def test_what_on_block_raises_ends_the_prompt(n_blocks, watched, fresh, prompt):
    """The blocks before it are held."""
    calls = []

    def stop():
        if len(calls) == n_blocks:
            raise ValueError("enough")
        calls.append(len(watched.positions))

    watched.model.reset()
    watched.positions.clear()
    with pytest.raises(ValueError, match="enough"):
        list(watched.model.generate(prompt, 4, on_block=stop))
    n_fed = len(watched.positions)
    assert n_fed == n_blocks * watched.model.prefill.tokens
    assert calls == [n * watched.model.prefill.tokens for n in range(n_blocks)]
    assert_goes_on(watched, fresh, prompt, held=n_fed)


def test_a_callback_that_fails_keeps_the_positions_it_saw(watched, fresh, prompt):
    """The positions that the callback has seen are held."""
    seen = []

    def fail(row):
        seen.append(row)
        if len(seen) == 5:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        list(watched.model.generate(prompt, 4, on_logits=fail))
    assert_goes_on(watched, fresh, prompt, held=5)


def test_a_launch_that_fails_holds_no_position(watched, fresh, prompt, monkeypatch):
    """The position that the launch was to feed is not held."""
    watched.generate(prompt[:6], 1)
    launch = watched.model._launch

    def failing(position, *args, **options):
        if position == 8:
            raise RuntimeError("no such luck")
        launch(position, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(watched.model, "_launch", failing)
        with pytest.raises(RuntimeError, match="no such luck"):
            list(watched.model.generate(prompt[:6] + prompt[6:9], 4))
    assert_goes_on(watched, fresh, prompt, held=8)
