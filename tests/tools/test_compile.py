"""The whole kernel at 120b sizes, compiled ahead of time for gfx950 and sm_90 with no GPU."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_models import small_config

from checkpoints.config import BF16, FP8_GROUPS, FP8_ROWS, GPT_OSS_120B, DenseFormats
from host.launch import GFX950, SM_90, fit_ring, programs_on
from tools.compile_report import Program

ROOT = Path(__file__).parents[2]
GRID_BARRIERS = 8  # embedding, six phases, LM head; the layer loop stands once in the code
ARRIVALS = GRID_BARRIERS + 2  # a split of attention, the last program to leave
WAITS = GRID_BARRIERS + 1  # for the splits of attention
FP8_PATHS = {"default, qkv o head fp8-32": FP8_GROUPS, "quant, qkv o head fp8-row": FP8_ROWS}
PATHS = ["default", "quant", *FP8_PATHS]
AMD_CASES, NVIDIA_CASES = ([(target, path) for path in PATHS] for target in ("gfx950", "sm_90"))
CASES = AMD_CASES + NVIDIA_CASES
CUS, XCDS = 256, 8  # of an MI355X


@pytest.fixture(scope="module")
def reports(once):
    """Return (target, path) -> figures."""
    return {(figures["target"], figures["path"]): figures for figures in once("decoding", compiled)}


def compiled() -> list[dict]:
    """Compile in another process, because this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = []
    for words in ([], *(["--path", path.split(",")[0], "--fp8", dense] for path, dense in FP8_PATHS.items())):
        command = [sys.executable, "tools/compile_report.py", "--json", *words]
        output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600).stdout
        found += json.loads(output)
    return found


def weight_bytes(path: str) -> int:
    """Return the bytes of an element of QKV, O and the LM head."""
    return 1 if path in FP8_PATHS else 2


