"""Wait states: each row of hazards.py is reported with one too few, and not with as many as it wants.

The numbers stand in AMD's "CDNA4 Instruction Set Architecture", tables 11 and 38, and LLVM's GCNHazardRecognizer.
"""

import pytest
import torch
from assembly import FIRST_POINTER, kernel, pointer

from tools.gfx950.decode import decode
from tools.gfx950.emulator import Conditions, Finding, Program
from tools.gfx950.hazards import HAZARDS, Use
from tools.gfx950.layout import Problem

CONDITIONS = Conditions(check_hazards=True, check_lds=False)
SETUP = f"""
    v_mov_b32 v1, 0
    s_mov_b32 s8, s{FIRST_POINTER}
    s_mov_b32 s9, s{FIRST_POINTER + 1}
    s_mov_b32 s10, 0x1000
    s_mov_b32 s11, 0x27000
    s_mov_b32 s20, 0
    s_nop 15
    s_nop 15
"""
TO_SCALAR = "v_readfirstlane_b32 s20, v1"
TO_VCC = "v_cmp_eq_u32 vcc, v1, v1"
TO_EXEC = "v_cmpx_eq_u32 vcc, v1, v1"
TO_VECTOR = "v_mov_b32 v4, 0"
DPP = "v_mov_b32_dpp v9, v4 row_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:1"
PART = "v_or_b32_sdwa v4, v5, v6 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD"
XDL_4 = "v_mfma_f32_16x16x32_f16 v[64:67], v[16:19], v[24:27], v[48:51]"
XDL_8 = "v_mfma_f32_32x32x16_bf16 v[64:79], v[16:19], v[24:27], v[48:63]"
XDL_16 = "v_mfma_scale_f32_32x32x64_f8f6f4 v[64:79], v[16:23], v[24:31], v[48:63], v10, v11"
SGEMM_8 = "v_mfma_f32_16x16x4_f32 v[64:67], v16, v24, v[48:51]"
SGEMM_16 = "v_mfma_f32_32x32x2_f32 v[64:79], v16, v24, v[48:63]"
PRODUCTS = {  # passes
    XDL_4: 4,
    XDL_8: 8,
    XDL_16: 16,
    "v_mfma_f32_16x16x32_fp8_fp8 v[64:67], v[16:17], v[24:25], v[48:51]": 4,
    "v_mfma_f32_32x32x16_fp8_fp8 v[64:79], v[16:17], v[24:25], v[48:63]": 8,
    "v_mfma_f32_16x16x128_f8f6f4 v[64:67], v[16:19], v[24:27], v[48:51] cbsz:4 blgp:4": 4,
    "v_mfma_f32_16x16x128_f8f6f4 v[64:67], v[16:19], v[24:31], v[48:51] cbsz:4 blgp:1": 8,
    "v_mfma_f32_32x32x64_f8f6f4 v[64:79], v[16:21], v[24:29], v[48:63] cbsz:2 blgp:3": 8,
}
RESULT_USES = [
    "v_mov_b32 v9, v66",
    "v_mov_b32 v66, 0",
    "v_accvgpr_write_b32 a0, v66",
    f"global_store_dword v1, v66, {pointer(0)}",
    "buffer_store_dword v66, v1, s[8:11], 0 offen",
    f"global_load_dword v66, v1, {pointer(0)}",
    "ds_write_b32 v1, v66",
    "ds_write2_b32 v1, v4, v66 offset1:1",
    "ds_read_b32 v66, v1",
    "v_mfma_f32_16x16x32_f16 v[80:83], v[64:67], v[24:27], v[48:51]",
    "v_mfma_f32_16x16x4_f32 v[80:83], v16, v66, v[48:51]",
    "v_mfma_scale_f32_16x16x128_f8f6f4 v[80:83], v[16:23], v[24:31], v[48:51], v10, v66",
]
XDL_SUMMAND = "v_mfma_f32_16x16x32_f16 v[80:83], v[16:19], v[24:27], v[66:69]"
SGEMM_SUMMAND = "v_mfma_f32_16x16x4_f32 v[80:83], v16, v24, v[66:69]"
# Two instructions, and the wait states that they need.
ROWS = [
    (TO_SCALAR, "buffer_load_dword v9, v1, s[8:11], s20 offen", 5),
    ("v_readfirstlane_b32 s10, v1", "buffer_store_dword v9, v1, s[8:11], 0 offen", 5),
    (TO_SCALAR, "v_readlane_b32 s21, v9, s20", 4),
    (TO_SCALAR, "v_writelane_b32 v9, 1, s20", 4),
    ("v_cmp_eq_u32_e64 s[20:21], v1, v1", "v_readlane_b32 s22, v9, s21", 4),
    (TO_VCC, "v_div_fmas_f32 v9, v4, v5, v6", 4),
    ("v_div_scale_f32 v4, vcc, v5, v6, v5", "v_div_fmas_f32 v9, v7, v5, v6", 4),
    (TO_SCALAR, "v_add_u32 v9, s20, v4", 2),
    (TO_VCC, "v_mov_b32 v9, vcc_lo", 2),
    (TO_VCC, "v_cndmask_b32 v9, v4, v5, vcc", 2),
    ("v_add_co_u32 v9, vcc, v5, v6", "v_cndmask_b32 v4, v4, v5, vcc", 2),
    ("v_mad_u64_u32 v[6:7], s[20:21], v4, v5, v[6:7]", "v_mov_b32 v9, s20", 2),
    (TO_EXEC, DPP, 5),
    (TO_EXEC, "v_readlane_b32 s21, v4, 0", 4),
    (TO_EXEC, "v_readfirstlane_b32 s21, v4", 4),
    (TO_EXEC, "v_writelane_b32 v4, 1, 0", 4),
    (TO_EXEC, "v_permlane32_swap_b32 v4, v5", 4),
    (TO_EXEC, XDL_4, 4),
    (TO_EXEC, "v_mov_b32 v9, exec_lo", 2),
    (TO_VECTOR, DPP, 2),
    ("v_swap_b32 v5, v4", DPP, 2),
    ("v_mov_b32 v9, 0", "v_mov_b32_dpp v9, v4 row_shl:4 row_mask:0xf bank_mask:0x5", 2),
    (TO_VECTOR, "v_permlane16_swap_b32 v5, v4", 2),
    (TO_VECTOR, "v_readlane_b32 s21, v4, 0", 1),
    (TO_VECTOR, "v_readfirstlane_b32 s21, v4", 1),
    ("v_mov_b32 v17, 0", XDL_4, 2),
    ("v_mov_b32 v50, 0", SGEMM_8, 2),
    ("v_mov_b32 v11, 0", XDL_16, 2),
    ("v_accvgpr_write_b32 a2, v4", "v_mfma_f32_16x16x32_f16 a[0:3], v[16:19], v[24:27], a[0:3]", 2),
    ("v_rcp_f32 v4, v5", "v_fma_f32 v9, v6, v7, -v4", 1),
    ("v_exp_f32 v4, v5", "v_fmac_f32 v4, v6, v7", 1),
    (PART, "v_mov_b32 v9, v4", 1),
    (PART, "v_mov_b32 v4, v9", 1),
    (PART, "v_rcp_f32 v9, v4", 1),
    ("v_cvt_scalef32_pk_fp8_f32 v4, v5, v6, 1.0 op_sel:[0,0,0,1]", "v_mov_b32 v9, v4", 1),
    ("v_cvt_pk_fp8_f32 v4, v5, v6 op_sel:[0,0,1]", "v_cvt_pk_fp8_f32 v4, v5, v6", 1),
    (f"global_store_dwordx4 v1, v[4:7], {pointer(0)}", "v_mov_b32 v5, 0", 2),
    ("buffer_store_dwordx3 v[4:6], v1, s[8:11], 0 offen", "v_mov_b32 v5, 0", 2),
    (f"global_store_dwordx4 v1, v[64:67], {pointer(0)}", XDL_4, 2),
    *((product, use, passes + 4) for product, passes in PRODUCTS.items() for use in RESULT_USES),
    *((product, use, passes + 2) for product, passes in PRODUCTS.items() for use in (XDL_SUMMAND, SGEMM_SUMMAND)),
    *((product, "v_mov_b32 v49, 0", passes - 1) for product, passes in PRODUCTS.items()),
    *((product, f"global_load_dword v50, v1, {pointer(0)}", passes - 1) for product, passes in PRODUCTS.items()),
    *((product, use, passes + 2) for product, passes in ((SGEMM_8, 8), (SGEMM_16, 16)) for use in RESULT_USES),
    *((product, SGEMM_SUMMAND, passes) for product, passes in ((SGEMM_8, 8), (SGEMM_16, 16))),
]
# What may follow at once.
CLEAN = [
    ("s_mov_b32 s20, 0", "buffer_load_dword v9, v1, s[8:11], s20 offen"),
    (TO_SCALAR, "s_add_u32 s21, s20, 1"),
    (TO_SCALAR, "v_mov_b32 v9, s21"),
    ("v_add_co_u32 v4, vcc, v5, v6", "v_addc_co_u32 v5, vcc, v5, v6, vcc"),
    (TO_EXEC, "v_mov_b32 v9, v4"),
    ("s_mov_b64 exec, -1", DPP),
    (TO_VECTOR, "v_add_u32 v9, v4, v4"),
    (TO_VECTOR, f"global_store_dword v1, v4, {pointer(0)}"),
    (TO_VECTOR, DPP.replace("v4", "v5")),
    ("v_rcp_f32 v4, v5", "v_sqrt_f32 v9, v4"),
    (PART.replace("WORD_1", "DWORD"), "v_mov_b32 v9, v4"),
    (f"global_store_dwordx2 v1, v[4:5], {pointer(0)}", "v_mov_b32 v5, 0"),
    ("buffer_store_dwordx4 v[4:7], v1, s[8:11], s20 offen", "v_mov_b32 v5, 0"),
    (XDL_4, "v_mfma_f32_16x16x32_f16 v[64:67], v[20:23], v[28:31], v[64:67]"),
    (SGEMM_16, "v_mfma_f32_32x32x2_f32 v[64:79], v17, v25, v[64:79]"),
    (SGEMM_8, XDL_SUMMAND),
    (SGEMM_8, "v_mov_b32 v49, 0"),
    (XDL_16, "v_mov_b32 v17, 0"),
]


