"""reference.py against transformers' GptOssForCausalLM, and its number formats against the OCP specification."""

import bisect
import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers_model
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_models import loud_checkpoint, random_token_ids, small_config

import reference
from checkpoints.checkpoint import write_checkpoint
from checkpoints.config import YarnConfig
from checkpoints.harmony import chat_ids
from load_hf import open_checkpoint
from reference import Reference, apply_rope, dequantize_mxfp4, mxfp8_bytes, quantize_mxfp8, route, swiglu
from system.errors import InputError
from tokenizer_util import Tokenizer

# Two float32 implementations of these models differ by up to 4e-5 in logits of up to 20, and at position 131000, where
# the angles' rounding dominates, by up to 2.4e-4. The mildest mistake (test_conventions.py) makes 3e-2.
TOLERANCE = 1e-3
SHIPPED_MODEL = Path(__file__).parents[2] / "models" / "sonnets"
SIZES = {
    "hidden 96, head_dim 64": {},
    "hidden 160, head_dim 16, window 5": {"hidden_size": 160, "head_dim": 16, "sliding_window": 5},
    "8 query heads per KV head, head_dim 32": {"n_heads": 16, "head_dim": 32},
    "one KV head, intermediate 96": {"n_kv_heads": 1, "intermediate_size": 96},
    "as many KV heads as heads, all experts": {"n_kv_heads": 8, "n_experts": 4},
    "window 1, full attention first": {"sliding_window": 1, "layer_is_sliding": (False, True, True)},
    "window longer than the text": {"sliding_window": 128},
    "YaRN of another kind": {"yarn": YarnConfig(theta=10000.0, factor=4.0, beta_fast=16.0)},
}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@pytest.fixture(scope="module")
def checkpoint():
    return loud_checkpoint(small_config())


@pytest.fixture(scope="module")
def theirs(checkpoint, tmp_path_factory):
    return transformers_model.load(write_checkpoint(checkpoint, tmp_path_factory.mktemp("checkpoint")))


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES.keys())
def test_logits_equal_transformers(changes, tmp_path):
    folder = write_checkpoint(loud_checkpoint(small_config(**changes), seed=2), tmp_path)
    ids = random_token_ids(64, small_config())
    expected = transformers_model.logits(transformers_model.load(folder), ids)
    actual = Reference(open_checkpoint(folder), kv_dtype=None, max_context=64).forward(ids)
    assert actual.dtype == torch.float32
    assert largest_difference(actual, expected) < TOLERANCE


@pytest.mark.parametrize("position", [4090, 131072 - 40])
def test_far_positions_after_a_cache_of_zeros_equal_transformers(checkpoint, theirs, position):
    ids = random_token_ids(40, small_config())
    model = Reference(checkpoint, kv_dtype=None, max_context=position + 40)
    assert (
        largest_difference(model.forward(ids, position), transformers_model.logits(theirs, ids, position)) < TOLERANCE
    )


@pytest.mark.parametrize("pieces", [[1] * 48, [30, 1, 1, 16], [7, 41]])
def test_feeding_in_pieces_equals_transformers_in_one(checkpoint, theirs, pieces):
    ids = random_token_ids(48, small_config())
    model = Reference(checkpoint, kv_dtype=None, max_context=48)
    logits, position = [], 0
    for n in pieces:
        logits.append(model.forward(ids[position : position + n], position))
        position += n
    assert largest_difference(torch.cat(logits), transformers_model.logits(theirs, ids)) < TOLERANCE


def test_float64_equals_transformers(checkpoint, theirs):
    ids = random_token_ids(48, small_config())
    logits = Reference(checkpoint, kv_dtype=None, max_context=48, dtype=torch.float64).forward(ids)
    assert logits.dtype == torch.float64
    assert largest_difference(logits, transformers_model.logits(theirs, ids)) < TOLERANCE


def test_shipped_model_equals_transformers():
    model = Reference(open_checkpoint(SHIPPED_MODEL), kv_dtype=None)
    tokenizer = Tokenizer.from_folder(SHIPPED_MODEL)
    prompt = chat_ids(tokenizer, "Recite sonnet 18.")
    ids = prompt + list(model.generate(prompt, 200))[:-1]
    model.reset()
    expected = transformers_model.logits(transformers_model.load(SHIPPED_MODEL), ids)
    assert largest_difference(model.forward(ids), expected) < TOLERANCE


