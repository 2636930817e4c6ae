"""Each mistake that an implementation of GPT-OSS could make exceeds the tolerance of test_reference.py by far."""

import pytest
import torch
import transformers_model
from checkpoint_mutations import CHECKPOINT_MUTATIONS
from made_up_models import loud_checkpoint, random_token_ids, small_config
from reference_mutations import REFERENCE_MUTATIONS

import reference
from checkpoints.checkpoint import write_checkpoint
from reference import Reference

TOLERANCE = 1e-3  # test_reference.py's
# By how much a mistake shows in the worst logit of half the tokens or more: the worst of all may be one token near a
# tie of the router, which any rounding sends to another expert. The mildest, YaRN truncated, reaches 3e-2, others 0.5.
CLEAR_MARGIN = 10 * TOLERANCE
TOKENS = 64


@pytest.fixture(scope="module")
def checkpoint():
    return loud_checkpoint(small_config())


@pytest.fixture(scope="module")
def token_ids(checkpoint):
    return random_token_ids(TOKENS, checkpoint.config)


@pytest.fixture(scope="module")
def expected(checkpoint, token_ids, tmp_path_factory):
    """Return transformers' logits of the unmutated checkpoint."""
    folder = write_checkpoint(checkpoint, tmp_path_factory.mktemp("checkpoint"))
    return transformers_model.logits(transformers_model.load(folder), token_ids)


def difference(checkpoint, token_ids, expected) -> torch.Tensor:
    return Reference(checkpoint, kv_dtype=None, max_context=TOKENS).forward(token_ids) - expected


def assert_far_off(difference: torch.Tensor) -> None:
    assert difference.abs().amax(-1).median() > CLEAR_MARGIN


def test_without_a_mistake(checkpoint, token_ids, expected):
    assert difference(checkpoint, token_ids, expected).abs().max() < TOLERANCE


def test_no_token_is_near_a_tie_of_the_router(checkpoint, token_ids):
    exact, rounded = {}, {}
    Reference(checkpoint, kv_dtype=None, max_context=TOKENS).forward(token_ids, trace=exact)
    Reference(checkpoint, kv_dtype=torch.bfloat16, max_context=TOKENS).forward(token_ids, trace=rounded)
    for layer in range(checkpoint.config.n_layers):
        name = f"layers.{layer}.router_logits"
        logits = exact[name].sort(-1, descending=True).values
        assert (logits[:, 3] - logits[:, 4]).min() > 5e-3
        chosen, chosen_rounded = (reference.route(trace[name], 4)[0].sort(-1).values for trace in (exact, rounded))
        assert torch.equal(chosen, chosen_rounded)


@pytest.mark.parametrize("mutation", CHECKPOINT_MUTATIONS.values(), ids=CHECKPOINT_MUTATIONS.keys())
def test_mistake_in_checkpoint_or_config_is_caught(mutation, checkpoint, token_ids, expected):
    assert_far_off(difference(mutation(checkpoint), token_ids, expected))


@pytest.mark.parametrize("function, replacement", REFERENCE_MUTATIONS.values(), ids=REFERENCE_MUTATIONS.keys())
def test_mistake_in_code_is_caught(function, replacement, checkpoint, token_ids, expected, monkeypatch):
    monkeypatch.setattr(reference, function, replacement)
    assert_far_off(difference(checkpoint, token_ids, expected))


def test_mutated_rope_rows_are_what_interleaved_code_computes(checkpoint, token_ids, monkeypatch):
    """A permutation of rows stands exactly for the code, so that it tests other implementations too."""
    mutated = CHECKPOINT_MUTATIONS["interleaved RoPE"](checkpoint)
    by_checkpoint = Reference(mutated, kv_dtype=None, max_context=TOKENS).forward(token_ids)
    monkeypatch.setattr(reference, *REFERENCE_MUTATIONS["interleaved RoPE, in code"])
    assert difference(checkpoint, token_ids, by_checkpoint).abs().max() < TOLERANCE
