"""What an instruction does to registers, as far as a hazard may depend on it: see hazards.py."""

from collections.abc import Iterator

from tools.gfx950.hazards import Use
from tools.gfx950.layout import FIRST_ACCUMULATOR, FIRST_SCALAR, Form, Format, Kind, Operand, Register, Select, Space

TRANSCENDENTAL = {"v_exp_f32", "v_log_f32", "v_rcp_f32", "v_rcp_iflag_f32", "v_rsq_f32", "v_sqrt_f32"}
KEEPS_A_HALF = {"v_cvt_pk_fp8_f32", "v_cvt_scalef32_pk_fp8_f32"}
SWAPS = {"v_swap_b32", "v_permlane16_swap_b32", "v_permlane32_swap_b32"}
READS_DESTINATION = {"v_fmac_f32", "v_writelane_b32", *KEEPS_A_HALF, *SWAPS}
READS_LANE = ("v_readlane_b32", "v_readfirstlane_b32")
FIRST = {Kind.VECTOR: 0, Kind.ACCUMULATOR: FIRST_ACCUMULATOR, Kind.SCALAR: FIRST_SCALAR}
VECTORS = (Kind.VECTOR, Kind.ACCUMULATOR)
Found = Iterator[tuple[Use, int, int]]


def uses_of(ins, name: str) -> Found:
    """Yield what a decoded instruction does, to how many registers, and from which on of all."""
    if ins.form == Form.MATRIX:
        yield from _product(ins, name)
    elif ins.form == Form.MEMORY and ins.space != Space.SCALAR_CACHE:
        yield from _memory(ins)
    elif name.startswith("v_"):
        yield from _vector(ins, name)


def _on(use: Use, operand: Operand, kinds=VECTORS) -> Found:
    """Yield a use of an operand, if it lies in registers of these kinds."""
    if operand.kind in kinds:
        yield use, operand.words, FIRST[operand.kind] + operand.value


def _exec(use: Use) -> tuple[Use, int, int]:
    return use, 2, FIRST_SCALAR + Register.EXEC


def _vector(ins, name: str) -> Found:
    read, write = _kind_of_read(ins, name), _kind_of_write(ins, name)
    for n, source in enumerate(ins.src[:3]):
        yield from _on(read, source)
        selects = n == 1 and name in ("v_readlane_b32", "v_writelane_b32")
        if not (n == 2 and ins.form == Form.LANE_CARRY):
            yield from _on(Use.SELECTS_LANE if selects else Use.VALU_READS_SCALAR, source, (Kind.SCALAR,))
    if name in READS_DESTINATION or write == Use.PART_WRITES or _may_keep_lanes(ins):
        yield from _on(read, ins.dst)
    yield from _on(write, ins.dst)
    if name in SWAPS:
        yield from _on(write, ins.src[0])
    for destination in (ins.dst, ins.dst2):
        yield from _on(Use.VALU_WRITES_SCALAR, destination, (Kind.SCALAR,))
    if ins.to_exec:
        yield _exec(Use.VALU_WRITES_EXEC)
    if name == "v_div_fmas_f32":
        yield Use.DIV_FMAS_READS_VCC, 2, FIRST_SCALAR + Register.VCC
    if ins.dpp:
        yield _exec(Use.DPP_NEEDS_EXEC)
    if name in (*READS_LANE, "v_writelane_b32"):
        yield _exec(Use.LANE_NEEDS_EXEC)
    if "permlane" in name:
        yield _exec(Use.PERMLANE_NEEDS_EXEC)


def _may_keep_lanes(ins) -> bool:
    """Return whether DPP leaves lanes of the destination as they are, which LLVM takes for a read."""
    return bool(ins.dpp) and not (ins.bound_control and ins.row_mask == ins.bank_mask == 0xF)


def _kind_of_read(ins, name: str) -> Use:
    if ins.dpp:
        return Use.DPP_READS
    if name in READS_LANE:
        return Use.LANE_READS
    if "permlane" in name:
        return Use.PERMLANE_READS
    return Use.TRANS_READS if name in TRANSCENDENTAL else Use.VALU_READS


def _kind_of_write(ins, name: str) -> Use:
    if (ins.is_sdwa and ins.dst_select != Select.DWORD) or (name in KEEPS_A_HALF and ins.op_sel & 8):
        return Use.PART_WRITES
    return Use.TRANS_WRITES if name in TRANSCENDENTAL else Use.VALU_WRITES


def _memory(ins) -> Found:
    for operand in (ins.src[0], ins.src[1], ins.dst2):
        yield from _on(Use.MEMORY_READS, operand)
    yield from _on(Use.MEMORY_WRITES, ins.dst)
    if ins.space == Space.LDS:
        return
    for operand in (ins.src[2], ins.src[3]):
        yield from _on(Use.MEMORY_READS_SCALAR, operand, (Kind.SCALAR,))
    if ins.src[1].words > 2 and ins.src[3].kind != Kind.SCALAR:
        yield from _on(Use.STORES_MANY, ins.src[1])


def _product(ins, name: str) -> Found:
    """Yield the uses of a matrix product. Passes: LLVM's SISchedule.td, which are a fourth of the document's cycles."""
    is_xdl = ins.format_a != Format.F32
    is_slow = not is_xdl or (name.endswith("f8f6f4") and {ins.format_a, ins.format_b} & {Format.E4M3, Format.E5M2})
    passes = ins.rows // 4 * (2 if is_slow else 1)
    family = f"{'XDL' if is_xdl else 'SGEMM'}_{passes}"
    for factor in (ins.src[0], ins.src[1], ins.src[3], ins.dst2):
        yield from _on(Use.MATRIX_READS_FACTOR, factor)
    yield from _on(Use[f"{family}_READS_SUMMAND"], ins.src[2])
    yield from _on(Use[f"{family}_WRITES"], ins.dst)
    yield _exec(Use.MATRIX_NEEDS_EXEC)
