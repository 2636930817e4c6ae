"""The whole kernel, interpreted, against reference.py: by layer, at the logits, at odd sizes, with many programs."""

from dataclasses import replace

import pytest
import torch
from checkpoint_mutations import CHECKPOINT_MUTATIONS
from made_up_models import ODD_SIZES, MemoryCheckpoint, loud_checkpoint, random_token_ids, small_config
from reference_mutations import REFERENCE_MUTATIONS
from triton.runtime.errors import OutOfResources
from tunings import ahead_tiles, ring_tiles, small_tiles

import reference
from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import ModelConfig, expected_tensors
from gpt_oss_megakernel import MegaModel
from host.launch import MIN_STAGES, tuning_for
from interpreter import simulate
from measure.random_cache import fill_cache
from reference import Reference
from system.errors import InputError

CPU = torch.device("cpu")
TOKENS = 64
# With the cache in float32, as here unless said, kernel and reference differ by the order of their additions alone.
TOLERANCE = 1e-3
# With --quant that order moves an activation across a rounding boundary of E4M3 (2^-4 of it) in perhaps one token of
# ten, whose logits, of order 10, then move by up to 0.3. So that this does not reach later tokens through the cache,
# each token starts from the reference's cache.
WORST_TOLERANCE = 0.4
CLEAR_MARGIN = 10 * TOLERANCE
F32 = torch.float32


def kernel_logits(
    model: MegaModel, token_ids: list[int], position: int = 0, cache: Reference | None = None
) -> torch.Tensor:
    """Return float32 [tokens, vocab]; with `cache` the kernel reads a reference's keys and values, not its own."""
    rows = []
    for p, token in enumerate(token_ids, position):
        if cache is not None:
            copy_cache(cache, model)
        rows.append(model.logits(token, p))
    return torch.stack(rows)


def copy_cache(reference: Reference, model: MegaModel) -> None:
    model.state.k_cache.copy_(reference.keys.transpose(1, 2))
    model.state.v_cache.copy_(reference.values.transpose(1, 2))


def assert_same_logits(logits: torch.Tensor, expected: torch.Tensor, quant: bool) -> None:
    per_token = (logits - expected).abs().amax(-1)
    assert per_token.median() < TOLERANCE
    assert per_token.max() < (WORST_TOLERANCE if quant else TOLERANCE)


@pytest.fixture(scope="module")
def token_ids(checkpoint):
    return random_token_ids(TOKENS, checkpoint.config)


@pytest.fixture(scope="module")
def right(checkpoint, token_ids, quant):
    """Return the reference, fed, and its logits."""
    reference = Reference(checkpoint, quant, F32, max_context=TOKENS)
    return reference, reference.forward(token_ids)


@pytest.fixture(scope="module")
def logits(checkpoint, token_ids, quant, right):
    model = MegaModel(checkpoint, quant, max_context=TOKENS, kv_dtype=F32)
    return kernel_logits(model, token_ids, cache=right[0] if quant else None)


def test_logits(logits, right, quant):
    assert_same_logits(logits, right[1], quant)


def test_logits_with_the_cache_in_bfloat16(checkpoint, token_ids, quant):
    """A key that rounds the other way moves the logits of all that see it, by 2^-8 of its weight."""
    expected = Reference(checkpoint, quant, max_context=TOKENS).forward(token_ids)
    logits = kernel_logits(MegaModel(checkpoint, quant, max_context=TOKENS), token_ids)
    per_token = (logits - expected).abs().amax(-1)
    assert per_token.median() < (0.2 if quant else 5e-3)
    assert per_token.max() < 1.0


@pytest.mark.parametrize("mutation", CHECKPOINT_MUTATIONS.values(), ids=CHECKPOINT_MUTATIONS.keys())
def test_the_kernel_does_not_make_this_mistake(mutation, checkpoint, token_ids, quant, logits):
    """The mutated reference computes what a kernel with the mistake would, and test_logits tells the two apart."""
    mistaken = Reference(mutation(checkpoint), quant, F32, max_context=TOKENS).forward(token_ids)
    assert (logits - mistaken).abs().amax(-1).median() > CLEAR_MARGIN


