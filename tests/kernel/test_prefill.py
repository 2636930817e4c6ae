"""Prompts in blocks, interpreted, against reference.py: the cache that a prompt leaves, and the logits after it."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from checkpoint_mutations import CHECKPOINT_MUTATIONS
from made_up_models import ODD_SIZES, MemoryCheckpoint, loud_checkpoint, random_token_ids, small_config
from prompt_columns import column_in_tiles
from reference_mutations import REFERENCE_MUTATIONS
from shipped import FOLDER, SONNET_18_START
from tunings import ring_tiles, small_tiles

import reference
from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import FP8_GROUPS, FP8_ROWS, DenseFormats, ModelConfig, expected_tensors
from checkpoints.harmony import chat_ids
from common.sm90.prompt_tiles import vector_stride
from gpt_oss_megakernel import MegaModel
from host.buffers import Buffers, buffer_bytes, buffer_shapes, max_block_tokens
from host.launch import BLOCKS_CPU, BLOCKS_GFX950, BLOCKS_SM_90, tuning_for
from host.tuning import BlockTuning, Tile, Tuning
from load_model import open_checkpoint
from prefill import largest_scales
from reference import Reference
from tokenizer_util import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 48
F32 = torch.float32
# Blocks of 23 tokens beside a window of 20, and tiles so small that a small model has several in each direction.
SMALL_BLOCKS = BlockTuning(
    tokens=23,
    min_tokens=3,
    dense=(Tile(64, 16, 64), Tile(128, 32, 32, min_programs=4)),
    gate_up=(Tile(64, 16, 128, extra_tokens=16), Tile(128, 32, 256)),
    down=(Tile(128, 16, 256), Tile(64, 32, 128, extra_tokens=16)),
    norm_warps=4,
    attention_m=32,
    attention_t=16,
    attention_warps=4,
    attention_stages=1,
    router_n=16,
    router_k=32,
    router_warps=4,
    router_stages=1,
    grouping=16,
)
TUNINGS: dict[str, tuple[Callable[[ModelConfig], Tuning], BlockTuning]] = {
    "device": (lambda config: tuning_for(torch.device("cpu"), config), BLOCKS_CPU),
    "small": (small_tiles, SMALL_BLOCKS),
    "small, float16 products": (lambda config: small_tiles(config, experts=dict(dot_scaled=False)), SMALL_BLOCKS),
    "packed": (ring_tiles, SMALL_BLOCKS),
}
# Beside float32 caches, as they are here unless said, of a token's keys and values in a layer, relative. Those of the
# first layer have met but a dense product, whose vectors are two bfloat16, 2^-17 of each element.
FIRST_LAYER = 1e-5
# The experts' vectors are float16, 2^-12 of each element: measured 3e-4 after one layer, 6e-4 after two. With --quant
# they are E4M3, which float16 holds, but now and then one is rounded to the other neighbour, 2^-4 of it. Most tokens
# meet none of those: measured 5e-6 to 2e-4 for half of them. Some do: measured up to 0.03.
MEDIAN, WORST, QUANT_WORST = 1e-3, 2e-3, 0.1
CLEAR_MARGIN = 2.5 * MEDIAN


def make_model(checkpoint, quant: bool, tuning: str = "device", max_context: int = TOKENS, **options) -> MegaModel:
    make_tuning, blocks = TUNINGS[tuning]
    options = {"kv_dtype": F32, "blocks": blocks} | options
    return MegaModel(checkpoint, quant, max_context, tuning=make_tuning(checkpoint.config), **options)


def feed(model: MegaModel, token_ids: list[int], position: int = 0) -> None:
    """Feed tokens in blocks, whatever their number."""
    poison(model)
    model._write_tokens(token_ids, position)
    model.prefill.feed(position, len(token_ids))


def poison(model: MegaModel) -> None:
    """Put NaN wherever a launch may leave something for another one: none may read what it was not left."""
    for name, buffer in model.prefill.buffers._asdict().items():
        if name in ("expert_in", "act"):
            buffer[:, vector_columns(model, name)] = torch.nan
        elif buffer.is_floating_point():
            buffer.fill_(torch.nan)
        elif buffer.dtype == torch.uint8:
            buffer.fill_(255)
        else:
            buffer.fill_(1 << 28)


def vector_columns(model: MegaModel, name: str) -> list[int]:
    """Return where the elements of an expert's vector stand; the other columns are always zeros."""
    k = model.config.hidden_size if name == "expert_in" else model.config.intermediate_size
    return [column_in_tiles(i) if model.tuning.machine.experts.is_packed else i for i in range(k)]


