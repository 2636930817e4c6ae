"""Tests that only a GPU can run: full-size weights, real concurrency, long runs. `make test-gpu` runs them."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up_models import ODD_SIZES, loud_checkpoint, random_token_ids, small_config

from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import GPT_OSS_120B, ModelConfig
from checkpoints.harmony import chat_ids
from command_line.options import DEFAULT_MODEL, DEMO_CHAT
from gpt_oss_megakernel import MegaModel
from host.launch import tuning_for
from load_hf import open_checkpoint
from reference import Reference
from system.errors import InputError, MegakernelAborted
from tokenizer_util import Tokenizer

ROOT = Path(__file__).parent.parent.parent
CUDA = torch.device("cuda")
F32 = torch.float32
# Kernel and reference add 2880 products in another order.
TOLERANCE = 1e-3
# With --quant that order makes an activation in thousands round to the other E4M3 neighbour, so every token sees a few:
# 2^-4 of one element of a vector of 2880. An expert swapped for its rival at a tie would show as 0.3 and more.
QUANT_TOLERANCE = 0.05


def endless(config: ModelConfig) -> ModelConfig:
    """Remove the stop ids, which random weights would hit by chance."""
    return dataclasses.replace(config, stop_ids=())


@pytest.fixture(scope="module")
def four_layers():
    return RandomCheckpoint(endless(GPT_OSS_120B.cut(4)), device=CUDA)


@pytest.fixture(scope="module", params=[False, True], ids=["default", "quant"])
def quant(request):
    return request.param


@pytest.fixture(scope="module")
def model(four_layers, quant):
    """A model of 4 layers of 120b, with a float32 cache of 40,000 positions."""
    return MegaModel(four_layers, quant, max_context=40_000, kv_dtype=F32)


@pytest.fixture(scope="module")
def all_layers():
    """A model of all 36 layers of 120b."""
    return MegaModel(RandomCheckpoint(endless(GPT_OSS_120B), device=CUDA))


def copy_cache(reference: Reference, model: MegaModel) -> None:
    model.state.k_cache.copy_(reference.keys.transpose(1, 2))
    model.state.v_cache.copy_(reference.values.transpose(1, 2))


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_layers_and_logits_follow_the_reference(model, four_layers, quant):
    """Each token starts from the reference's cache, so that a rounding which went the other way does not spread."""
    reference = Reference(four_layers, quant, F32, max_context=model.max_context, device=CUDA)
    trace: dict[str, torch.Tensor] = {}
    tokens = torch.randint(0, model.config.vocab_size, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference.forward(tokens, trace=trace)
    tolerance = QUANT_TOLERANCE if quant else TOLERANCE
    errors = []
    for position, token in enumerate(tokens):
        copy_cache(reference, model)
        for layer in range(model.config.n_layers):
            hidden = model.hidden(token, position, layer + 1)
            errors.append(relative_rms(hidden, trace[f"layers.{layer}.output"][position]))
        errors.append(relative_rms(model.logits(token, position), expected[position]))
    print(f"relative rms: median {sorted(errors)[len(errors) // 2]:.1e}, worst {max(errors):.1e}")
    assert max(errors) < tolerance


@pytest.mark.parametrize(
    "position", [126, 127, 128, 129, 255, 256, 257, 511, 512, 513, 2047, 2048, 2049, 2050, 16385, 39_999]
)
def test_attention_over_a_long_cache(model, four_layers, position):
    """Positions are borders of the window, of a split, and of where splits begin to grow.

    Keys and values are random.
    """
    reference = Reference(four_layers, model.quant, F32, max_context=model.max_context, device=CUDA, n_layers=2)
    generator = torch.Generator(CUDA).manual_seed(position)
    for cache in (reference.keys, reference.values):
        cache[:, :position].normal_(generator=generator)
    model.state.k_cache[:2].copy_(reference.keys.transpose(1, 2))
    model.state.v_cache[:2].copy_(reference.values.transpose(1, 2))
    trace: dict[str, torch.Tensor] = {}
    reference.forward([7], position, trace=trace)
    for layer in range(2):
        model.hidden(7, position, layer + 1)
        found = model.state.attention.flatten()
        assert relative_rms(found, trace[f"layers.{layer}.attention"][0]) < (
            QUANT_TOLERANCE if model.quant else TOLERANCE
        )


@pytest.mark.parametrize("changes", ODD_SIZES.values(), ids=ODD_SIZES.keys())
def test_odd_sizes(changes, quant):
    """Each size compiles a kernel of its own. In most tokens of small models no rounding goes the other way."""
    config = small_config(**{"n_layers": 2, "layer_is_sliding": (True, False), **changes})
    checkpoint = loud_checkpoint(config)
    tokens = random_token_ids(33, config)
    reference = Reference(checkpoint, quant, F32, max_context=33)
    expected = reference.forward(tokens)
    model = MegaModel(checkpoint, quant, max_context=33, kv_dtype=F32)
    errors = []
    for position, token in enumerate(tokens):
        copy_cache(reference, model)
        errors.append(relative_rms(model.logits(token, position).cpu(), expected[position]))
    assert sorted(errors)[len(errors) // 2] < TOLERANCE
    assert max(errors) < (QUANT_TOLERANCE if quant else TOLERANCE)


def test_200_steps_twice_give_the_same_bits(model):
    runs = []
    for _ in range(2):
        model.reset()
        tokens = list(model.generate([1, 2, 3], 200))
        runs.append((tokens, model.logits(tokens[-1], 202), model.state.k_cache.clone()))
    assert len(runs[0][0]) == 200
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1:], runs[1][1:], strict=True))


