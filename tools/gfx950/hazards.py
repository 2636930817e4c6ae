"""Wait states that must lie between two instructions, because the hardware does not watch what they do to a register.

Each instruction is one wait state, `s_nop N` N + 1 of them. The rows are those of AMD's "CDNA4 Instruction Set
Architecture": table 11 of 4.5, "Manually inserted wait states", and table 38 of 7.6, "Required independent
instructions". LLVM's GCNHazardRecognizer adds what a row's note says. uses.py tells what an instruction does.
"""

from dataclasses import dataclass
from enum import IntEnum


class Use(IntEnum):
    """What an instruction does to registers, as far as a hazard may depend on it."""

    VALU_WRITES = 1  # a vector register, as all that do not say otherwise
    TRANS_WRITES = 2  # a transcendental result
    PART_WRITES = 3  # SDWA or op_sel moves the result within the register
    VALU_READS = 4
    TRANS_READS = 5
    DPP_READS = 6
    LANE_READS = 7  # v_readlane, v_readfirstlane
    PERMLANE_READS = 8
    VALU_WRITES_SCALAR = 9  # VCC too
    VALU_WRITES_EXEC = 10
    VALU_READS_SCALAR = 11  # a carry is not meant
    SELECTS_LANE = 12  # by a scalar register
    DIV_FMAS_READS_VCC = 13
    DPP_NEEDS_EXEC = 14
    LANE_NEEDS_EXEC = 15
    PERMLANE_NEEDS_EXEC = 16
    MATRIX_NEEDS_EXEC = 17
    MEMORY_READS = 18
    MEMORY_WRITES = 19
    MEMORY_READS_SCALAR = 20  # vector memory
    STORES_MANY = 21  # more than 64 bits, without a scalar register as offset
    MATRIX_READS_FACTOR = 22  # or scales
    XDL_4_WRITES = 23  # a matrix product of 4 passes; XDL: of elements smaller than float32
    XDL_8_WRITES = 24
    XDL_16_WRITES = 25
    SGEMM_8_WRITES = 26  # of float32
    SGEMM_16_WRITES = 27
    XDL_4_READS_SUMMAND = 28
    XDL_8_READS_SUMMAND = 29
    XDL_16_READS_SUMMAND = 30
    SGEMM_8_READS_SUMMAND = 31
    SGEMM_16_READS_SUMMAND = 32


WRITES = (Use.VALU_WRITES, Use.TRANS_WRITES, Use.PART_WRITES)
READS = (Use.VALU_READS, Use.TRANS_READS, Use.DPP_READS, Use.LANE_READS, Use.PERMLANE_READS)
MEMORY = (Use.MEMORY_READS, Use.MEMORY_WRITES)
XDL_PASSES, SGEMM_PASSES = (4, 8, 16), (8, 16)
XDL_WRITES = tuple(Use[f"XDL_{n}_WRITES"] for n in XDL_PASSES)
SGEMM_WRITES = tuple(Use[f"SGEMM_{n}_WRITES"] for n in SGEMM_PASSES)
XDL_SUMMANDS = tuple(Use[f"XDL_{n}_READS_SUMMAND"] for n in XDL_PASSES)
SGEMM_SUMMANDS = tuple(Use[f"SGEMM_{n}_READS_SUMMAND"] for n in SGEMM_PASSES)
SUMMANDS = (*XDL_SUMMANDS, *SGEMM_SUMMANDS)


@dataclass(frozen=True)
class Hazard:
    """Whoever does one of `second` to a register must come so many wait states behind whoever does one of `first`."""

    first: tuple[Use, ...]
    second: tuple[Use, ...]
    wait_states: int


def of_product(passes: int, writes: Use, reads_summand: Use, is_xdl: bool) -> list[Hazard]:
    """Return the hazards of a matrix product of so many passes.

    LLVM: what memory is loaded into counts as what VALU writes. A summand that is exactly an earlier product's result
    needs no wait (core.c), whatever the passes of both; the document wants the same.
    """
    late = passes + (4 if is_xdl else 2)
    overlapping = [Hazard((writes,), SGEMM_SUMMANDS, passes + 2 * is_xdl)]
    if is_xdl:
        overlapping.append(Hazard((writes,), XDL_SUMMANDS, passes + 2))
        overlapping.append(Hazard((reads_summand,), (*WRITES, Use.MEMORY_WRITES), passes - 1))
    return [Hazard((writes,), (*READS, *WRITES, *MEMORY, Use.MATRIX_READS_FACTOR), late), *overlapping]


HAZARDS = [
    Hazard((Use.VALU_WRITES_SCALAR,), (Use.MEMORY_READS_SCALAR,), 5),
    Hazard((Use.VALU_WRITES_SCALAR,), (Use.SELECTS_LANE, Use.DIV_FMAS_READS_VCC), 4),
    Hazard((Use.VALU_WRITES_SCALAR,), (Use.VALU_READS_SCALAR,), 2),  # LLVM: the mask of v_cndmask too
    Hazard((Use.VALU_WRITES_EXEC,), (Use.DPP_NEEDS_EXEC,), 5),
    Hazard((Use.VALU_WRITES_EXEC,), (Use.LANE_NEEDS_EXEC, Use.PERMLANE_NEEDS_EXEC, Use.MATRIX_NEEDS_EXEC), 4),
    Hazard((Use.VALU_WRITES_EXEC,), (Use.VALU_READS_SCALAR,), 2),
    Hazard(WRITES, (Use.DPP_READS, Use.PERMLANE_READS, Use.MATRIX_READS_FACTOR, *SUMMANDS), 2),
    Hazard(WRITES, (Use.LANE_READS,), 1),
    Hazard((Use.TRANS_WRITES,), (Use.VALU_READS,), 1),
    Hazard((Use.PART_WRITES,), (*READS, *WRITES), 1),  # LLVM: whoever overwrites it too
    Hazard((Use.STORES_MANY,), (*WRITES, *XDL_WRITES, *SGEMM_WRITES), 2),
    *(
        hazard
        for n, writes, summand in zip(XDL_PASSES, XDL_WRITES, XDL_SUMMANDS, strict=True)
        for hazard in of_product(n, writes, summand, True)
    ),
    *(
        hazard
        for n, writes, summand in zip(SGEMM_PASSES, SGEMM_WRITES, SGEMM_SUMMANDS, strict=True)
        for hazard in of_product(n, writes, summand, False)
    ),
]


def wait_states() -> list[list[int]]:
    """Return the wait states that each use needs behind each other one: [first][second]."""
    needed = [[0] * (len(Use) + 1) for _ in range(len(Use) + 1)]
    for hazard in HAZARDS:
        for first in hazard.first:
            for second in hazard.second:
                needed[first][second] = max(needed[first][second], hazard.wait_states)
    return needed