def logits_after(model: MegaModel, token_ids: list[int]) -> torch.Tensor:
    """Return the logits of the last of these tokens, after the others were fed in blocks."""
    feed(model, token_ids[:-1])
    model._write_tokens(token_ids[-1:], len(token_ids) - 1)
    return model.logits(token_ids[-1], len(token_ids) - 1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the relative error along the last dimension."""
    return (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)


def entries(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Reshape both [layers, heads, positions, head_dim] to [layers, positions, all of both]."""
    return torch.cat((keys, values), -1).float().transpose(1, 2).flatten(2)


def cache_errors(model: MegaModel, right: Reference, start: int, end: int) -> torch.Tensor:
    """Return the errors of each layer and position of start .. end - 1."""
    found = entries(model.state.k_cache, model.state.v_cache)
    expected = entries(right.keys.transpose(1, 2), right.values.transpose(1, 2))
    return relative(found[:, start:end], expected[:, start:end])


def assert_close(errors: torch.Tensor, quant: bool) -> None:
    """Assert that tokens agree along the last dimension."""
    assert errors.median(-1).values.max() < MEDIAN
    assert errors.max() < (QUANT_WORST if quant else WORST)


def assert_same_cache(model: MegaModel, right: Reference, end: int, start: int = 0) -> None:
    errors = cache_errors(model, right, start, end)
    assert errors[0].max() < FIRST_LAYER
    assert_close(errors, model.quant)


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor, quant: bool) -> None:
    """Assert that a single token's logits agree; with --quant it may be one with a rounding the other way."""
    assert relative(found, expected) < (QUANT_WORST if quant else WORST)


@pytest.fixture(scope="module")
def token_ids(checkpoint):
    return random_token_ids(TOKENS, checkpoint.config)


@pytest.fixture(scope="module")
def right(checkpoint, token_ids, quant):
    """Return the reference, fed, and its logits at all positions."""
    right = Reference(checkpoint, quant, F32, max_context=TOKENS)
    return right, right.forward(token_ids)


@pytest.fixture(scope="module")
def model(checkpoint, quant):
    """One model for all tests that start anew."""
    return make_model(checkpoint, quant, "small")


@pytest.mark.parametrize("tuning", TUNINGS)
def test_cache_and_logits(tuning, checkpoint, token_ids, quant, right):
    model = make_model(checkpoint, quant, tuning)
    logits = logits_after(model, token_ids)
    assert_same_cache(model, right[0], TOKENS)
    assert_same_logits(logits, right[1][-1], quant)


# Up to the window of 20 and beyond, and with the last token, which the kernel feeds, at either side of a block's end.
@pytest.mark.parametrize("n", [1, 2, 3, 19, 20, 21, 22, 23, 24, 25, 47])
def test_prompts_of_any_length(n, model, token_ids, right):
    model.reset()
    logits = logits_after(model, token_ids[:n])
    assert_same_cache(model, right[0], n)
    assert_same_logits(logits, right[1][n - 1], model.quant)
    assert (model.state.k_cache[:, :, n:] == 0).all(), "a position that was not fed"


@pytest.mark.parametrize("cuts", [[1, 2], [19, 20, 21], [22, 45], [7, 8, 30, 31]], ids=str)
def test_blocks_may_begin_anywhere(cuts, model, token_ids, right):
    """Later results must not depend on where a prompt was cut."""
    model.reset()
    for start, end in zip([0, *cuts], [*cuts, TOKENS]):
        feed(model, token_ids[start:end], start)
    assert_same_cache(model, right[0], TOKENS)