def test_quant_runs_on_the_scaled_matrix_cores_of_gfx950(reports):
    """dot_scaled falls back silently to other instructions where a tile is too small."""
    figures = reports["gfx950", "quant"]
    per_block = figures["gate_up_mfma_per_block"] + figures["down_mfma_per_block"]
    n_blocks = -(-GPT_OSS_120B.hidden_size // GFX950.experts.gate_up_k)  # as many as down has; the loops are unrolled
    assert figures["scaled_mfma"] == n_blocks * per_block
    assert reports["gfx950", "default"]["scaled_mfma"] == 0


@pytest.mark.parametrize("matrix, rows", [("gate_up", max(GFX950.experts.gate_up_rows, 64)), ("down", 16)])
def test_no_wave_repeats_the_scaled_mfmas_of_another(matrix, rows, reports):
    """Each takes 16 rows and 128 columns."""
    block_k = getattr(GFX950.experts, f"{matrix}_k")
    expected = rows // 16 * (block_k // 128) // GFX950.num_warps
    assert reports["gfx950", "quant"][f"{matrix}_mfma_per_block"] == expected


@pytest.mark.parametrize("case", AMD_CASES)
@pytest.mark.parametrize("matrix", ["gate_up", "down"])
def test_expert_loops_are_pipelined(matrix, case, reports):
    """Two blocks over K or more are loaded before the first product; a later one before products of the one before."""
    figures = reports[case]
    first, loads = figures[f"{matrix}_first_loads"], figures[f"{matrix}_loads"]
    n_blocks = loads // first  # in the code: the first and a loop's, or all three
    assert first > 0
    assert n_blocks == (3 if "quant" in case[1] else 2)
    assert figures[f"{matrix}_loads_in_front"] >= 2 * first
    assert figures[f"{matrix}_loads_ahead"] >= (first if n_blocks == 2 else loads - figures[f"{matrix}_loads_in_front"])


@pytest.mark.parametrize("case", AMD_CASES)
def test_dense_tiles_are_loaded_one_ahead(case, reports):
    """In the loops of QKV, O and LM head a thread's loads of the next tile precede this tile's products."""
    config, dense = GPT_OSS_120B, GFX950.dense
    block = dense.k_block
    matrices = [
        (dense.qkv_rows, config.hidden_size),
        (dense.o_rows, config.q_size),
        (dense.head_rows, config.hidden_size),
    ]
    tiles = sum(rows * -(-k // block) * block for rows, k in matrices)
    assert reports[case]["dense_loads_ahead"] == tiles * weight_bytes(case[1]) // 16 // (64 * GFX950.num_warps)


@pytest.mark.parametrize("case", AMD_CASES)
def test_loads_on_gfx950_are_wide(case, reports):
    """Weights: 16 bytes, but for the router's rows: one a program, 512 words of it a block, for 512 threads.

    Scales: a block over K has 32 bytes a row, 1 to 4 bytes a thread, so that wider loads would leave most threads idle
    and pass through shared memory. There must not be more of them than of the weights' loads.
    """
    figures = reports[case]
    weights, scales = figures["weight_loads"], figures["scale_loads"]
    assert weights.keys() == {"dwordx4", "dword"}
    assert weights["dword"] <= 6
    dense = 26 * weight_bytes(case[1])  # of two tiles of each matrix, the first one and the next, and experts' loads
    assert weights["dwordx4"] >= dense + 8
    assert scales.keys() <= {"ubyte", "ushort"}
    assert sum(scales.values()) <= sum(figures[f"{matrix}_loads"] for matrix in ("gate_up", "down"))


@pytest.mark.parametrize("case", AMD_CASES)
def test_nothing_spills_on_gfx950(case, reports):
    """Scalars spill into lanes of vector registers, 64 to each: three of them, not memory."""
    figures = reports[case]
    assert figures["spilled_registers"] == 0
    assert figures["stack_bytes"] == 0
    assert figures["spilled_scalars"] <= 3 * 64


@pytest.mark.parametrize("case", AMD_CASES)
def test_all_programs_are_resident_on_gfx950(case, reports):
    """Registers and shared memory allow the programs on a CU that the barrier assumes, equally many on each XCD."""
    assert reports[case]["programs_resident"] >= GFX950.programs_per_unit
    programs = programs_on(CUS, GFX950)
    assert programs < CUS
    assert programs % XCDS == 0


@pytest.mark.parametrize("case", AMD_CASES)
def test_a_barrier_on_gfx950_executes_no_more_than_needed(case, reports):
    """An arrival: one write-back, a wait before it and one after, at most one more for a load of its phase.

    A wait: one invalidation, none in the loop that polls, which polls_in_loops counts.
    """
    figures = reports[case]
    assert figures["write_backs"] == ARRIVALS
    assert figures["invalidations"] == ARRIVALS
    assert len(figures["arrival_waits"]) == ARRIVALS
    assert set(figures["arrival_waits"]) <= {2, 3}


def test_the_parameters_known_to_suit_gfx950():
    dense, experts = GFX950.dense, GFX950.experts
    assert (dense.qkv_rows, dense.o_rows) == (8, 8)
    assert (experts.gate_up_rows, experts.down_rows) == (32, 16)
    assert {dense.k_block, experts.gate_up_k, experts.down_k} == {1024}


@pytest.mark.parametrize("case", AMD_CASES)
def test_weights_load_16_bytes_at_a_time_on_gfx950(case, reports):
    assert reports[case]["loads_16_bytes"] >= 40


@pytest.mark.parametrize("case", NVIDIA_CASES)
def test_weights_stream_through_shared_memory_on_sm_90(case, reports):
    """The copy engine brings them, threads read 16 bytes of a stage at a time; only the router's rows are loaded."""
    figures, threads = reports[case], 32 * SM_90.num_warps
    dense_format = FP8_PATHS.get(case[1], BF16)
    config = replace(GPT_OSS_120B, dense=DenseFormats(qkv=dense_format, o=dense_format, head=dense_format))
    tiles = fit_ring(SM_90, config).dense
    assert figures["bulk_copies"] > 0
    dense = [(tiles.qkv_rows, config.hidden_size), (tiles.o_rows, config.q_size), (tiles.head_rows, config.hidden_size)]
    experts = [(16, config.hidden_size), (16, config.intermediate_size)]
    a_tile_each = sum(-(-rows * k * weight_bytes(case[1]) // (16 * threads)) for rows, k in dense)
    a_tile_each += sum(-(-rows * k // (32 * threads)) for rows, k in experts)
    assert figures["shared_loads_16_bytes"] >= a_tile_each
    router = -(-config.hidden_size // tiles.k_block) * tiles.k_block // (8 * threads)
    assert figures["weight_loads"] == {"128": 2 * router}  # a program's first row and, with few programs, later ones


@pytest.mark.parametrize("case", CASES)
def test_every_arrival_is_ordered_and_every_wait_is_one(case, reports):
    """The cache is written back before an arrival and invalidated after the wait, whose poll loads inside its loop."""
    figures = reports[case]
    assert figures["arrivals"] == ARRIVALS
    assert figures["acquires"] == ARRIVALS
    assert figures["polls_in_loops"] == WAITS
    assert case[0] != "gfx950" or figures["arrivals_drained"] == ARRIVALS


@pytest.mark.parametrize("case", CASES)
def test_the_programs_fit(case, reports):
    """Registers and shared memory allow all programs that must be resident together: one a CU, one an SM."""
    figures = reports[case]
    if case[0] == "gfx950":  # eight waves on four SIMDs of 512 registers; 160 KB of shared memory
        assert figures["registers"] <= 256
        assert figures["shared_bytes"] <= 160 << 10
    else:  # eight warps on 65536 registers; 227 KB
        assert figures["registers"] <= 255
        assert figures["shared_bytes"] <= 227 << 10
        assert figures["stack_bytes"] <= 64
        assert figures["spills_in_a_loop"] == 0


def test_a_ring_stands_beside_a_float32_cache_on_sm_90():
    """Attention takes more shared memory then; MegaModel shortens the ring, here by two of its seven stages."""
    script = (
        "from dataclasses import replace\n"
        "import torch\n"
        "from host.launch import SM_90\n"
        "from tools.compile_report import compile_megakernel\n"
        "ring = replace(SM_90.ring, stages=SM_90.ring.stages - 2)\n"
        "tuning = replace(SM_90, ring=ring)\n"
        "kernel = compile_megakernel('sm_90', False, tuning=tuning, kv_dtype=torch.float32)\n"
        "print(kernel.metadata.shared, ring.prefetch_distance, ring.stages)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=600)
    shared, distance, stages = map(int, done.stdout.split())
    assert shared <= 227 << 10
    assert distance <= stages


def test_other_sizes_compile():
    """A configuration unlike the published ones compiles for both targets."""
    config = small_config(hidden_size=416, intermediate_size=224, n_experts=5, experts_per_token=3, head_dim=128)
    script = (
        "from checkpoints.config import DenseFormats, ModelConfig, YarnConfig\n"
        "from tools.compile_report import compile_megakernel\n"
        f"config = {config!r}\n"
        "for target in ('gfx950', 'sm_90'):\n"
        "    for quant in (False, True):\n"
        "        assert compile_megakernel(target, quant, config).asm\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, timeout=600)


AMD_LOOP = """
.LBB0_1:
\tbuffer_wbl2 sc1
\ts_waitcnt vmcnt(0)
\tglobal_atomic_add v4, v4, v5, s[0:1] sc0
.LBB0_2:
\tglobal_load_dword v4, v1, s[0:1] sc1
\ts_cbranch_vccnz .LBB0_2
\ts_branch .LBB0_1
"""


def test_a_poll_hoisted_out_of_its_loop_would_be_seen():
    """The report reads control flow: the outer loop does not count, because it passes another arrival."""
    inside = Program.from_amdgcn(AMD_LOOP)
    assert [inside.repeats(i, "buffer_wbl2") for i in inside.find("global_load_dword")] == [True]
    hoisted = Program.from_amdgcn(
        AMD_LOOP.replace("vccnz .LBB0_2", "vccnz .LBB0_3").replace("\ts_branch", ".LBB0_3:\n\ts_branch")
    )
    assert [hoisted.repeats(i, "buffer_wbl2") for i in hoisted.find("global_load_dword")] == [False]


def test_sources_are_found_of_a_kernel_that_another_checkout_compiled():
    """The other checkout's folder may no longer exist."""
    source = (ROOT / "common" / "grouping.py").read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "tl.load(table_ptr)" in text)
    asm = f"""
    .file 1 "/gone/common" "grouping.py"
    .file 2 "/gone/lib/triton/language" "standard.py"
    .loc 2 40 3
    v_add_u32 v1, v2, v3
    .loc 1 {line} 5
    global_load_dword v1, v[2:3], off
    """
    assert Program.from_amdgcn(asm).loads_of(re.compile(r"tl\.load\(table_ptr\)")) == [1]