def test_trace_equals_what_transformers_modules_see(checkpoint, theirs):
    seen: dict[str, torch.Tensor] = {}
    hooks = []

    def watch(name: str, module: torch.nn.Module, part) -> None:
        hooks.append(module.register_forward_hook(lambda _, inputs, output: seen.update({name: part(inputs, output)})))

    for n, layer in enumerate(theirs.model.layers):
        for p in "qkv":
            watch(f"layers.{n}.{p}", getattr(layer.self_attn, f"{p}_proj"), lambda inputs, output: output[0])
        watch(f"layers.{n}.attention", layer.self_attn.o_proj, lambda inputs, output: inputs[0][0])
        watch(f"layers.{n}.attn_residual", layer.post_attention_layernorm, lambda inputs, output: inputs[0][0])
        watch(f"layers.{n}.router_logits", layer.mlp.router, lambda inputs, output: output[0])
        watch(f"layers.{n}.output", layer, lambda inputs, output: output[0])
    ids = random_token_ids(30, small_config())
    transformers_model.logits(theirs, ids)
    for hook in hooks:
        hook.remove()
    trace: dict[str, torch.Tensor] = {}
    Reference(checkpoint, kv_dtype=None, max_context=30).forward(ids, trace=trace)
    for n in range(3):
        seen[f"layers.{n}.qkv"] = torch.cat([seen.pop(f"layers.{n}.{p}") for p in "qkv"], dim=-1)
        assert trace.pop(f"layers.{n}.expert_act").shape == (30, 4, 64)
    assert trace.keys() == seen.keys()
    for name, tensor in trace.items():
        assert largest_difference(tensor, seen[name]) < TOLERANCE, name


def test_keys_and_values_are_rounded_once_for_the_own_token_too(checkpoint):
    trace: dict[str, torch.Tensor] = {}
    Reference(checkpoint, max_context=1).forward([7], trace=trace)
    q, k, v = trace["layers.0.qkv"][0].split([512, 128, 128])
    concentration = checkpoint.config.yarn.concentration  # all that RoPE does at position 0
    q, k = q.view(8, 64).double() * concentration, (k * concentration).bfloat16().view(2, 64).double()
    v = v.bfloat16().view(2, 64).double()
    sinks = checkpoint.tensor("model.layers.0.self_attn.sinks").double()
    attention = trace["layers.0.attention"][0].view(8, 64).double()
    for head in range(8):
        expected = v[head // 4] / (1 + (sinks[head] - q[head] @ k[head // 4] / 8).exp())
        torch.testing.assert_close(attention[head], expected, rtol=1e-5, atol=1e-6)


def test_quantized_experts_equal_transformers_with_quantized_inputs(tmp_path):
    """There is one layer, so that an element on the other side of a rounding boundary affects its own token only."""
    checkpoint = loud_checkpoint(small_config(n_layers=1, layer_is_sliding=(True,)), seed=3)
    theirs = transformers_model.load(write_checkpoint(checkpoint, tmp_path))
    ids = random_token_ids(64, small_config())
    unquantized = transformers_model.logits(theirs, ids)
    experts = theirs.model.layers[0].mlp.experts
    apply_gate = experts._apply_gate
    experts._apply_gate = lambda gate_up: exact_mxfp8_tensor(apply_gate(gate_up))
    experts.register_forward_pre_hook(lambda _, args: (exact_mxfp8_tensor(args[0]), *args[1:]))
    expected = transformers_model.logits(theirs, ids)
    actual = Reference(checkpoint, quant=True, kv_dtype=None, max_context=64).forward(ids)

    def tokens_within_tolerance(a: torch.Tensor, b: torch.Tensor) -> int:
        return int(((a - b).abs().amax(-1) < TOLERANCE).sum())

    assert tokens_within_tolerance(actual, expected) >= 62
    assert tokens_within_tolerance(actual, unquantized) == 0


def test_generate_is_transformers_greedy_and_yields_the_stop_id_last(checkpoint, theirs):
    prompt, expected = random_token_ids(20, small_config()), []
    for _ in range(12):
        expected.append(int(transformers_model.logits(theirs, prompt + expected)[-1].argmax()))
    model = Reference(checkpoint, kv_dtype=None, max_context=64)
    rows: list[torch.Tensor] = []
    assert list(model.generate(prompt, 12, rows.append)) == expected
    assert largest_difference(torch.stack(rows), transformers_model.logits(theirs, prompt + expected[:-1])) < TOLERANCE
    first = expected.index(expected[6])
    stopping = Reference(checkpoint.with_config(stop_ids=(expected[6],)), kv_dtype=None, max_context=64)
    assert list(stopping.generate(prompt, 12)) == expected[: first + 1]


def test_generate_ends_when_the_context_is_full(checkpoint):
    model = Reference(checkpoint.with_config(stop_ids=()), max_context=24)
    # The last token needs no room of its own.
    assert len(list(model.generate(random_token_ids(20, small_config()), 100))) == 5
    assert len(list(model.generate(random_token_ids(24, small_config()), 100))) == 1
    with pytest.raises(InputError, match="do not fit a context of 24 tokens"):
        list(model.generate(random_token_ids(25, small_config()), 1))


def test_reset_forgets(checkpoint):
    model, ids = Reference(checkpoint, max_context=16), random_token_ids(16, small_config())
    first = model.forward(ids[:1], 5)
    model.reset()
    model.forward(ids)
    assert largest_difference(model.forward(ids[:1], 5), first) > TOLERANCE
    model.reset()
    assert torch.equal(model.forward(ids[:1], 5), first)


def test_first_layers_only(checkpoint):
    ids, trace, cut_trace = random_token_ids(12, small_config()), {}, {}
    Reference(checkpoint, max_context=12).forward(ids, trace=trace)
    Reference(checkpoint, max_context=12, n_layers=2).forward(ids, trace=cut_trace)
    assert "layers.2.output" not in cut_trace
    assert torch.equal(trace["layers.1.output"], cut_trace["layers.1.output"])


def test_a_big_model_is_read_anew_and_only_its_chosen_experts_dequantized(checkpoint, monkeypatch):
    ids = random_token_ids(12, small_config())
    kept = Reference(checkpoint, max_context=13)
    expected = kept.forward(ids), kept.forward(ids[:1], 12)
    monkeypatch.setattr(reference, "KEEP_BYTES", 0)
    model = Reference(checkpoint, max_context=13)
    assert torch.equal(model.forward(ids), expected[0])
    matrices = []
    monkeypatch.setattr(reference, "dequantize_mxfp4", lambda b, s: matrices.append(b.shape) or dequantize_mxfp4(b, s))
    assert torch.equal(model.forward(ids[:1], 12), expected[1])
    assert matrices == ([(128, 3, 16)] * 4 + [(96, 2, 16)] * 4) * 3


def test_float32_products_are_not_tf32(checkpoint, monkeypatch):
    inside = []
    monkeypatch.setattr(
        reference, "rms_norm", lambda x, w, e: inside.append(torch.get_float32_matmul_precision()) or x * w
    )
    torch.set_float32_matmul_precision("high")
    try:
        Reference(checkpoint, max_context=1).forward([1])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(inside) == {"highest"}


def test_route_takes_the_lower_index_on_a_tie():
    chosen, weights = route(torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, 0.0]]), 3)
    assert chosen.tolist() == [[1, 3, 0]]
    e = math.exp(-2)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0, e]]) / (2 + e))
    assert route(torch.zeros(3, 128), 4)[0].tolist() == [[0, 1, 2, 3]] * 3