def test_blocks_may_follow_tokens_fed_one_by_one(model, token_ids, right):
    """The kernel and the blocks read what the other left, in either order."""
    model.reset()
    for position in (0, 1, 2, 28, 29):
        if position == 28:
            feed(model, token_ids[3:28], 3)
        model.step(token_ids[position], position)
    feed(model, token_ids[30:], 30)
    assert_same_cache(model, right[0], TOKENS)


def test_the_kernel_token_by_token_agrees(checkpoint, token_ids, quant):
    """The model is fed the other way: one token per launch."""
    model = make_model(checkpoint, quant)
    for position, token_id in enumerate(token_ids):
        expected = model.logits(token_id, position)
    cache = entries(model.state.k_cache, model.state.v_cache)
    model.reset()
    found = logits_after(model, token_ids)
    errors = relative(entries(model.state.k_cache, model.state.v_cache), cache)
    assert errors[0].max() < FIRST_LAYER
    assert_close(errors, quant)
    assert_same_logits(found, expected, quant)


def test_the_same_prompt_gives_the_same_bits(model, token_ids):
    """This holds after other prompts, too."""
    runs = []
    for _ in range(2):
        model.reset()
        logits = logits_after(model, token_ids[:30])
        runs.append((logits, model.state.k_cache.clone(), model.state.v_cache.clone()))
        model.reset()
        feed(model, token_ids[40:])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("tuning", TUNINGS)
def test_each_launch_agrees(tuning, checkpoint, token_ids, quant):
    """All that the first of two layers leaves is compared, for tokens within the window and beyond it."""
    config = dataclasses.replace(checkpoint.config, n_layers=2, layer_is_sliding=(True, False))
    cut = MemoryCheckpoint(config, {name: checkpoint.tensor(name) for name in expected_tensors(config)})
    n, top_k = 43, config.experts_per_token
    trace = {}
    Reference(cut, quant, F32, max_context=TOKENS).forward(token_ids[:n], trace=trace)
    blocks = dataclasses.replace(TUNINGS[tuning][1], tokens=n)
    model = make_model(cut, quant, tuning, blocks=blocks)
    feed(model, token_ids[:n])
    buffers = Buffers(*(buffer[:n] for buffer in model.prefill.buffers))
    chosen, weights = reference.route(trace["layers.0.router_logits"], top_k)
    assert torch.equal(buffers.chosen.long(), chosen)
    torch.testing.assert_close(buffers.weights, weights, rtol=0, atol=1e-4)
    order = model.prefill.buffers.order[: n * top_k].long()
    assert order.tolist() == sorted(range(n * top_k), key=lambda pair: int(chosen.flatten()[pair]))
    act = trace["layers.0.expert_act"].flatten(0, 1)
    if quant:
        act = reference.quantize_mxfp8(act)
    assert_close(relative(expert_vectors(model, n * top_k), act[order]), quant)
    assert_close(relative(buffers.x, trace["layers.0.output"]), quant)
    assert_close(relative(buffers.x - buffers.expert_out.sum(1), trace["layers.0.attn_residual"]), quant)
    assert_close(relative(buffers.qkv, trace["layers.1.qkv"]), quant)


def expert_vectors(model: MegaModel, n: int) -> torch.Tensor:
    """Return what gate-up left, float32 [n, intermediate]."""
    act = model.prefill.buffers.act[:n, vector_columns(model, "act")].float()
    if model.build.is_scaled:
        return act * torch.exp2(model.prefill.buffers.act_scale[:n].float() - 127).repeat_interleave(32, 1)
    return act / 2.0**9  # no activation is larger than 7 * 8, so 2^9 brings it below 2^15