@pytest.mark.parametrize("num_programs", [1, 61, 131])
def test_the_number_of_programs_does_not_change_a_bit(model, four_layers, num_programs):
    model.reset()
    tokens = list(model.generate([4, 5, 6], 20))
    logits = model.logits(tokens[-1], 22)
    shared = dict(weights=model.weights, tuning=model.tuning)
    other = MegaModel(four_layers, model.quant, max_context=64, num_programs=num_programs, kv_dtype=F32, **shared)
    assert list(other.generate([4, 5, 6], 20)) == tokens
    assert torch.equal(other.logits(tokens[-1], 22), logits)


def test_all_layers_decode_1000_tokens(all_layers, quant):
    model = all_layers
    model.switch_path(quant)
    tokens = list(model.generate([1], 1000))
    assert len(tokens) == 1000
    assert torch.isfinite(model.logits(tokens[-1], 1000)).all()


def test_a_program_that_never_arrives_ends_the_launch(quant):
    """One program fewer runs than the barriers wait for: the others give up, and the host says where."""
    checkpoint = RandomCheckpoint(endless(GPT_OSS_120B.cut(1)), device=CUDA)
    tuning = dataclasses.replace(tuning_for(CUDA, checkpoint.config), spin_limit=1 << 16)
    model = MegaModel(checkpoint, quant, max_context=16, tuning=tuning, num_programs=8)
    expected = model.step(3, 0)
    model.grid = (7,)
    with pytest.raises(MegakernelAborted, match="after the embedding"):
        model.step(3, 0)
    model.grid = (8,)
    model.reset()
    assert model.step(3, 0) == expected


def test_more_programs_than_can_be_resident_are_refused():
    checkpoint = RandomCheckpoint(endless(GPT_OSS_120B.cut(1)), device=CUDA)
    with pytest.raises(InputError, match="--num-programs 100000"):
        MegaModel(checkpoint, max_context=16, num_programs=100_000)


def test_the_driver_refuses_a_grid_that_cannot_be_resident():
    """Nothing would hang even if the table of launch parameters were wrong."""
    checkpoint = RandomCheckpoint(endless(GPT_OSS_120B.cut(1)), device=CUDA)
    model = MegaModel(checkpoint, max_context=16)
    model.grid = (100_000,)
    with pytest.raises(InputError, match="resident"):
        model.step(3, 0)


def test_not_enough_memory_is_refused_before_anything_is_allocated():
    checkpoint = RandomCheckpoint(GPT_OSS_120B, device=CUDA)
    with pytest.raises(InputError, match="GB needed"):
        taken = torch.empty(torch.cuda.mem_get_info()[0] - (30 << 30), dtype=torch.uint8, device=CUDA)
        MegaModel(checkpoint)
    del taken


@pytest.mark.parametrize("flags", [[], ["--quant"]], ids=["default", "quant"])
def test_the_shipped_model_recites(flags):
    command = [sys.executable, "gpt_oss_megakernel.py", *flags]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "So long as men can breathe, or eyes can see,\nSo long lives this, and this gives life to thee." in output


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("flags", [[], ["--quant"]], ids=["default", "quant"])
def test_memcheck_is_clean(flags):
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    program = [sys.executable, "gpt_oss_megakernel.py", "--max-new-tokens", "6", "--num-programs", "16", *flags]
    result = subprocess.run([*tool, *program], cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ERROR SUMMARY: 0 errors" in result.stdout


def test_demo_prompt_gives_the_same_tokens_as_the_reference(quant):
    prompt = chat_ids(Tokenizer.from_folder(DEFAULT_MODEL), DEMO_CHAT)
    model = MegaModel.from_pretrained(DEFAULT_MODEL, quant, max_context=512)
    tokens = list(model.generate(prompt, 300))
    reference = Reference(open_checkpoint(DEFAULT_MODEL), quant, max_context=512, device=CUDA)
    assert tokens == list(reference.generate(prompt, 300))
