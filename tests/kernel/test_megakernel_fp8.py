"""Dense matrices in FP8, on every path of the kernel, against reference.py with the same matrices rounded.

tests/checkpoints/test_fp8.py tests the quantizer. Here both sides have the same bytes, so that the tolerances are those
of bfloat16.
"""

import json

import pytest
import torch
from made_up_models import ODD_SIZES, loud_checkpoint, random_token_ids, small_config
from small_model import assert_rejected, byte_tokenizer, run_script, write_model
from test_megakernel import CLEAR_MARGIN, F32, assert_same_logits, kernel_logits
from tunings import ahead_tiles, ring_tiles, small_tiles

import bench_tpot
import gpt_oss_megakernel
import run_reference
import run_triton_phased
from checkpoints.checkpoint import write_checkpoint
from checkpoints.config import FP8_GROUPS, FP8_ROWS, DenseFormats
from gpt_oss_megakernel import MegaModel
from host.launch import tuning_for
from interpreter import simulate
from kernels import PhasedModel
from measure.random_cache import fill_cache
from reference import Reference
from system.errors import InputError

CPU = torch.device("cpu")
TOKENS = 8
COMPONENTS = ["qkv", "o", "router", "head"]
FORMATS = [FP8_ROWS, FP8_GROUPS]
SCRIPTS = [gpt_oss_megakernel, run_triton_phased, run_reference]
TILES = {
    "rows": small_tiles,
    "loaded ahead": ahead_tiles,
    "ring": ring_tiles,
}


def in_fp8(dense_format: str, *components: str) -> DenseFormats:
    return DenseFormats(**dict.fromkeys(components or COMPONENTS, dense_format))


MIXED = DenseFormats(qkv=FP8_ROWS, o=FP8_GROUPS, head=FP8_ROWS)
with_format = pytest.mark.parametrize("dense_format", FORMATS)
with_quant = pytest.mark.parametrize("quant", [False, True], ids=["default", "quant"])


@pytest.fixture(scope="module")
def token_ids(checkpoint):
    return random_token_ids(TOKENS, checkpoint.config)


@pytest.fixture(scope="module")
def right(checkpoint, token_ids):
    """Return a function: the fed reference of these formats, and its logits."""
    found = {}

    def right(dense: DenseFormats, quant: bool) -> tuple[Reference, torch.Tensor]:
        if (dense, quant) not in found:
            reference = Reference(checkpoint, quant, F32, max_context=TOKENS, dense=dense)
            found[dense, quant] = reference, reference.forward(token_ids)
        return found[dense, quant]

    return right