@pytest.mark.parametrize("tuning", ["device", "packed"])
def test_the_cache_in_bfloat16_agrees(tuning, checkpoint, token_ids, quant):
    """A key that rounds the other way differs by 2^-8, and what attends to it differs a little."""
    right = Reference(checkpoint, quant, max_context=TOKENS)
    expected = right.forward(token_ids)[-1]
    model = make_model(checkpoint, quant, tuning, kv_dtype=torch.bfloat16)
    logits = logits_after(model, token_ids)
    errors = cache_errors(model, right, 0, TOKENS)
    assert errors[0].median() == 0
    assert errors[0].max() < 1e-3
    assert errors.median(-1).values.max() < (0.05 if quant else 5e-3)
    assert errors.max() < (QUANT_WORST if quant else 1e-2)
    assert relative(logits, expected) < (QUANT_WORST if quant else 1e-2)


@pytest.mark.parametrize("dense_format", [FP8_ROWS, FP8_GROUPS])
def test_dense_matrices_in_fp8(dense_format, checkpoint, token_ids, quant):
    dense = DenseFormats(*[dense_format] * 4)
    right = Reference(checkpoint, quant, F32, max_context=TOKENS, dense=dense)
    right.forward(token_ids[:30])
    model = make_model(checkpoint, quant, both_kinds(quant), dense=dense)
    feed(model, token_ids[:30])
    assert_same_cache(model, right, 30)


def both_kinds(quant: bool) -> str:
    """Give either rows with scaled products or packed tiles, for tests that would be slow with each on both paths."""
    return "small" if quant else "packed"


@pytest.mark.parametrize("field", ["qkv", "o", "router"])
def test_one_dense_matrix_in_fp8_agrees(field, checkpoint, token_ids):
    """Each matrix is tested alone, in its own format."""
    dense = DenseFormats(**{field: FP8_GROUPS})
    right = Reference(checkpoint, False, F32, max_context=TOKENS, dense=dense)
    right.forward(token_ids[:30])
    model = make_model(checkpoint, False, dense=dense)
    feed(model, token_ids[:30])
    assert_same_cache(model, right, 30)


@pytest.mark.parametrize("changes", ODD_SIZES.values(), ids=ODD_SIZES.keys())
def test_odd_sizes(changes, quant):
    config = small_config(**{"n_layers": 2, "layer_is_sliding": (True, False), **changes})
    checkpoint = loud_checkpoint(config)
    token_ids = random_token_ids(26, config)
    right = Reference(checkpoint, quant, F32, max_context=26)
    right.forward(token_ids)
    model = make_model(checkpoint, quant, both_kinds(quant), max_context=26)
    feed(model, token_ids)
    assert_same_cache(model, right, 26)


def test_the_published_width_agrees(quant):
    """Hidden and intermediate 2880, and 64 heads on 8, are no multiples of any block.

    Layers, experts and words are few.
    """
    sizes = dict(n_layers=2, n_experts=2, experts_per_token=2, vocab_size=515, layer_is_sliding=(True, False))
    config = ModelConfig(**sizes, stop_ids=())
    checkpoint = RandomCheckpoint(config, seed=3)
    token_ids = random_token_ids(5, config)
    right = Reference(checkpoint, quant, F32, max_context=5)
    right.forward(token_ids)
    model = make_model(checkpoint, quant, "device" if quant else "packed", max_context=5, blocks=BLOCKS_CPU)
    feed(model, token_ids)
    errors = cache_errors(model, right, 0, 5)
    assert errors[0].max() < FIRST_LAYER
    # Wide, a token has thousands of activations to round, and each meets an E4M3 boundary now and then.
    assert errors.max() < (0.02 if quant else WORST)


@pytest.mark.parametrize("position", [5000, 131_000])
def test_far_positions_agree(checkpoint, token_ids, position):
    """YaRN reaches far beyond the original context of 4096. Both caches are zero, and attended, before `position`."""
    config = dataclasses.replace(checkpoint.config, n_layers=2, layer_is_sliding=(True, False))
    near = MemoryCheckpoint(config, {name: checkpoint.tensor(name) for name in expected_tensors(config)})
    few = token_ids[:12]
    right = Reference(near, kv_dtype=F32, max_context=position + 12)
    expected = right.forward(few, position)[-1]
    blocks = dataclasses.replace(BLOCKS_CPU, attention_t=4096)
    model = make_model(near, False, max_context=position + 12, blocks=blocks)
    feed(model, few[:-1], position)
    assert_same_logits(model.logits(few[-1], position + 11), expected, False)
    assert_same_cache(model, right, position + 12, start=position)


