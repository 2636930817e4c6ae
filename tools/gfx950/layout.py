"""What Python and core.c share: numbers of things, and the layout of an instruction. `c_files` says it in C."""

import ctypes
from enum import IntEnum

from tools.gfx950 import instructions
from tools.gfx950.hazards import Use, wait_states

N_SOURCES = 4
N_USES = 12
FIRST_ACCUMULATOR, FIRST_SCALAR = 512, 1024  # where all registers are numbered
MAX_REPORTS = 256


class Kind(IntEnum):
    """Where an operand's value is."""

    NONE = 0
    VECTOR = 1
    ACCUMULATOR = 2
    SCALAR = 3
    CONSTANT = 4
    CONDITION = 5  # SCC


class Modifier(IntEnum):
    """Bits of an operand."""

    NEGATIVE = 1
    ABSOLUTE = 2
    SIGN_EXTENDED = 4


class Form(IntEnum):
    """Which function of core.c executes an instruction."""

    UNKNOWN = 0
    LANE = 1
    LANE_64 = 2
    LANE_CARRY = 3
    LANE_PAIR_F32 = 4
    LANE_PAIR_F16 = 5
    LANE_COMPARE = 6
    SCALAR = 7
    SCALAR_64 = 8
    SCALAR_OF_64 = 9
    SCALAR_CONDITION = 10
    SAVE_EXEC = 11
    BRANCH = 12
    WITHOUT_EFFECT = 13
    MOVE = 14
    MEMORY = 15
    MATRIX = 16


class Space(IntEnum):
    """Which memory an instruction accesses, and by which address."""

    BUFFER = 0
    GLOBAL = 1
    LDS = 2
    SCALAR_CACHE = 3


class Access(IntEnum):
    """What an instruction does there."""

    LOAD = 0
    STORE = 1
    ATOMIC = 2
    PERMUTE = 3  # between lanes, by the LDS hardware
    WRITE_BACK = 4


class Select(IntEnum):
    """Part of a word that SDWA reads or writes."""

    DWORD = 0
    BYTE_0 = 1
    BYTE_1 = 2
    BYTE_2 = 3
    BYTE_3 = 4
    WORD_0 = 5
    WORD_1 = 6


class Dpp(IntEnum):
    """How DPP moves the first source between lanes."""

    NONE = 0
    QUAD_PERM = 1
    ROW_SHL = 2
    ROW_SHR = 3
    ROW_ROR = 4
    ROW_MIRROR = 5
    ROW_HALF_MIRROR = 6
    ROW_BCAST = 7
    WAVE_SHL = 8
    WAVE_SHR = 9
    WAVE_ROL = 10
    WAVE_ROR = 11
    ROW_NEWBCAST = 12


class Number(IntEnum):
    """The type that a comparison or an atomic gives its operands."""

    F32 = 0
    I32 = 1
    U32 = 2
    I64 = 3
    U64 = 4
    I16 = 5
    U16 = 6
    F16 = 7


class Atomic(IntEnum):
    ADD = 0
    SUB = 1
    SMAX = 2
    SMIN = 3
    UMAX = 4
    UMIN = 5
    AND = 6
    OR = 7
    XOR = 8
    SWAP = 9
    CMPSWAP = 10
    ADD_F32 = 11


class Format(IntEnum):
    """Elements of a matrix product; the first five as cbsz and blgp number them."""

    E4M3 = 0
    E5M2 = 1
    E2M3 = 2
    E3M2 = 3
    E2M1 = 4
    F16 = 5
    BF16 = 6
    F32 = 7


class Mode(IntEnum):
    """Bits of how strictly memory is modelled."""

    LATE = 1
    CACHES = 2
    CHECK_LDS = 4
    STALL = 8
    CHECK_RACES = 16
    CHECK_HAZARDS = 32


class Problem(IntEnum):
    """What a report says."""

    PENDING = 1
    OUT_OF_BOUNDS = 2
    READ_ONLY = 3
    LDS_BOUNDS = 4
    LDS_RACE = 5
    STALE_SCALAR = 6
    UNKNOWN = 7
    FELL_OFF = 8
    MISALIGNED = 9
    RACE = 10
    HAZARD = 11


PROBLEM_TEXT = {
    Problem.PENDING: "register used before its load was waited for",
    Problem.OUT_OF_BOUNDS: "access outside all tensors",
    Problem.READ_ONLY: "write to a read-only tensor",
    Problem.LDS_BOUNDS: "access outside LDS",
    Problem.LDS_RACE: "race in LDS",
    Problem.STALE_SCALAR: "scalar load of what this launch has written",
    Problem.UNKNOWN: "unknown instruction",
    Problem.FELL_OFF: "ran off the end",
    Problem.MISALIGNED: "misaligned access",
    Problem.RACE: "race between workgroups",
    Problem.HAZARD: "too few wait states between two instructions",
}


class Traffic(IntEnum):
    """What is counted of an instruction, over all waves of a launch."""

    BYTES = 0  # that its lanes access
    SECTORS = 1  # of 64 bytes, as far as neighbouring lanes do not share them
    WEIGHT_BYTES = 2  # of the first, those in read-only tensors
    COVERED = 3  # accesses that an s_waitcnt ended


class Outcome(IntEnum):
    """How a launch ended."""

    ENDED = 0
    TOO_LONG = 1
    STUCK = 2


class Register(IntEnum):
    """Numbers of special scalar registers."""

    FLAT_SCRATCH = 102
    XNACK_MASK = 104
    VCC = 106
    M0 = 124
    EXEC = 126