def test_swiglu_clamps_gate_above_and_up_on_both_sides():
    gate = torch.tensor([-30.0, -1.0, 6.0, 7.0, 8.0, 1.0, 1.0], dtype=torch.float64)
    up = torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0, 9.0, -9.0], dtype=torch.float64)
    expected = [
        min(g, 7) / (1 + math.exp(-1.702 * min(g, 7))) * (max(-7, min(u, 7)) + 1)
        for g, u in zip(gate.tolist(), up.tolist(), strict=True)
    ]
    torch.testing.assert_close(swiglu(gate, up, 7.0, 1.702), torch.tensor(expected, dtype=torch.float64))


def test_rope_turns_halves():
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    angle = torch.tensor([[math.pi / 2, math.pi]])
    expected = torch.tensor([[[0.0, 0.0, 1.0, -2.0]]])
    torch.testing.assert_close(apply_rope(x, angle.cos(), angle.sin()), expected, rtol=0, atol=1e-6)


def e2m1(code: int) -> float:
    """Decode E2M1 by OCP MX v1.0, table 5: sign, two exponent bits of bias 1, one mantissa bit."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2)
    return -magnitude if code & 8 else magnitude


def test_dequantize_mxfp4_is_exact():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.cat((torch.arange(256), torch.randint(0, 256, (253 * 16,), generator=generator)))
    blocks = blocks.to(torch.uint8).view(269, 16)
    scales = (torch.arange(269) % 253).to(torch.uint8)  # 6 * 2^(252 - 127) is the last that float32 holds
    expected = [
        [e2m1(byte >> shift & 15) * 2.0 ** (scale - 127) for byte in row for shift in (0, 4)]
        for row, scale in zip(blocks.tolist(), scales.tolist(), strict=True)
    ]
    actual = dequantize_mxfp4(blocks.view(269, 1, 16), scales.view(269, 1))
    assert actual.dtype == torch.float32
    assert torch.equal(actual.double(), torch.tensor(expected, dtype=torch.float64))


def e4m3(code: int) -> Fraction:
    """Decode E4M3 by OCP OFP8 v1.0: four exponent bits of bias 7, three mantissa bits; 0x7F is NaN, no infinities."""
    exponent, mantissa = code >> 3, code & 7
    return (
        Fraction(mantissa, 8) * Fraction(2) ** -6
        if exponent == 0
        else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    )


E4M3_VALUES = [e4m3(code) for code in range(0x7F)]


def exact_e4m3_code(x: Fraction) -> int:
    """Return the code of x >= 0: saturated, nearest, ties to the even code."""
    above = bisect.bisect_left(E4M3_VALUES, x)
    if above == len(E4M3_VALUES):
        return above - 1
    if above == 0 or E4M3_VALUES[above] == x:
        return above
    to_below, to_above = x - E4M3_VALUES[above - 1], E4M3_VALUES[above] - x
    return above if to_above < to_below or (to_above == to_below and above % 2 == 0) else above - 1


def exact_mxfp8(group: list[float]) -> tuple[list[int], int]:
    """Return E4M3 and E8M0 bytes of 32 finite numbers, in exact arithmetic."""
    largest = max(abs(x) for x in group)
    exponent = max(math.frexp(largest)[1] - 1 - 8, -127) if largest else -127
    codes = [exact_e4m3_code(abs(Fraction(x)) / Fraction(2) ** exponent) for x in group]
    return [code | 0x80 * (math.copysign(1, x) < 0) for code, x in zip(codes, group, strict=True)], exponent + 127


def exact_mxfp8_tensor(x: torch.Tensor) -> torch.Tensor:
    """Return the result of a round trip through MXFP8, by lookup of the nearest value in float64, which is exact."""
    groups = x.double().unflatten(-1, (-1, 32))
    exponent = (torch.frexp(groups.abs().amax(-1, keepdim=True)).exponent - 9).clamp(min=-127)
    scaled = torch.ldexp(groups.abs(), -exponent).clamp(max=448)
    values = torch.tensor([float(value) for value in E4M3_VALUES], dtype=torch.float64)
    above = torch.searchsorted(values, scaled)
    below = (above - 1).clamp(min=0)
    to_below, to_above = scaled - values[below], values[above] - scaled
    code = torch.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    return (torch.ldexp(values[code], exponent) * groups.sign()).flatten(-2).to(x.dtype)


def assert_mxfp8_exact(group: list[float]) -> None:
    x = torch.tensor(group, dtype=torch.float32)
    elements, scales = mxfp8_bytes(x)
    codes, scale = exact_mxfp8(x.tolist())
    assert scales.tolist() == [scale]
    assert elements.view(torch.uint8).tolist() == codes
    values = [float(E4M3_VALUES[code & 0x7F]) * 2.0 ** (scale - 127) for code in codes]
    signed = [-value if code & 0x80 else value for code, value in zip(codes, values, strict=True)]
    assert quantize_mxfp8(x).tolist() == signed


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
def test_mxfp8_of_any_float32_is_exact(group):
    assert_mxfp8_exact(group)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(-4, 4, width=16), min_size=32, max_size=32), st.integers(-140, 120))
def test_mxfp8_of_numbers_of_like_size_is_exact(group, exponent):
    assert_mxfp8_exact([math.ldexp(x, exponent) for x in group])


def test_mxfp8_rounds_every_tie_to_even():
    """All midpoints of neighbouring E4M3 values stand in groups whose scale a 256 fixes at 1."""
    midpoints = [float((a + b) / 2) for a, b in itertools.pairwise(E4M3_VALUES)]
    for start in range(0, len(midpoints), 31):
        some = midpoints[start : start + 31]
        assert_mxfp8_exact([256.0, *some, *[0.0] * (31 - len(some))])


@pytest.mark.parametrize(
    "largest", [0.0, 2.0**-149, 2.0**-127, 2.0**-119, 2.0**-118, 1.0, 1.99, 448.0, 511.9, 2.0**127]
)
def test_mxfp8_at_the_edges_of_its_scale(largest):
    assert_mxfp8_exact([largest, -largest, largest / 2, -0.0, largest / 3, largest / 448, largest / 1000] + [0.0] * 25)


def test_mxfp8_groups_are_separate_and_nan_stays_nan():
    x = torch.ones(2, 96)
    x[1, 32:64] = 1000.0
    x[0, 70] = math.nan
    values = quantize_mxfp8(x)
    assert values[1].tolist() == [1.0] * 32 + [896.0] * 32 + [1.0] * 32  # the exponent is 1, and 500 saturates at 448
    assert values.isnan().nonzero().tolist() == [[0, 70]]
    assert torch.equal(values[0, :64], torch.ones(64))