def test_keys_before_the_window_are_not_read(checkpoint, token_ids):
    """NaN stands there, which even a weight of zero would spread; what is not read takes no time."""
    config = dataclasses.replace(checkpoint.config, n_layers=2, layer_is_sliding=(True, True))
    cut = MemoryCheckpoint(config, {name: checkpoint.tensor(name) for name in expected_tensors(config)})
    model = make_model(cut, False, "small")
    feed(model, token_ids[:30])
    for cache in (model.state.k_cache, model.state.v_cache):
        cache[:, :, : 30 - config.sliding_window + 1] = torch.nan
    feed(model, token_ids[30:], 30)
    assert model.state.k_cache[:, :, 30:].isfinite().all()


BIASES = {"all choose the same": [50.0] * 4 + [0.0] * 4, "one expert has all": [0.0] * 7 + [50.0]}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
def test_uneven_experts_agree(bias, checkpoint, token_ids, quant):
    """Experts have more tokens than a tile, or none: as many programs run as it takes."""
    uneven = checkpoint.with_tensors(lambda n, t: torch.tensor(bias).to(t) if n.endswith("router.bias") else t)
    right = Reference(uneven, quant, F32, max_context=TOKENS)
    right.forward(token_ids[:40])
    model = make_model(uneven, quant, both_kinds(quant), blocks=dataclasses.replace(SMALL_BLOCKS, tokens=40))
    feed(model, token_ids[:40])
    assert_same_cache(model, right, 40)


@pytest.fixture(scope="module")
def fed(model, token_ids):
    """Return the cache that all tokens leave."""
    model.reset()
    feed(model, token_ids)
    return entries(model.state.k_cache, model.state.v_cache)


def assert_far_off(fed: torch.Tensor, mistaken: Reference) -> None:
    """Assert that a mistake shows in half of the tokens or more, far beyond what assert_close allows."""
    expected = entries(mistaken.keys.transpose(1, 2), mistaken.values.transpose(1, 2))
    assert relative(fed, expected).median(-1).values.max() > CLEAR_MARGIN


@pytest.mark.parametrize("mutation", CHECKPOINT_MUTATIONS.values(), ids=CHECKPOINT_MUTATIONS.keys())
def test_blocks_do_not_make_this_mistake(mutation, checkpoint, token_ids, quant, fed):
    mistaken = Reference(mutation(checkpoint), quant, F32, max_context=TOKENS)
    mistaken.forward(token_ids)
    assert_far_off(fed, mistaken)


@pytest.mark.parametrize("function, replacement", REFERENCE_MUTATIONS.values(), ids=REFERENCE_MUTATIONS.keys())
def test_blocks_do_not_make_this_mistake_in_code(function, replacement, checkpoint, token_ids, quant, fed, monkeypatch):
    monkeypatch.setattr(reference, function, replacement)
    mistaken = Reference(checkpoint, quant, F32, max_context=TOKENS)
    mistaken.forward(token_ids)
    assert_far_off(fed, mistaken)


@pytest.mark.parametrize(
    "name", ["sinks dropped", "YaRN truncated", "nibbles swapped", "window one too large", "gate and up swapped"]
)
def test_blocks_follow_a_mutated_checkpoint(name, checkpoint, token_ids, quant):
    """The code hard-codes none of the mutated conventions."""
    mutated = CHECKPOINT_MUTATIONS[name](checkpoint)
    right = Reference(mutated, quant, F32, max_context=TOKENS)
    right.forward(token_ids[:30])
    model = make_model(mutated, quant, both_kinds(quant))
    feed(model, token_ids[:30])
    assert_same_cache(model, right, 30)