ENUMS = (
    Kind,
    Modifier,
    Form,
    Space,
    Access,
    Select,
    Dpp,
    Number,
    Atomic,
    Format,
    Mode,
    Problem,
    Traffic,
    Outcome,
    Register,
    Use,
)
FORM_OF = {name: form for form in Form for name in getattr(instructions, form.name, ())}
OPCODES = {name: number for number, name in enumerate(FORM_OF, start=1)}


class Operand(ctypes.Structure):
    """A source or a destination: `words` registers from `value` on, or a constant of 64 bits."""

    _fields_ = [
        ("kind", ctypes.c_uint8),
        ("words", ctypes.c_uint8),
        ("modifiers", ctypes.c_uint8),
        ("select", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
        ("high", ctypes.c_uint32),
    ]


class Used(ctypes.Structure):
    """What an instruction does to registers: `words` from `first` on, as all registers are numbered."""

    _fields_ = [("use", ctypes.c_uint8), ("words", ctypes.c_uint8), ("first", ctypes.c_uint16)]


# What an instruction has besides operands; each form reads its own.
FIELDS = (
    *("opcode", "form", "number", "wait_states", "n_uses"),  # number: in the program
    *("target", "vmcnt", "lgkmcnt"),  # of jumps and waits; a count of -1 is not waited for
    *("space", "access", "bytes", "is_signed", "half", "transposed", "atomic", "returns"),  # half: 1 low, 2 high
    *("offset", "second_offset", "scope", "has_offset_register", "permutation"),  # second_offset: -1 without
    *("rows", "depth", "format_a", "format_b", "scale_byte_a", "scale_byte_b"),  # scale bytes: -1 without
    *("op_sel", "op_sel_hi", "neg_lo", "neg_hi", "truth_table"),
    *("clamp", "saturate_integer", "sign_bit", "condition", "number_type", "to_exec"),
    *("is_sdwa", "dst_select", "dst_unused", "dpp", "dpp_argument", "row_mask", "bank_mask", "bound_control"),
)


class Instruction(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in FIELDS),
        ("dst", Operand),
        ("dst2", Operand),
        ("src", Operand * N_SOURCES),
        ("uses", Used * N_USES),
    ]


class Region(ctypes.Structure):
    """Memory that a launch may access."""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("is_writable", ctypes.c_int64),
        ("written", ctypes.c_void_p),  # a byte for each byte: whether this launch has written it
    ]


class Report(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("problem", "number", "workgroup", "wave", "detail", "count")),
        ("address", ctypes.c_uint64),
    ]


class Launch(ctypes.Structure):
    """A launch's program, sizes and memory, and what it leaves."""

    _fields_ = [
        ("code", ctypes.c_void_p),
        ("regions", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),  # uint64 [workgroups, instructions]: how often each was executed
        ("traffic", ctypes.c_void_p),  # uint64 [instructions, Traffic]
        ("preload", ctypes.c_void_p),
        ("kernarg", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("max_instructions", ctypes.c_uint64),
        ("executed", ctypes.c_uint64),
        *(
            (name, ctypes.c_int32)
            for name in (
                "n_instructions",
                "n_regions",
                "n_workgroups",
                "waves_per_workgroup",
                "lds_bytes",
                "mode",
                "quantum",
                "n_preload",
                "n_user_registers",
                "poison",
                "n_reports",
                "padding",
            )
        ),
        ("reports", Report * MAX_REPORTS),
    ]


def c_files() -> dict[str, str]:
    """Return name -> text of what core.c includes: these declarations, and for each table the cases of its `switch`.

    A case calls the macro that core.c defines for the form, with the expressions of the line.
    """
    files = {"layout.h": "\n".join([*_enums(), *_hazards(), *_structures(), ""])}
    for form in Form:
        meanings = getattr(instructions, form.name, ())
        if isinstance(meanings, dict):
            cases = (f"case OP_{name}: DO_{form.name}({_arguments(meanings[name])})\n" for name in meanings)
            files[f"cases_{form.name.lower()}.h"] = "".join(cases)
    return files


def _arguments(meaning: str) -> str:
    return ", ".join(f"({part.strip()})" for part in meaning.split(";"))


def _enums() -> list[str]:
    lines = [
        f"enum {{ {', '.join(f'{kind.__name__.upper()}_{item.name} = {item.value}' for item in kind)} }};"
        for kind in ENUMS
    ]
    return [*lines, "enum { " + ", ".join(f"OP_{name} = {number}" for name, number in OPCODES.items()) + " };"]


def _hazards() -> list[str]:
    needed = wait_states()
    rows = ", ".join("{" + ", ".join(map(str, row)) + "}" for row in needed)
    return [
        f"static const uint8_t WAIT_STATES[{len(needed)}][{len(needed)}] = {{{rows}}};",
        f"enum {{ LONGEST_HAZARD = {max(map(max, needed))} }};",
    ]


def _structures() -> list[str]:
    names = {
        ctypes.c_uint8: "uint8_t",
        ctypes.c_uint16: "uint16_t",
        ctypes.c_int32: "int32_t",
        ctypes.c_uint32: "uint32_t",
        ctypes.c_int64: "int64_t",
        ctypes.c_uint64: "uint64_t",
        ctypes.c_void_p: "void *",
        Operand * N_SOURCES: f"Operand[{N_SOURCES}]",
        Report * MAX_REPORTS: f"Report[{MAX_REPORTS}]",
        Operand: "Operand",
        Used * N_USES: f"Used[{N_USES}]",
    }
    lines = []
    for structure in (Operand, Used, Instruction, Region, Report, Launch):
        members = []
        for name, kind in structure._fields_:
            base, _, count = names[kind].partition("[")
            members.append(f"{base} {name}{'[' + count if count else ''};")
        lines.append(f"typedef struct {{ {' '.join(members)} }} {structure.__name__};")
    return lines