def worst(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the median of the tokens' worst logits."""
    return (logits - expected).abs().amax(-1).median().item()


@with_quant
@with_format
@pytest.mark.parametrize("components", [*([name] for name in COMPONENTS), COMPONENTS], ids="+".join)
def test_logits(checkpoint, token_ids, right, components, dense_format, quant):
    dense = in_fp8(dense_format, *components)
    reference, expected = right(dense, quant)
    model = MegaModel(checkpoint, quant, max_context=TOKENS, kv_dtype=F32, dense=dense)
    logits = kernel_logits(model, token_ids, cache=reference if quant else None)
    assert_same_logits(logits, expected, quant)
    assert worst(logits, right(DenseFormats(), quant)[1]) > CLEAR_MARGIN


@pytest.mark.parametrize("dense", [in_fp8(FP8_ROWS), in_fp8(FP8_GROUPS), MIXED], ids=["rows", "groups", "mixed"])
@pytest.mark.parametrize("tiles, quant", [("rows", False), ("loaded ahead", True), ("ring", True)])
def test_several_tiles_and_programs_agree(checkpoint, token_ids, right, tiles, dense, quant):
    """Each phase has several tiles, the last one short, and several programs."""
    reference, expected = right(dense, quant)
    tuning, n = TILES[tiles](checkpoint.config), 1 if tiles == "ring" else 5  # which is slow
    model = MegaModel(checkpoint, quant, TOKENS, num_programs=3, tuning=tuning, kv_dtype=F32, dense=dense)
    logits = kernel_logits(model, token_ids[-n:], TOKENS - n, cache=reference)
    assert_same_logits(logits, expected[-n:], quant)


@pytest.mark.parametrize(
    "tiles, dense, quant",
    [
        (small_tiles, in_fp8(FP8_ROWS), True),
        (small_tiles, in_fp8(FP8_GROUPS), False),
        (ring_tiles, MIXED, False),
    ],
    ids=["rows", "groups", "ring"],
)
def test_any_programs_in_any_order_and_phases_alone_give_the_same_bits(checkpoint, token_ids, tiles, dense, quant):
    """Positions lie beyond the window of 20, where the full layer is split."""
    tuning, position = tiles(checkpoint.config, attention=dict(min_split_keys=16, max_splits=3)), 39
    runs = []
    for kind, num_programs, seed in ((MegaModel, 1, 0), (MegaModel, 9, 1), (PhasedModel, 2, 2)):
        model = kind(checkpoint, quant, 40, num_programs=num_programs, tuning=tuning, dense=dense)
        fill_cache(model.state.k_cache, model.state.v_cache, position, seed=1)
        with simulate(seed=seed):
            logits = model.logits(token_ids[0], position)
        runs.append((logits, model.state.k_cache.clone(), model.state.v_cache.clone()))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


WIDTHS = ["one head a group", "seventeen heads a group", "hidden 416, intermediate 224", "vocabulary 1003"]


@with_format
@pytest.mark.parametrize("name", WIDTHS)
def test_odd_sizes(name, dense_format):
    config = small_config(**{"n_layers": 1, "layer_is_sliding": (False,), **ODD_SIZES[name]})
    checkpoint, ids, dense = loud_checkpoint(config), random_token_ids(1, config), in_fp8(dense_format)
    if dense_format == FP8_GROUPS and config.q_size % 32:
        with pytest.raises(InputError, match=f"fp8-32: rows of {config.q_size} elements are no whole groups of 32"):
            MegaModel(checkpoint, dense=dense)
        return
    expected = Reference(checkpoint, False, F32, max_context=3, dense=dense).forward(ids)
    for tuning, num_programs in ((tuning_for(CPU, config), 1), (small_tiles(config), 3), (ring_tiles(config), 1)):
        model = MegaModel(checkpoint, False, 3, num_programs=num_programs, tuning=tuning, kv_dtype=F32, dense=dense)
        assert_same_logits(kernel_logits(model, ids), expected, quant=False)


def rolled(weights, field: str):
    """Give each row's scales to the next row."""
    return {field: getattr(weights, field).roll(1, -1 if getattr(weights, field).dtype == torch.float32 else -2)}


def reversed_bytes(weights, field: str):
    return {
        field: getattr(weights, field).view(torch.uint8).unflatten(-1, (-1, 4)).flip(-1).flatten(-2).view(torch.int32)
    }


def next_layer(weights, field: str):
    return {field: getattr(weights, field).roll(1, 0)}


def groups_rolled(weights, field: str):
    return {field: getattr(weights, field).roll(1, -1)}


SCALES = ["qkv_scales", "o_scales", "router_scales", "lm_head_scales"]
MISTAKES = [
    *((rolled, field, dense_format) for field in SCALES for dense_format in FORMATS),
    *((groups_rolled, field, FP8_GROUPS) for field in SCALES),
    *((reversed_bytes, field.removesuffix("_scales"), FP8_ROWS) for field in SCALES),
    *((next_layer, field, FP8_ROWS) for field in SCALES[:3]),
]


@pytest.mark.parametrize("mistake, field, dense_format", MISTAKES)
def test_each_scale_and_each_byte_matters(checkpoint, token_ids, right, mistake, field, dense_format):
    """A kernel that took the wrong one would be far outside the tolerance."""
    dense = in_fp8(dense_format)
    reference, expected = right(dense, False)
    model = MegaModel(checkpoint, max_context=TOKENS, kv_dtype=F32, dense=dense)
    right_weights, few = model.weights, slice(TOKENS - 3, TOKENS)
    model.weights = right_weights._replace(**mistake(right_weights, field))
    logits = kernel_logits(model, token_ids[few], TOKENS - 3, cache=reference)
    assert worst(logits, expected[few]) > CLEAR_MARGIN


# The first thing in the reference's trace of layer 0 that each matrix changes; all before it stays.
TRACE = ["qkv", "attention", "router_logits", "expert_act", "output"]
FIRST_CHANGED = {"qkv": "qkv", "o": "router_logits", "router": "router_logits", "head": None}


@with_format
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_reference_rounds_what_it_is_asked_to(checkpoint, token_ids, component, dense_format):
    plain, rounded = {}, {}
    Reference(checkpoint, False, F32, TOKENS).forward(token_ids, trace=plain)
    dense = in_fp8(dense_format, component)
    logits = Reference(checkpoint, False, F32, TOKENS, dense=dense).forward(token_ids, trace=rounded)
    first = FIRST_CHANGED[component]
    same = TRACE[: TRACE.index(first)] if first else TRACE
    for name in same:
        assert torch.equal(plain[f"layers.0.{name}"], rounded[f"layers.0.{name}"])
    if first:
        assert worst(plain[f"layers.0.{first}"], rounded[f"layers.0.{first}"]) > CLEAR_MARGIN
    others = [Reference(checkpoint, False, F32, TOKENS).forward(token_ids)]
    others += [
        Reference(checkpoint, False, F32, TOKENS, dense=in_fp8(dense_format, other)).forward(token_ids)
        for other in COMPONENTS
        if other != component
    ]
    assert all(worst(logits, other) > CLEAR_MARGIN for other in others)


def test_the_two_kinds_of_scales_differ(right):
    assert worst(right(in_fp8(FP8_ROWS), False)[1], right(in_fp8(FP8_GROUPS), False)[1]) > CLEAR_MARGIN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "words, path",
    [
        (["--fp8-attn"], "default, qkv o fp8-row"),
        (["--fp8-head", "--fp8-scale", "32"], "default, head fp8-32"),
        (["--quant", "--fp8-attn", "--fp8-head"], "quant, qkv o head fp8-row"),
        (["--fp8-components", "router,qkv", "--fp8-scale", "row"], "default, qkv router fp8-row"),
        (["--fp8-attn", "--fp8-components", "o,head"], "default, qkv o head fp8-row"),
    ],
)
def test_each_script_tells_the_path_and_all_say_the_same(folder, words, path, monkeypatch, capsys):
    answers = []
    for script in SCRIPTS:
        line = ["--model", folder, "--prompt", "ab", "--max-new-tokens", 4, "--json", *words]
        code, out, err = run_script(script.main, line, monkeypatch, capsys)
        assert (code, err) == (0, "")
        answers.append(json.loads(out))
    others = ["phased", "reference"] if path.startswith("default") else ["phased-quant", "reference-quant"]
    matrices = path.split(",")[1]
    assert [answer["path"] for answer in answers] == [path, *(f"{other},{matrices}" for other in others)]
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]