@pytest.mark.parametrize("limit", [0.5, 1.5, 30.0])
def test_any_limit_of_swiglu_agrees(limit, checkpoint, token_ids):
    """Activations are float16, scaled near the end of its range: the largest possible one must not saturate."""
    louder = checkpoint.with_tensors(lambda n, t: t + 3 if n.endswith("gate_up_proj_scales") else t)
    louder = louder.with_config(swiglu_limit=limit)
    right = Reference(louder, False, F32, max_context=TOKENS)
    trace = {}
    right.forward(token_ids[:26], trace=trace)
    assert trace["layers.0.expert_act"].abs().max() > 0.9 * limit
    model = make_model(louder, False, "packed")
    feed(model, token_ids[:26])
    # A gate that was multiplied by eight has eight times the error where the sigmoid is steep.
    assert cache_errors(model, right, 0, 26).median(-1).values.max() < 4 * MEDIAN


@pytest.mark.parametrize("limit", [1e-3, 0.5, 1.0, 7.0, 10.0, 100.0, 1e4])
def test_activations_stay_within_their_bound(limit, checkpoint):
    """The bound, from which the prescale of float16 activations follows, is no more than twice the largest of them."""
    config = dataclasses.replace(checkpoint.config, swiglu_limit=limit)
    gate, up = torch.linspace(-20, limit, 100_001), torch.tensor([[-limit], [limit]])
    largest = reference.swiglu(gate, up, limit, config.swiglu_alpha).abs().max().item()
    assert config.swiglu_bound / 2 < largest <= config.swiglu_bound * 1.00001


@pytest.mark.parametrize("gain", [-40, 30])
def test_any_scale_of_the_experts_agrees(gain, checkpoint, token_ids):
    """Matrices are decoded relative to their largest scale."""
    biased = checkpoint.with_tensors(
        lambda n, t: t.int().add(gain).to(t.dtype) if n.endswith("down_proj_scales") else t
    )
    right = Reference(biased, False, F32, max_context=TOKENS)
    right.forward(token_ids[:30])
    for tuning in ("device", "packed"):
        model = make_model(biased, False, tuning)
        feed(model, token_ids[:30])
        assert_same_cache(model, right, 30)


