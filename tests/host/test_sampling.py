"""host.sampling against transformers' logits processors, and models that sample."""

import pytest
import torch
from gumbel import expected_noise
from made_up_models import loud_checkpoint, random_token_ids, small_config
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from tunings import ring_tiles, small_tiles

from gpt_oss_megakernel import MegaModel
from host.sampling import GREEDY, Sampling
from interpreter import simulate
from kernels import PhasedModel
from multi_gpu.heap import LocalHeap
from multi_gpu.ranks import RankModel
from system.errors import InputError

CONTEXT = 24
PROMPT = random_token_ids(5, small_config())


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=0.0005),
        dict(temperature=-1.0),
        dict(temperature=101.0),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(min_p=-0.1),
        dict(min_p=2.0),
        dict(seed=2**63),
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match=f"^{next(iter(fields))} "):
        Sampling(**({"temperature": 1.0} | fields))


@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [
        (0, 0.9, 0.0),
        (5, 1.0, 0.0),
        (20, 0.5, 0.0),
        (0, 1.0, 0.1),
        (30, 0.95, 0.02),
        (1, 1.0, 0.0),
        (0, 1e-6, 0.0),
        (1000, 1.0, 1.0),
    ],
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_what_is_left_out_is_what_transformers_leaves_out(temperature, top_k, top_p, min_p):
    logits = torch.randn(100, generator=torch.Generator().manual_seed(8)) * 3
    scores = (logits / temperature)[None]
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    expected = torch.softmax(scores[0], 0)
    found = torch.zeros(100)
    ids, probabilities = Sampling(temperature, 0, top_k, top_p, min_p).likeliest(logits)
    found[ids] = probabilities
    assert (found - expected).abs().max() < 1e-6
    assert (found > 0).equal(expected > 0)


def test_choices_follow_the_probabilities():
    sampling = Sampling(1.0, 4, top_k=6)
    logits = torch.arange(10.0) / 3
    ids, probabilities = sampling.likeliest(logits)
    drawn = torch.tensor([sampling.choose(logits, position) for position in range(20_000)])
    counts = torch.bincount(drawn, minlength=10)
    assert counts[:4].sum() == 0
    chi_square = ((counts[ids] - probabilities * 20_000) ** 2 / (probabilities * 20_000)).sum()
    assert chi_square < 25.7  # once in 10,000 times with 5 degrees of freedom


@pytest.fixture(scope="module")
def checkpoint():
    return loud_checkpoint(small_config(n_layers=2, layer_is_sliding=(True, False), stop_ids=()))


@pytest.fixture(scope="module")
def model(checkpoint):
    return MegaModel(checkpoint, max_context=CONTEXT)


def answer(model, sampling, n: int = 12) -> list[int]:
    return list(model.generate(PROMPT, n, sampling=sampling))


def test_equal_seeds_give_equal_answers(model):
    warm = [answer(model, Sampling(1.5, seed)) for seed in (1, 2, 1)]
    assert warm[0] == warm[2] != warm[1]
    assert answer(model, GREEDY) not in warm


def test_a_low_temperature_gives_the_likeliest_tokens(model):
    assert answer(model, Sampling(0.001, 3)) == answer(model, GREEDY)


def test_sampling_ends_with_its_generation(model):
    """step, decode and the next generation choose the likeliest token again."""
    greedy = answer(model, GREEDY)
    generation = model.generate(PROMPT, 12, sampling=Sampling(5.0, 1))
    next(generation)
    assert model.step(PROMPT[-1], len(PROMPT) - 1) == greedy[0]
    assert list(model.decode(PROMPT[-1], len(PROMPT) - 1, 12)) == greedy
    assert answer(model, GREEDY) == greedy


def test_an_interrupt_while_sampling_is_set_leaves_no_trace(model, monkeypatch):
    """The next greedy answer is greedy, though the temperature was written already."""

    class Interrupted:
        def __setitem__(self, index, value):
            raise KeyboardInterrupt

    greedy = answer(model, GREEDY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "state", model.state._replace(seed=Interrupted()))
        answer(model, Sampling(5.0, 1))
    assert answer(model, GREEDY) == greedy


@pytest.mark.parametrize("tiles", [small_tiles, ring_tiles])
def test_the_number_of_programs_does_not_change_an_answer(tiles, checkpoint):
    sampling, answers = Sampling(1.2, 77), []
    for num_programs in (1, 3, 7):
        model = MegaModel(checkpoint, max_context=CONTEXT, num_programs=num_programs, tuning=tiles(checkpoint.config))
        with simulate(seed=num_programs, detect_races=True) as simulation:
            answers.append(answer(model, sampling, 4))
        assert not [race for race in simulation.races if "grouping.py" not in race]  # which stores equal values twice
    assert answers[0] == answers[1] == answers[2]


def test_separate_phases_draw_the_same(model, checkpoint):
    sampling = Sampling(1.2, 77)
    phased = PhasedModel(checkpoint, max_context=CONTEXT, num_programs=3, weights=model.weights)
    assert answer(phased, sampling, 4) == answer(model, sampling, 4)


@pytest.mark.parametrize("layout, n_ranks", [("tp", 2), ("roles", 3)])
def test_several_gpus_draw_the_same(layout, n_ranks, model, checkpoint):
    sampling = Sampling(1.2, 77)
    heap = LocalHeap(n_ranks, torch.device("cpu"))
    ranks = RankModel(
        checkpoint, layout, n_ranks, range(n_ranks), lambda n_bytes: heap, max_context=CONTEXT, device="cpu"
    )
    assert answer(ranks, sampling, 4) == answer(model, sampling, 4)
    if layout == "tp":
        cut = Sampling(1.2, 77, top_p=0.9)
        assert answer(ranks, cut, 4) == answer(model, cut, 4)


def test_tokens_are_those_that_the_logits_give(model):
    """Each drawn token has the largest of logits / temperature + noise, worked out in float64."""
    rows: list[torch.Tensor] = []
    tokens = list(model.generate(PROMPT, 6, rows.append, Sampling(0.7, 5)))
    for n, token in enumerate(tokens):
        position = len(PROMPT) - 1 + n
        logits = rows[position].double()
        noise = torch.tensor([expected_noise(5, position, row) for row in range(len(logits))], dtype=torch.float64)
        assert token == int((logits / 0.7 + noise).argmax())


def test_left_out_tokens_are_never_drawn(model):
    assert answer(model, Sampling(3.0, 1, top_k=1)) == answer(model, GREEDY)
    sampling, rows = Sampling(2.0, 9, top_k=3), []
    tokens = list(model.generate(PROMPT, 10, rows.append, sampling))
    for token, logits in zip(tokens, rows[len(PROMPT) - 1 :], strict=True):
        assert token in logits.topk(3).indices
    assert tokens == answer(model, sampling, 10)
    assert len(set(tokens)) > 1


def test_a_full_context_ends_an_answer(model):
    for sampling in (Sampling(1.0, 1), Sampling(1.0, 1, top_p=0.9)):
        assert len(answer(model, sampling, 100)) == CONTEXT - len(PROMPT) + 1
