"""Prompts in blocks at 120b's width, against the same tokens fed one by one."""

import pytest
import torch
from test_megakernel_on_gpu import CUDA, F32, endless, relative_rms

from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import FP8_GROUPS, FP8_ROWS, GPT_OSS_120B, DenseFormats
from gpt_oss_megakernel import MegaModel

LENGTHS = [1, 2, 127, 128, 129, 1000, 5000]
# The experts' vectors are float16, 2^-12 of each element; measured 5e-4 to 3e-3.
TOLERANCE = 5e-3
# With --quant that is enough to round an activation in thousands to the other E4M3 neighbour, 2^-4 of it, in all the
# tokens that a token attends to: measured 0.04 to 0.05, and 0.3 where a token's fourth and fifth expert nearly tie.
# So a logit must be roughly right, and most tokens' keys nearly.
QUANT_TOLERANCE, QUANT_KEYS_TOLERANCE = 0.5, 0.05


@pytest.fixture(scope="module")
def checkpoint():
    return RandomCheckpoint(endless(GPT_OSS_120B.cut(3)), device=CUDA)


@pytest.fixture(scope="module", params=[False, True], ids=["default", "quant"])
def model(checkpoint, request):
    """The context is a multiple of 16 positions, for which Triton compiles the kernel that other tests use."""
    return MegaModel(checkpoint, request.param, max_context=LENGTHS[-1] + 8)


@pytest.fixture(scope="module")
def token_ids(checkpoint):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(checkpoint.config.vocab_size, (LENGTHS[-1],), generator=generator).tolist()


@pytest.fixture(scope="module")
def one_by_one(model, token_ids):
    """Return (logits of the last position of each prompt, the cached keys) of the longest prompt."""
    model.reset()
    found, start = {}, 0
    for n in LENGTHS:
        model._write_tokens(token_ids[start : n - 1], start)
        for position in range(start, n - 1):
            model._feed(position)
        found[n] = model.logits(token_ids[n - 1], n - 1)
        start = n
    return found, model.state.k_cache.clone()


def logits_after(model: MegaModel, token_ids: list[int], held: int = 0) -> torch.Tensor:
    last = len(token_ids) - 1
    model._write_tokens(token_ids[held:], held)
    if last > held:
        model.prefill.feed(held, last - held)
    return model.logits(token_ids[-1], last)


def assert_same(model: MegaModel, logits: torch.Tensor, one_by_one, n: int) -> None:
    """Assert that the logits after a prompt of n tokens, and the keys of each token, agree."""
    error = relative_rms(logits, one_by_one[0][n])
    keys, expected = (
        cache[:, :, :n].float().transpose(1, 2).flatten(2) for cache in (model.state.k_cache, one_by_one[1])
    )
    errors = ((keys - expected).norm(dim=-1) / expected.norm(dim=-1)).median(-1).values
    print(f"{n} tokens: logits {error:.1e}, keys of a layer's median token {errors.max():.1e}")
    assert error < (QUANT_TOLERANCE if model.quant else TOLERANCE)
    assert errors.max() < (QUANT_KEYS_TOLERANCE if model.quant else TOLERANCE)


@pytest.mark.parametrize("n", LENGTHS)
def test_logits_and_keys_are_those_of_tokens_fed_one_by_one(model, token_ids, one_by_one, n):
    model.reset()
    assert_same(model, logits_after(model, token_ids[:n]), one_by_one, n)


def test_a_prompt_in_pieces(model, token_ids, one_by_one):
    """Blocks begin anywhere, also at the window's border."""
    model.reset()
    model._write_tokens(token_ids[:1000], 0)
    for start, end in ((0, 5), (5, 130), (130, 131), (131, 600), (600, 999)):
        model.prefill.feed(start, end - start)
    assert_same(model, model.logits(token_ids[999], 999), one_by_one, 1000)


def test_the_same_prompt_gives_the_same_bits(model, token_ids):
    runs = []
    for _ in range(2):
        model.reset()
        runs.append((logits_after(model, token_ids[:1000]), model.state.k_cache.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dense_format", [FP8_ROWS, FP8_GROUPS])
def test_dense_matrices_in_fp8(checkpoint, token_ids, dense_format):
    dense = DenseFormats(*[dense_format] * 4)
    model = MegaModel(checkpoint, max_context=256, kv_dtype=F32, dense=dense)
    for position, token_id in enumerate(token_ids[:150]):
        expected = model.logits(token_id, position)
    model.reset()
    assert relative_rms(logits_after(model, token_ids[:150]), expected) < TOLERANCE


def test_float32_cache(checkpoint, token_ids):
    model = MegaModel(checkpoint, max_context=256, kv_dtype=F32)
    for position, token_id in enumerate(token_ids[:200]):
        expected = model.logits(token_id, position)
    keys = model.state.k_cache.clone()
    model.reset()
    assert relative_rms(logits_after(model, token_ids[:200]), expected) < TOLERANCE
    assert relative_rms(model.state.k_cache, keys) < TOLERANCE


def test_all_of_the_context(checkpoint):
    """After 131,072 tokens the last nine are fed in a block, and again one by one."""
    n = checkpoint.config.max_position_embeddings
    model = MegaModel(checkpoint, max_context=n)
    ids = torch.randint(checkpoint.config.vocab_size, (n,), generator=torch.Generator().manual_seed(3)).tolist()
    model._write_tokens(ids, 0)
    model.prefill.feed(0, n - 9)
    for position in range(n - 9, n - 1):
        model._feed(position)
    expected, keys = model.logits(ids[-1], n - 1), model.state.k_cache[:, :, n - 9 :].clone()
    model._write_tokens(ids[n - 9 :], n - 9)
    model.prefill.feed(n - 9, 8)
    assert relative_rms(model.logits(ids[-1], n - 1), expected) < TOLERANCE
    assert relative_rms(model.state.k_cache[:, :, n - 9 :].float(), keys.float()) < TOLERANCE