def test_the_largest_scales_are_found():
    """Each matrix of a stack has its own, in either layout; NaN is none, and a matrix of NaN has 0."""
    scales = torch.randint(100, 140, (2, 3, 8, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales[0, 1, 3, 2] = 254
    scales[1, 0, 7, 3] = 255
    scales[1, 2] = 255
    expected = [[max((s for s in m.flatten().tolist() if s < 255), default=0) for m in layer] for layer in scales]
    for stack in (scales, scales.view(torch.int32)):
        found = largest_scales(stack)
        assert found.dtype == torch.uint8
        assert found.view(2, 3).tolist() == expected


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("max_context", [1, 3, 4, 5, 23, 24, 64])
def test_memory_is_what_was_announced(max_context, tuning, checkpoint, quant):
    """Buffers take no more than announced, and none where all prompts are so short that they are fed one by one."""
    model = make_model(checkpoint, quant, tuning, max_context=max_context)
    used = sum(buffer.nbytes for buffer in model.prefill.buffers)
    assert used <= buffer_bytes(model.config, max_context)
    longest = max_context - 1  # that blocks may feed
    assert model.prefill.tokens == (min(model.blocks.tokens, longest) if longest >= model.blocks.min_tokens else 0)
    assert model.prefill.buffers.x.shape == (model.prefill.tokens, model.config.hidden_size)


@pytest.mark.parametrize("m", [64, 128, 256])
def test_vectors_end_in_zeros(m, quant):
    """Tiles of gate-up end with the matrix, or go beyond it."""
    config = small_config(**ODD_SIZES["hidden 416, intermediate 224"])
    blocks = dataclasses.replace(SMALL_BLOCKS, gate_up=(Tile(m, 16, 128),))
    model = make_model(loud_checkpoint(config), quant, "packed", blocks=blocks)
    feed(model, random_token_ids(20, config))
    for name in ("expert_in", "act"):
        buffer = getattr(model.prefill.buffers, name).clone()
        buffer[:, vector_columns(model, name)] = 0
        assert (buffer == 0).all()


@pytest.mark.parametrize("top_k, size", [(4, 2880), (8, 11968), (64, 2880), (16, 65536)])
def test_elements_of_a_block_are_counted_in_32_bits(top_k, size):
    for hidden, intermediate in ((size, 64), (64, size)):
        config = small_config(
            hidden_size=hidden, intermediate_size=intermediate, n_experts=top_k, experts_per_token=top_k
        )
        tokens = max_block_tokens(config)
        shapes = buffer_shapes(config, tokens, scaled=False, stride=vector_stride)
        assert max(torch.Size(shape).numel() for shape, _ in (shapes.act, shapes.expert_in)) < 2**31
        assert tokens == 4096 or top_k * (tokens + 1) * size >= 2**31


@pytest.mark.parametrize("blocks", [BLOCKS_SM_90, BLOCKS_GFX950])
def test_tiles_grow_with_the_number_of_tokens(blocks):
    for rows in (2880, 5120):
        tiles = [blocks.dense_tile(rows, n) for n in range(1, 4097)]
        at = [blocks.dense.index(tile) for tile in tiles]
        assert (at[0], at[-1]) == (0, len(blocks.dense) - 1)
        for n, tile in enumerate(tiles, 1):
            assert -(-rows // tile.m) * -(-n // tile.n) >= tile.min_programs
    for tiles in (blocks.gate_up, blocks.down):
        experts = [tiles.index(blocks.expert_tile(tiles, mean)) for mean in range(1, 300)]
        assert experts == sorted(experts)
        assert {*experts} == {*range(len(tiles))}


def test_blocks_cover_a_prompt_once(model, token_ids, monkeypatch):
    """Each block except the last is as large as allowed."""
    fed = []
    monkeypatch.setattr(model.prefill, "_feed_block", lambda position, n: fed.append((position, n)))
    for position, n in ((0, 1), (0, 23), (0, 24), (7, 50)):
        fed.clear()
        model.prefill.feed(position, n)
        starts, sizes = zip(*fed)
        assert list(starts) == [position + 23 * i for i in range(len(fed))]
        assert sum(sizes) == n
        assert set(sizes[:-1]) <= {23}
    fed.clear()
    model.prefill.feed(5, 0)
    assert fed == []


@pytest.fixture(scope="module")
def shipped():
    """The model in models/sonnets without its stop ids, and tokens of a text that it knows."""
    checkpoint = open_checkpoint(FOLDER)
    checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, stop_ids=()))
    tokenizer = Tokenizer.from_folder(FOLDER)
    return checkpoint, chat_ids(tokenizer, "Recite sonnet 18.") + tokenizer.encode(SONNET_18_START)


# Lengths within and beyond the model's window of 64, and more than a block. In this text every token is far more likely
# than any other: rounding must not matter.
@pytest.mark.parametrize("length", [5, 64, 90])
def test_the_shipped_model_goes_on_like_the_reference(length, shipped, quant):
    checkpoint, token_ids = shipped
    blocks = dataclasses.replace(BLOCKS_CPU, tokens=50)
    found = list(MegaModel(checkpoint, quant, length + 4, blocks=blocks).generate(token_ids[:length], 4))
    assert found == list(Reference(checkpoint, quant).generate(token_ids[:length], 4))


def test_the_shipped_model_goes_on_as_after_tokens_fed_one_by_one(shipped, quant):
    checkpoint, token_ids = shipped
    found = []
    for min_tokens in (3, 1 << 30):
        blocks = dataclasses.replace(BLOCKS_CPU, tokens=20, min_tokens=min_tokens)
        model = MegaModel(checkpoint, quant, 50, blocks=blocks)
        found.append(list(model.generate(token_ids[:45], 5)))
        assert (model.prefill.tokens == 0) == (min_tokens > 3)
    assert found[0] == found[1]