@pytest.mark.parametrize("function, replacement", REFERENCE_MUTATIONS.values(), ids=REFERENCE_MUTATIONS.keys())
def test_the_kernel_does_not_make_this_mistake_in_code(
    function, replacement, checkpoint, token_ids, quant, logits, monkeypatch
):
    monkeypatch.setattr(reference, function, replacement)
    mistaken = Reference(checkpoint, quant, F32, max_context=TOKENS).forward(token_ids)
    assert (logits - mistaken).abs().amax(-1).median() > CLEAR_MARGIN


@pytest.mark.parametrize("name", ["sinks dropped", "YaRN truncated", "nibbles swapped", "window one too large"])
def test_the_kernel_follows_a_mutated_checkpoint(name, checkpoint, token_ids, quant):
    """The kernel hard-codes none of the mutated conventions."""
    mutated = CHECKPOINT_MUTATIONS[name](checkpoint)
    few = token_ids[:32]
    reference = Reference(mutated, quant, F32, max_context=32)
    expected = reference.forward(few)
    model = MegaModel(mutated, quant, max_context=32, kv_dtype=F32)
    assert_same_logits(kernel_logits(model, few, cache=reference), expected, quant)


def dequantized(elements: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return elements.float() * torch.exp2(scales.float() - 127).repeat_interleave(32, dim=-1)


@pytest.mark.parametrize("tiles", ["rows", "loaded ahead", "ring"])
def test_each_phase_of_each_layer_agrees(checkpoint, token_ids, quant, tiles):
    """Every buffer that a phase leaves is compared, for a token beyond the window."""
    config, position = checkpoint.config, 40
    trace = {}
    truth = Reference(checkpoint, quant, F32, max_context=TOKENS)
    truth.forward(token_ids[: position + 1], trace=trace)
    tuning = {
        "rows": small_tiles(config),
        "loaded ahead": ahead_tiles(config),
        "ring": ring_tiles(config),
    }[tiles]
    model = MegaModel(checkpoint, quant, max_context=TOKENS, tuning=tuning, num_programs=3, kv_dtype=F32)
    copy_cache(truth, model)
    for layer in range(config.n_layers):
        hidden = model.hidden(token_ids[position], position, layer + 1)
        expected = {
            name.split(".")[2]: value[position] for name, value in trace.items() if name.startswith(f"layers.{layer}.")
        }
        if quant:
            expected["expert_act"] = reference.quantize_mxfp8(expected["expert_act"])
        act = model.state.expert_act
        if tuning.machine.experts.is_packed:
            value, rest = act.float().view(config.experts_per_token, -1, 4, 2, 4, 8).unbind(3)
            act = (value + rest / 2048) / 2.0**9  # no activation is larger than 7 * 8, so 2^9 brings it below 2^15
            act = act.transpose(2, 3).flatten(1)[:, : config.intermediate_size]
        elif quant:
            act = dequantized(act, model.state.expert_act_scale)
        found = {
            "qkv": model.state.qkv,
            "attention": model.state.attention,
            "router_logits": model.state.router_logits,
            "expert_act": act,
            "output": hidden,
        }
        for name, value in found.items():
            error = (value - expected[name]).norm() / expected[name].norm()
            # With --quant an activation may round the other way, 2^-4 of it, and what follows sees that.
            assert error < (1e-2 if quant else 2e-5), f"layer {layer}, {name}"


@pytest.mark.parametrize("num_warps, threads_per_row", [(1, 32), (2, 32), (4, 64)])
def test_rings_of_any_length_agree(checkpoint, token_ids, quant, num_warps, threads_per_row):
    """Positions go from within the window of 20 to beyond it.

    One warp has a whole row of a dense tile, or two share it.
    """
    reference = Reference(checkpoint, quant, F32, max_context=24)
    expected = reference.forward(token_ids[:24])[16:]
    dense = dict(threads_per_row=threads_per_row)
    tuning = ring_tiles(checkpoint.config, num_warps=num_warps, dense=dense)
    model = MegaModel(checkpoint, quant, max_context=24, num_programs=3, tuning=tuning, kv_dtype=F32)
    assert_same_logits(kernel_logits(model, token_ids[16:24], 16, cache=reference), expected, quant)


@pytest.fixture
def make_model(checkpoint, monkeypatch):
    """Return a function that makes a model with one byte too little for a ring of more than a number of stages.

    The function also returns the stages of each launch. `ring`: changes of the ring, or None for a device without one.
    """

    def make(most_stages: int, ring: dict | None):
        launch, attempts = MegaModel._launch, []

        def launch_if_it_fits(model, *args, **options):
            ring = model.tuning.ring
            stages, stage_bytes = (ring.stages, ring.stage_bytes) if ring else (0, 0)
            attempts.append(stages)
            assert len(attempts) < 9, "as if it tried for ever"
            if stages > most_stages:
                beside = 16384
                limit = beside + (most_stages + 1) * stage_bytes - 1
                raise OutOfResources(beside + stages * stage_bytes, limit, "shared")
            launch(model, *args, **options)

        monkeypatch.setattr(MegaModel, "_launch", launch_if_it_fits)
        tuning = ring_tiles(checkpoint.config, ring=ring) if ring else small_tiles(checkpoint.config)
        return MegaModel(checkpoint, max_context=8, tuning=tuning, kv_dtype=F32), attempts

    return make


@pytest.mark.parametrize("most_stages", [MIN_STAGES, 3])
def test_a_ring_that_does_not_fit_gets_shorter(most_stages, make_model, checkpoint, token_ids):
    """Only compiling the kernel tells what else it needs in shared memory."""
    model, attempts = make_model(most_stages, dict(stages=6, prefetch_distance=4))
    assert attempts == [6, most_stages]
    assert (model.tuning.ring.stages, model.tuning.ring.prefetch_distance) == (most_stages, most_stages)
    expected = Reference(checkpoint, kv_dtype=F32, max_context=8).forward(token_ids[:2])
    assert_same_logits(kernel_logits(model, token_ids[:2]), expected, quant=False)


def test_a_prefetch_distance_shorter_than_the_ring_stays(make_model):
    model, _ = make_model(3, dict(stages=5, prefetch_distance=2))
    assert (model.tuning.ring.stages, model.tuning.ring.prefetch_distance) == (3, 2)


@pytest.mark.parametrize("stages, most_stages", [(0, -1), (MIN_STAGES, MIN_STAGES - 1), (5, MIN_STAGES - 1)])
def test_too_little_shared_memory_for_any_ring_is_refused(make_model, stages, most_stages):
    """0 stages stand for a device without a ring."""
    with pytest.raises(InputError, match="cpu has too little shared memory for this model"):
        make_model(most_stages, dict(stages=stages) if stages else None)


@pytest.mark.parametrize("changes", ODD_SIZES.values(), ids=ODD_SIZES.keys())
def test_a_ring_at_odd_sizes_agrees(changes, quant):
    config = small_config(**{"n_layers": 2, "layer_is_sliding": (True, False), **changes})
    checkpoint = loud_checkpoint(config)
    token_ids = random_token_ids(5, config)
    reference = Reference(checkpoint, quant, F32, max_context=5)
    expected = reference.forward(token_ids)
    model = MegaModel(checkpoint, quant, 5, num_programs=2, tuning=ring_tiles(config), kv_dtype=F32)
    assert_same_logits(kernel_logits(model, token_ids, cache=reference), expected, quant)


@pytest.mark.parametrize("dot_scaled", [True, False], ids=["dot_scaled", "float32 products"])
def test_quantized_experts_compute_the_same_numbers_both_ways(checkpoint, token_ids, dot_scaled):
    tuning = small_tiles(checkpoint.config, experts=dict(dot_scaled=dot_scaled))
    model = MegaModel(checkpoint, True, max_context=24, tuning=tuning, kv_dtype=F32)
    reference = Reference(checkpoint, True, F32, max_context=24)
    expected = reference.forward(token_ids[:24])
    assert_same_logits(kernel_logits(model, token_ids[:24], cache=reference), expected, quant=True)


@pytest.mark.parametrize("tiles", ["device", "small", "ring"])
def test_the_number_of_programs_does_not_change_a_bit(checkpoint, token_ids, quant, tiles):
    """Positions lie on both sides of the window of 20, of steps of 16, and of where each of 3 splits begins."""
    config = checkpoint.config
    splits = dict(min_split_keys=16, max_splits=3)
    tuning = {
        "device": tuning_for(CPU, config),
        "small": small_tiles(config, attention=splits),
        "ring": ring_tiles(config, attention=splits),
    }[tiles]
    positions = (41, 42, 43) if tiles == "ring" else (0, 1, 15, 16, 17, 19, 20, 21, 31, 32, 33, 43)  # a ring is slow
    runs = []
    for num_programs, seed in ((1, 0), (3, 1), (9, 2)):
        model = MegaModel(checkpoint, quant, max_context=45, num_programs=num_programs, tuning=tuning)
        fill_cache(model.state.k_cache, model.state.v_cache, 45, seed=1)
        with simulate(seed=seed):
            for position in positions:
                model.hidden(token_ids[position], position, config.n_layers)
            logits = model.logits(token_ids[44], 44)
            assert model.step(token_ids[44], 44) == int(logits.argmax())
        runs.append((logits, model.state.k_cache.clone(), model.state.v_cache.clone()))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_the_order_of_programs_does_not_change_a_bit(checkpoint, token_ids, quant):
    tuning = small_tiles(checkpoint.config, attention=dict(min_split_keys=16))
    model = MegaModel(checkpoint, quant, max_context=40, num_programs=5, tuning=tuning)
    fill_cache(model.state.k_cache, model.state.v_cache, 39, seed=1)
    runs = []
    for seed in range(4):
        with simulate(seed=seed):
            runs.append(model.logits(token_ids[39], 39))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("position", [5000, 131_000])
def test_far_positions_agree(checkpoint, token_ids, position):
    """YaRN reaches far beyond the original context of 4096. Both caches are zero, and attended, before `position`."""
    config = replace(checkpoint.config, n_layers=2, layer_is_sliding=(True, False))
    near = MemoryCheckpoint(config, {name: checkpoint.tensor(name) for name in expected_tensors(config)})
    few = token_ids[:12]
    expected = Reference(near, kv_dtype=F32, max_context=position + 12).forward(few, position)
    model = MegaModel(near, max_context=position + 12, kv_dtype=F32)
    assert_same_logits(kernel_logits(model, few, position), expected, quant=False)
    moved = Reference(near, kv_dtype=F32, max_context=12).forward(few)
    assert (moved - expected).abs().amax(-1).median() > CLEAR_MARGIN


@pytest.mark.parametrize("changes", ODD_SIZES.values(), ids=ODD_SIZES.keys())
def test_odd_sizes_agree(changes, quant):
    config = small_config(**{"n_layers": 2, "layer_is_sliding": (True, False), **changes})
    checkpoint = loud_checkpoint(config)
    token_ids = random_token_ids(5, config)
    reference = Reference(checkpoint, quant, F32, max_context=5)
    expected = reference.forward(token_ids)
    for tuning, num_programs in ((tuning_for(CPU, config), 1), (ahead_tiles(config), 2)):
        model = MegaModel(checkpoint, quant, 5, num_programs=num_programs, tuning=tuning, kv_dtype=F32)
        assert_same_logits(kernel_logits(model, token_ids, cache=reference), expected, quant)


def test_the_published_width_agrees(quant):
    """Hidden and intermediate 2880, and 64 heads on 8, are no multiples of any block.

    Layers, experts and words are few.
    """
    config = ModelConfig(n_layers=2, n_experts=6, vocab_size=515, layer_is_sliding=(True, False), stop_ids=())
    checkpoint = RandomCheckpoint(config, seed=3)
    token_ids = random_token_ids(3, config)
    expected = Reference(checkpoint, quant, F32, max_context=3).forward(token_ids)
    model = MegaModel(checkpoint, quant, max_context=3, kv_dtype=F32)
    # Wide, a token has thousands of activations to round, and each meets an E4M3 boundary now and then.
    error = (kernel_logits(model, token_ids) - expected).abs().max()
    assert error < (0.1 if quant else TOLERANCE)
