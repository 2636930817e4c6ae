"""The whole kernel at 120b sizes, compiled ahead of time for gfx950 and sm_90 with no GPU: what came of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import small_config

from tools.compile_report import Program

ROOT = Path(__file__).parent.parent
GRID_BARRIERS = 8  # embedding, six phases, LM head; the layer loop stands once in the code
ARRIVALS = GRID_BARRIERS + 2  # the last split of attention, the last program to leave
CASES = [("gfx950", "default"), ("gfx950", "quant"), ("sm_90", "default"), ("sm_90", "quant")]


@pytest.fixture(scope="module")
def reports():
    """In a process of its own: this one interprets kernels."""
    command = [sys.executable, "tools/compile_report.py", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600).stdout
    return {(figures["target"], figures["path"]): figures for figures in json.loads(output)}


def test_quant_runs_on_the_scaled_matrix_cores_of_gfx950(reports):
    """dot_scaled falls back silently to other instructions where a tile is too small."""
    assert reports["gfx950", "quant"]["scaled_mfma"] >= 32
    assert reports["gfx950", "default"]["scaled_mfma"] == 0


@pytest.mark.parametrize("case", CASES)
def test_weights_load_16_bytes_at_a_time(case, reports):
    assert reports[case]["loads_16_bytes"] >= 40


@pytest.mark.parametrize("case", CASES)
def test_every_arrival_is_ordered_and_every_wait_is_one(case, reports):
    """Device-scope write-back before an arrival, invalidate after the wait, and the poll's load inside its loop."""
    figures = reports[case]
    assert figures["arrivals"] == ARRIVALS
    assert figures["acquires"] == ARRIVALS
    assert figures["polls_in_loops"] == GRID_BARRIERS
    assert case[0] != "gfx950" or figures["arrivals_drained"] == ARRIVALS


@pytest.mark.parametrize("case", CASES)
def test_the_programs_fit(case, reports):
    """Registers and shared memory of the programs that must be resident together: one a CU, two an SM."""
    figures = reports[case]
    if case[0] == "gfx950":  # eight waves on four SIMDs of 512 registers; 160 KB of shared memory
        assert figures["registers"] <= 256
        assert figures["shared_bytes"] <= 160 << 10
        assert figures["stack_bytes"] == 0
    else:  # two programs of four warps on 65536 registers; 227 KB
        assert figures["registers"] <= 255
        assert 2 * figures["shared_bytes"] <= 227 << 10
        assert figures["stack_bytes"] <= 64


def test_other_sizes_compile():
    """A configuration unlike the published ones, for both targets."""
    config = small_config(hidden_size=416, intermediate_size=224, n_experts=5, experts_per_token=3, head_dim=128)
    script = (
        "from host.config import ModelConfig, YarnConfig\n"
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
    """The report's own reading of control flow: the outer loop does not count, as it passes another arrival."""
    inside = Program.from_amdgcn(AMD_LOOP)
    assert [inside.repeats(i, "buffer_wbl2") for i in inside.find("global_load_dword")] == [True]
    hoisted = Program.from_amdgcn(
        AMD_LOOP.replace("vccnz .LBB0_2", "vccnz .LBB0_3").replace("\ts_branch", ".LBB0_3:\n\ts_branch")
    )
    assert [hoisted.repeats(i, "buffer_wbl2") for i in hoisted.find("global_load_dword")] == [False]