@pytest.mark.parametrize("script", [*SCRIPTS, bench_tpot])
@pytest.mark.parametrize(
    "words, culprits",
    [
        (["--fp8-scale", "row"], ["--fp8-scale: which matrices?"]),
        (["--fp8-scale", "64", "--fp8-attn"], ["--fp8-scale", "'64'"]),
        (["--fp8-components", "qkv,embed"], ["--fp8-components", "'qkv,embed'", "qkv, o, router, head"]),
        (["--fp8-components", ""], ["--fp8-components", "''"]),
        (["--fp8-components", ","], ["--fp8-components", "','"]),
        (["--fp8-components"], ["--fp8-components"]),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(folder, script, words, culprits, monkeypatch, capsys):
    assert_rejected(run_script(script.main, ["--model", folder, *words], monkeypatch, capsys), *culprits)


def test_rows_that_are_no_groups_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    config = small_config(**ODD_SIZES["seventeen heads a group"])
    folder = write_checkpoint(loud_checkpoint(config), tmp_path / "model")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    words = ["--model", folder, "--prompt-ids", "1", "--fp8-attn", "--fp8-scale", "32"]
    for script in SCRIPTS:
        assert_rejected(run_script(script.main, words, monkeypatch, capsys), "no whole groups of 32")


def test_benchmark_measures_the_path_it_names(folder, monkeypatch, capsys):
    words = ["--model", folder, "--both", "--fp8-head", "--contexts", "4", "--steps", 2, "--repeats", 1]
    code, out, _ = run_script(bench_tpot.main, words, monkeypatch, capsys)
    assert code == 0
    assert "default, head fp8-row" in out
    assert "quant, head fp8-row" in out