def hazards(body: str) -> list[Finding]:
    program = kernel(SETUP + body, 1)
    result = program.launch(1, 1, 64, [torch.zeros(1024, dtype=torch.int32)], CONDITIONS)
    assert {finding.problem for finding in result.findings} <= {Problem.HAZARD}
    return [*result.findings]


def apart(n: int) -> str:
    """Return code of n wait states."""
    return "\n".join(["s_nop 0"] * (n % 8) + ["s_nop 7"] * (n // 8)) + "\n"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} | {row[1]}")
def test_one_wait_state_too_few_is_reported(row):
    first, second, needed = row
    (finding,) = hazards(f"{first}\n{apart(needed - 1)}{second}")
    assert finding.text == f"{first} -> {second}: {needed - 1} of {needed}"
    assert not hazards(f"{first}\n{apart(needed)}{second}")


@pytest.mark.parametrize("pair", CLEAN, ids=" | ".join)
def test_what_needs_no_wait_states_is_not_reported(pair):
    assert not hazards("\n".join(pair))


def uses(text: str) -> set[Use]:
    ins = decode(text, 0, {})
    return {Use(used.use) for used in ins.uses[: ins.n_uses]}


def test_every_row_of_the_table_has_a_test():
    tested = [(uses(first), uses(second), needed) for first, second, needed in ROWS]
    for hazard in HAZARDS:
        first, second = {*hazard.first}, {*hazard.second}
        assert any(first & x and second & y and needed == hazard.wait_states for x, y, needed in tested), hazard


def test_a_hazard_across_a_jump():
    """The way from the end of a loop to its start is looked at too."""
    loop = f"s_mov_b32 s21, 3\nloop:\n{DPP}\ns_sub_u32 s21, s21, 1\ns_cmp_lg_u32 s21, 0\n"
    loop += f"{TO_VECTOR}\n{{}}\ns_cbranch_scc1 loop"
    (finding,) = hazards(loop.format(""))
    assert finding.text == f"{TO_VECTOR} -> {DPP}: 1 of 2"
    assert not hazards(loop.format("s_nop 0"))


def test_each_way_to_an_instruction_is_looked_at():
    """The first jump to it comes from afar, the second from right behind a write."""
    ways = f"""
        s_mov_b32 s21, 0
        again:
        s_cmp_eq_u32 s21, 0
        s_cbranch_scc0 second
        s_nop 15
        s_nop 15
        s_branch target
        second:
        s_nop 15
        s_nop 15
        {TO_VECTOR}
        s_branch target
        s_nop 0
        target:
        {DPP}
        s_nop 15
        s_nop 15
        s_add_u32 s21, s21, 1
        s_cmp_lt_u32 s21, 2
        s_cbranch_scc1 again"""
    (finding,) = hazards(ways)
    assert finding.text == f"{TO_VECTOR} -> {DPP}: 1 of 2"


def arguments_of(name: str) -> list:
    tensors = [torch.full((1 << 16,), 3, dtype=torch.int32) for _ in range(5)]
    more = {"add": (3, 1000), "softmax": (2, 300), "sum_of_all": (4, 1), "sum_of_all, undrained": (4, 1)}
    n, *last = more.get(name, (5,))
    return [*tensors[:n], *last]


def is_extra(text: list[str], n: int) -> bool:
    """Return whether LLVM wants an s_nop that no table does: in front of a carry, or between loads of a clause."""
    return "_addc_" in text[n + 1] or all("_load_" in text[n + step] for step in (-1, 1))


def test_every_s_nop_of_compiled_code_is_needed(kernels):
    n_removed = 0
    for name, case in kernels.items():
        whole = Program(case["asm"])
        counts = whole.launch(1, 4, case["shared"], arguments_of(name), CONDITIONS).counts
        for n, text in enumerate(whole.texts):
            if text.startswith("s_nop") and counts[n] and not is_extra(whole.texts, n):
                whole.code[n].wait_states = 0
                result = whole.launch(1, 4, case["shared"], arguments_of(name), CONDITIONS)
                whole.code[n].wait_states = int(text.split()[1]) + 1
                assert {finding.problem for finding in result.findings} == {Problem.HAZARD}, (
                    name,
                    n,
                    whole.texts[n - 3 : n + 2],
                )
                n_removed += 1
    assert n_removed > 40
