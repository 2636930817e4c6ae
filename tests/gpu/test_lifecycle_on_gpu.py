"""The life of a model on a GPU: generators, threads and streams that share it, abnormal ends, logits not finite."""

import pytest
import torch
from made_up_models import loud_checkpoint, small_config
from threads import together

from gpt_oss_megakernel import MegaModel
from system.errors import GenerationOvertaken, LogitsNotFinite, PositionsLost

CONTEXT, N = 64, 12
PROMPT, OTHER = [5, 6, 7, 8, 9, 10], [100, 101, 102]


@pytest.fixture(scope="module")
def checkpoint():
    return loud_checkpoint(small_config(stop_ids=()))


@pytest.fixture(scope="module")
def models(checkpoint):
    return [MegaModel(checkpoint, max_context=CONTEXT) for _ in range(2)]


@pytest.fixture(scope="module")
def expected(checkpoint):
    model = MegaModel(checkpoint, max_context=CONTEXT)
    return {tuple(prompt): list(model.generate(prompt, N)) for prompt in (PROMPT, OTHER)}


def answers(model: MegaModel, prompt: list[int], times: int = 20) -> list[list[int]]:
    return [list(model.generate(prompt, N)) for _ in range(times)]


def test_a_generator_that_was_overtaken_raises(models, expected):
    """A launch is queued ahead when the generator is overtaken."""
    first = models[0].generate(OTHER, N)
    assert next(first) == expected[tuple(OTHER)][0]
    second = models[0].generate(PROMPT, N)
    tokens = [next(second)]
    with pytest.raises(GenerationOvertaken):
        next(first)
    assert tokens + list(second) == expected[tuple(PROMPT)]


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads_with_a_model_each(own_streams, models, expected):
    def use(model, prompt):
        with torch.cuda.stream(torch.cuda.Stream() if own_streams else torch.cuda.current_stream()):
            return answers(model, prompt)

    found = together(lambda: use(models[0], PROMPT), lambda: use(models[1], OTHER))
    assert found == [[expected[tuple(prompt)]] * 20 for prompt in (PROMPT, OTHER)]


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads_that_share_a_model(own_streams, models, expected):
    model = models[0]
    first = model.step(5, 0)

    def steps():
        with torch.cuda.stream(torch.cuda.Stream() if own_streams else torch.cuda.current_stream()):
            return [model.step(5, 0) for _ in range(50)]

    assert together(steps, steps, steps) == [[first] * 50] * 3
    found = together(lambda: answers(model, PROMPT, 1), lambda: answers(model, OTHER, 1))
    for prompt, tokens in zip((PROMPT, OTHER), found, strict=True):
        assert isinstance(tokens, GenerationOvertaken) or tokens == [expected[tuple(prompt)]]
    assert answers(model, PROMPT, 1) == [expected[tuple(PROMPT)]]


def test_models_made_by_two_threads(checkpoint, expected):
    """Each thread compiles, or loads, the kernels that it launches."""
    found = together(*[lambda: answers(MegaModel(checkpoint, max_context=CONTEXT), PROMPT, 1)] * 2)
    assert found == [[expected[tuple(PROMPT)]]] * 2


def test_uses_that_end_amid(models, expected, monkeypatch):
    """A use ends between two launches of a prompt's block, or of an answer."""
    model = models[0]
    model.reset()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for owner, name in ((model.prefill, "_experts"), (model, "_launch")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(model.generate(PROMPT, N))
        with pytest.raises(PositionsLost):
            model.step(5, len(PROMPT) + 3)
        assert answers(model, PROMPT, 1) == [expected[tuple(PROMPT)]]
        model.reset()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token_id", [0, 77, 159])
def test_a_logit_that_is_not_finite(token_id, value, checkpoint):
    """One logit is not finite; launches behind it are queued already."""

    def change(name, tensor):
        if name == "lm_head.weight":
            tensor = tensor.clone()
            tensor[token_id] = value
        return tensor

    model = MegaModel(checkpoint.with_tensors(change), max_context=CONTEXT)
    calls = {
        len(PROMPT) - 1: lambda: list(model.generate(PROMPT, N)),
        3: lambda: model.step(5, 3),
        2: lambda: model.logits(5, 2),
    }
    for position, call in calls.items():
        with pytest.raises(LogitsNotFinite, match=f"at position {position}: "):
            call()
