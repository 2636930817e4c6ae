"""Prompts in blocks at 120b sizes, compiled ahead of time for gfx950 and sm_90 with no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_models import small_config

from checkpoints.config import FP8_GROUPS, FP8_ROWS, GPT_OSS_120B
from host.launch import LAUNCH_TABLE
from host.tuning import BlockTuning, Tile

ROOT = Path(__file__).parents[2]
TOKENS = [5, 300, 500, 700, 2048, 4000]  # for which there is each tile
# The words that compile them, and the path that the report calls them.
TARGETS = ("gfx950", "sm_90")
PATHS = {"default": [], "quant": []}
FP8_PATHS = {"default, qkv o router fp8-32": FP8_GROUPS, "quant, qkv o router fp8-row": FP8_ROWS}
CASES = [(target, path) for target in TARGETS for path in [*PATHS, *FP8_PATHS]]
AMD_CASES, NVIDIA_CASES = ([case for case in CASES if case[0] == target] for target in TARGETS)
SHARED_BYTES = {"gfx950": 160 << 10, "sm_90": 227 << 10}  # that a program can have
DENSE, EXPERTS = ["dense_kernel", "prompt_router_kernel"], ["prompt_gate_up_kernel", "prompt_down_kernel"]
PRODUCTS = [*DENSE, "prompt_attention_kernel", *EXPERTS]


@pytest.fixture(scope="module")
def reports(once):
    """Return (target, path) -> figures of each kernel."""
    found = {}
    for figures in once("prompts", compiled):
        found.setdefault((figures["target"], figures["path"]), []).append(figures)
    return found


def compiled() -> list[dict]:
    """Compile in another process, because this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    runs = [["--tokens", *map(str, TOKENS)]]
    for path, dense_format in FP8_PATHS.items():
        runs.append(["--tokens", "5", "700", "--path", path.split(",")[0], "--fp8", dense_format])
    found = []
    for words in runs:
        command = [sys.executable, "-m", "tools.compile_prefill", "--json", *words]
        output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600).stdout
        found += json.loads(output)
    return found


def of(reports: dict, case: tuple[str, str], kernels: list[str]) -> list[dict]:
    """Return the figures of these kernels, all of which must exist."""
    found = [figures for figures in reports[case] if figures["kernel"] in kernels]
    assert {figures["kernel"] for figures in found} == set(kernels)
    return found


def copies(figures: dict) -> dict[str, float]:
    """Bits -> a thread's copies that bring a step's operands to shared memory, as they should be.

    Operands are weights and vectors, or keys and values, 16 bytes a copy. E4M3 is copied in pieces of 8 bytes: those
    that a thread converts to bfloat16.
    """
    kernel, options = figures["kernel"], figures["options"]
    threads = 32 * options["num_warps"]
    if kernel == "prompt_attention_kernel":
        return {"128": 2 * options["BLOCK_KEYS"] * GPT_OSS_120B.head_dim * 2 / 16 / threads}
    tile = Tile(**options["TILE"])
    rows, tokens, k = tile.m, tile.width, tile.k
    if kernel in EXPERTS:
        scale_bits = rows // 2 * k // 32 * 32 // threads  # a word for two rows, and for two steps
        return {"128": k * (rows / 2 + tokens * 2) / 16 / threads, str(scale_bits): 1}
    vectors = 2 * tokens * 2 * k / 16 / threads
    if "fp8" in figures["path"]:
        return {"128": vectors, "64": k * rows / 8 / threads}
    return {"128": vectors + k * rows * 2 / 16 / threads}


@pytest.mark.parametrize("case", CASES)
def test_every_tile_is_compiled(case, reports):
    """No tile for many or few tokens is left out by the tests below."""
    blocks: BlockTuning = LAUNCH_TABLE[case[0]].blocks
    tiles_of = {
        "dense_kernel": blocks.dense,
        "prompt_gate_up_kernel": blocks.gate_up,
        "prompt_down_kernel": blocks.down,
    }
    for kernel, tiles in tiles_of.items():
        compiled = {Tile(**figures["options"]["TILE"]) for figures in of(reports, case, [kernel])}
        assert compiled == {*tiles} or case[1] not in PATHS


@pytest.mark.parametrize("case", CASES)
def test_nothing_spills(case, reports):
    for figures in reports[case]:
        assert (figures["spills"], figures["stack_bytes"]) == (0, 0), figures


@pytest.mark.parametrize("case", CASES)
def test_programs_fit_shared_memory(case, reports):
    for figures in reports[case]:
        assert figures["shared_bytes"] <= SHARED_BYTES[case[0]], figures


@pytest.mark.parametrize("case", AMD_CASES)
def test_products_run_on_the_matrix_cores_of_gfx950(case, reports):
    """With --quant the experts' products are scaled: dot_scaled falls back silently where a tile is too small."""
    quant = case[1].startswith("quant")
    for figures in of(reports, case, PRODUCTS):
        scaled = quant and figures["kernel"] in EXPERTS
        assert (figures["scaled_products"] > 0) == scaled, figures
        assert (figures["products"] > 0) == (not scaled), figures


@pytest.mark.parametrize("case", NVIDIA_CASES)
def test_products_run_on_the_tensor_cores_of_sm_90(case, reports):
    """Products are wgmma of four warps together; those of one warp reach half of the rate."""
    for figures in of(reports, case, PRODUCTS):
        assert figures["products"] > 0, figures
        assert figures["small_products"] == 0, figures


@pytest.mark.parametrize("case", AMD_CASES)
def test_weights_load_16_bytes_at_a_time_on_gfx950(case, reports):
    for figures in of(reports, case, [*DENSE, *EXPERTS]):
        assert figures["weight_loads"].keys() == {"dwordx4"}, figures


@pytest.mark.parametrize("case", NVIDIA_CASES)
def test_operands_stream_through_shared_memory_on_sm_90(case, reports):
    """All of a step's operands come by asynchronous copies while an earlier step is multiplied."""
    for figures in of(reports, case, PRODUCTS):
        assert figures["copies_in_a_loop"] == copies(figures), figures


def test_other_sizes_compile():
    """A configuration unlike the published ones compiles for both targets."""
    config = small_config(hidden_size=416, intermediate_size=224, n_experts=5, experts_per_token=3, head_dim=128)
    script = (
        "from checkpoints.config import DenseFormats, ModelConfig, YarnConfig\n"
        "from tools.compile_prefill import compile_launch, launches_of_block\n"
        f"config = {config!r}\n"
        "for target in ('gfx950', 'sm_90'):\n"
        "    for quant in (False, True):\n"
        "        for kernel, _, values, options in launches_of_block(target, quant, 40, config):\n"
        "            if not quant or 'BUILD' in options:\n"
        "                assert compile_launch(target, kernel, values, options).asm\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, timeout=600)
