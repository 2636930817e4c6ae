"""Turn a line of gfx950 assembly, as Triton's compiler writes it, into an Instruction for core.c."""

import re
from collections.abc import Callable

import numpy as np

from tools.gfx950.layout import (
    FORM_OF,
    OPCODES,
    Access,
    Atomic,
    Dpp,
    Form,
    Format,
    Instruction,
    Kind,
    Modifier,
    Number,
    Operand,
    Register,
    Select,
    Space,
    Used,
)
from tools.gfx950.uses import uses_of

REGISTER_FILES = {"v": Kind.VECTOR, "s": Kind.SCALAR, "a": Kind.ACCUMULATOR}
PAIRS = {
    "vcc": Register.VCC,
    "exec": Register.EXEC,
    "flat_scratch": Register.FLAT_SCRATCH,
    "xnack_mask": Register.XNACK_MASK,
}
SPECIAL = {name: (first, 2) for name, first in PAIRS.items()}
SPECIAL |= {f"{name}_{half}": (first + n, 1) for name, first in PAIRS.items() for n, half in enumerate(("lo", "hi"))}
SPECIAL["m0"] = Register.M0, 1
# 1 less, 2 equal, 4 greater, 8 unordered, added up.
CONDITIONS = {"f": 0, "lt": 1, "eq": 2, "le": 3, "gt": 4, "lg": 5, "ne": 5, "ge": 6, "o": 7, "t": 15, "tru": 15}
CONDITIONS |= {"u": 8, "nge": 9, "nlg": 10, "ngt": 11, "nle": 12, "neq": 13, "nlt": 14}
# Suffix of a vector load or store -> bytes, whether the sign is extended, and the half of a register (1 low, 2 high).
SIZES = {
    "ubyte": (1, 0, 0),
    "sbyte": (1, 1, 0),
    "byte": (1, 0, 0),
    "ushort": (2, 0, 0),
    "sshort": (2, 1, 0),
    "short": (2, 0, 0),
    "dword": (4, 0, 0),
    "dwordx2": (8, 0, 0),
    "dwordx3": (12, 0, 0),
    "dwordx4": (16, 0, 0),
    "short_d16": (2, 0, 1),
    "short_d16_hi": (2, 0, 2),
    "ubyte_d16": (1, 0, 1),
    "ubyte_d16_hi": (1, 0, 2),
    "byte_d16_hi": (1, 0, 2),
}
UNUSED = {"UNUSED_PAD": 0, "UNUSED_SEXT": 1, "UNUSED_PRESERVE": 2}
PERMUTATIONS = ("swizzle_b32", "bpermute_b32", "permute_b32")
FP16_OVERFLOW = "hwreg(HW_REG_MODE, 23, 1)"  # whether conversions to FP8 saturate
PLAIN_FORMATS = {
    "f16": Format.F16,
    "bf16": Format.BF16,
    "f32": Format.F32,
    "fp8_fp8": Format.E4M3,
    "bf8_bf8": Format.E5M2,
}
# Bits of op_sel that choose a part of the source.
PARTS_OF_SOURCE = {"v_cvt_scalef32_pk_bf16_fp8": 1, "v_cvt_scalef32_pk_f16_fp8": 1, "v_cvt_scalef32_pk_f32_fp4": 2}
HALVES_OF_RESULT = ("v_cvt_pk_fp8_f32", "v_cvt_scalef32_pk_fp8_f32")
HALF_SOURCES = ("v_cvt_f32_f16", "v_pack_b32_f16")  # float16 in a word's lower half
KNOWN_MODIFIERS = {
    *("dst_sel", "dst_unused", "src0_sel", "src1_sel", "clamp", "mul", "div", "bitop3", "op_sel", "op_sel_hi"),
    *("neg_lo", "neg_hi", "row_mask", "bank_mask", "bound_ctrl", *(dpp.name.lower() for dpp in Dpp)),
}


class UnknownInstruction(Exception):
    """A line of assembly that this emulator has no meaning for."""


def decode(line: str, number: int, labels: dict[str, int]) -> Instruction:
    """Return instruction `number` of a program. labels: name -> number. Raise UnknownInstruction."""
    unset = dict.fromkeys(("second_offset", "scale_byte_a", "scale_byte_b", "vmcnt", "lgkmcnt"), -1)
    ins = Instruction(number=number, wait_states=1, **unset)
    name, _, rest = line.partition(" ")
    base = re.sub(r"_(e32|e64|dpp|sdwa)$", "", name)
    arguments, modifiers = split_arguments(rest)
    try:
        ins.form, ins.opcode = FORM_OF.get(base, Form.UNKNOWN), OPCODES.get(base, 0)
        decoder = _decoder_of(base, ins.form)
        decoder(ins, base, arguments, modifiers, labels)
        if "_sdwa" in name or "_dpp" in name:
            _lane_selection(ins, modifiers, is_sdwa="_sdwa" in name)
        uses = [*uses_of(ins, base)]
        ins.n_uses, ins.uses[: len(uses)] = len(uses), [Used(*use) for use in uses]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UnknownInstruction(f"{line} ({error!r})") from error
    return ins


def split_arguments(text: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments, separated by commas outside brackets, and the modifiers behind the last one."""
    parts = re.split(r",\s*(?![^\[(]*[\])])", text.strip()) if text.strip() else []
    if not parts:
        return [], {}
    last, *words = re.split(r"\s+(?![^\[(]*[\])])", parts[-1])
    modifiers = dict(word.partition(":")[::2] for word in words)
    return [*parts[:-1], last], modifiers


def operand(text: str, words: int = 1, dtype: str = "f32") -> Operand:
    """Return an operand. words: of a constant; dtype: "f16", "f32" or "f64", what a constant with a point is."""
    modifiers = 0
    if match := re.fullmatch(r"sext\((.*)\)", text):
        text, modifiers = match[1], Modifier.SIGN_EXTENDED
    if match := re.fullmatch(r"-(\|?[vsa]\d.*|\|.*|-.*|[vsa]\[.*|vcc.*)", text):
        text, modifiers = match[1], modifiers | Modifier.NEGATIVE
    if match := re.fullmatch(r"\|(.*)\|", text):
        text, modifiers = match[1], modifiers | Modifier.ABSOLUTE
    if match := re.fullmatch(r"([vsa])(?:(\d+)|\[(\d+):(\d+)\])", text):
        first, last = int(match[2] or match[3]), int(match[2] or match[4])
        return Operand(REGISTER_FILES[match[1]], last - first + 1, modifiers, 0, first)
    if text in SPECIAL:
        first, n = SPECIAL[text]
        return Operand(Kind.SCALAR, n, modifiers, 0, first)
    if text in ("scc", "src_scc"):
        return Operand(Kind.CONDITION, 1, modifiers)
    if text in ("off", "null"):
        return Operand()
    return _constant(text, words, dtype, modifiers)


def _constant(text: str, words: int, dtype: str, modifiers: int) -> Operand:
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
        bits = int(text, 0) & (1 << 64) - 1
        return Operand(Kind.CONSTANT, words, modifiers, 0, bits & 0xFFFFFFFF, bits >> 32)
    if not re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", text):
        raise ValueError(f"operand {text!r}")
    types = {"f16": (np.float16, np.uint16), "f32": (np.float32, np.uint32), "f64": (np.float64, np.uint64)}
    floating, integer = types[dtype]
    bits = int(floating(text).view(integer))
    return Operand(Kind.CONSTANT, 2 if dtype == "f64" else 1, modifiers, 0, bits & 0xFFFFFFFF, bits >> 32)


def _decoder_of(name: str, form: int) -> Callable:
    if name.startswith(("buffer_load", "buffer_store", "buffer_atomic", "global_")):
        return _vector_memory
    if name.startswith("ds_"):
        return _permutation if name.removeprefix("ds_") in PERMUTATIONS else _lds
    if name.startswith("s_load_"):
        return _scalar_load
    if name.startswith("v_mfma"):
        return _matrix
    if name.startswith("v_cmp"):
        return _compare
    decoders = {
        Form.BRANCH: _branch,
        Form.WITHOUT_EFFECT: _nothing,
        Form.MOVE: _move,
        Form.SCALAR: _scalar,
        Form.SCALAR_64: _scalar,
        Form.SCALAR_OF_64: _scalar,
        Form.SCALAR_CONDITION: _scalar_condition,
        Form.SAVE_EXEC: _scalar,
    }
    if form == Form.UNKNOWN:
        raise KeyError(name)
    return decoders.get(form, _lanes)


def _nothing(ins, name, arguments, modifiers, labels) -> None:
    if name == "s_nop":
        ins.wait_states = int(arguments[0], 0) + 1


def _branch(ins, name, arguments, modifiers, labels) -> None:
    ins.target = labels[arguments[0]]


def _move(ins, name, arguments, modifiers, labels) -> None:
    """Decode what has rules of its own; the rest is a destination and sources."""
    if name == "s_waitcnt":
        waits = dict(re.findall(r"(vmcnt|lgkmcnt|expcnt)\((\d+)\)", " ".join([*arguments, *modifiers])))
        if not waits:
            raise ValueError("no count")
        ins.vmcnt, ins.lgkmcnt = int(waits.get("vmcnt", -1)), int(waits.get("lgkmcnt", -1))
    elif name in ("buffer_wbl2", "buffer_inv"):
        ins.space, ins.scope = Space.GLOBAL, "sc1" in arguments or "sc1" in modifiers
        ins.access = Access.WRITE_BACK
    elif name == "s_setreg_imm32_b32":
        if arguments[0] != FP16_OVERFLOW:
            raise ValueError(arguments[0])
        ins.offset = int(arguments[1], 0)
    elif arguments:
        _lanes(ins, name, arguments, modifiers, labels)


def _scalar(ins, name, arguments, modifiers, labels) -> None:
    words = 2 if re.search(r"[bui]64$", name) else 1
    ins.dst, sources = operand(arguments[0]), arguments[1:]
    for n, source in enumerate(sources):
        ins.src[n] = operand(source, words)
    if name.endswith("k_i32"):  # 16 bits, signed
        ins.src[0].value = _signed_16(ins.src[0].value)


def _scalar_condition(ins, name, arguments, modifiers, labels) -> None:
    for n, source in enumerate(arguments):
        ins.src[n] = operand(source, 2)
    if name.startswith("s_cmpk") and name.endswith("_i32"):
        ins.src[1].value = _signed_16(ins.src[1].value)


def _signed_16(value: int) -> int:
    return ((value & 0xFFFF) ^ 0x8000) - 0x8000 & 0xFFFFFFFF


def _scalar_load(ins, name, arguments, modifiers, labels) -> None:
    ins.form, ins.space, ins.access = Form.MEMORY, Space.SCALAR_CACHE, Access.LOAD
    ins.bytes = 4 * int(re.search(r"dword(?:x(\d+))?$", name)[1] or 1)
    ins.dst, ins.src[0] = operand(arguments[0]), operand(arguments[1])
    if arguments[2].startswith("s") or arguments[2] == "m0":
        ins.src[1], ins.offset = operand(arguments[2]), int(modifiers.get("offset", "0"), 0)
    else:
        ins.offset = int(arguments[2], 0)


def _vector_memory(ins, name, arguments, modifiers, labels) -> None:
    """src: the address, the data to store, and the base; a buffer has a scalar offset as the fourth."""
    if {"lds", "idxen"} & modifiers.keys():
        raise ValueError("addressing")
    space, _, what = name.partition("_")
    ins.form, ins.space = Form.MEMORY, Space.BUFFER if space == "buffer" else Space.GLOBAL
    ins.offset, ins.scope = int(modifiers.get("offset", "0"), 0), "sc1" in modifiers
    arguments = list(arguments)
    if what.startswith("atomic_"):
        ins.access, ins.bytes = Access.ATOMIC, 4
        ins.atomic = Atomic[what.removeprefix("atomic_").upper()]
        returns = "sc0" in modifiers  # what was there before
        if space == "buffer":
            data, address, base = arguments[:3]
            ins.dst = operand(data) if returns else Operand()
        else:
            ins.dst = operand(arguments.pop(0)) if returns else Operand()
            address, data, base = arguments
    else:
        kind, size = what.split("_", 1)
        ins.access = Access.LOAD if kind == "load" else Access.STORE
        ins.bytes, ins.is_signed, ins.half = SIZES[size]
        address, data = arguments[:2] if space == "global" and kind == "store" else arguments[1::-1]
        base = arguments[2]
    if ins.access == Access.LOAD:
        ins.dst = operand(data)
    else:
        ins.src[1] = operand(data)
    ins.src[2] = operand(base)
    if ins.space == Space.BUFFER:
        ins.src[3], ins.has_offset_register = operand(arguments[3]), "offen" in modifiers
    ins.src[0] = operand(address)


def _permutation(ins, name, arguments, modifiers, labels) -> None:
    ins.form, ins.space, ins.access, ins.bytes = Form.MEMORY, Space.LDS, Access.PERMUTE, 4
    ins.permutation = PERMUTATIONS.index(name.removeprefix("ds_"))
    ins.dst, offset = operand(arguments[0]), modifiers.get("offset", "0")
    if ins.permutation == 0:
        ins.src[1], ins.offset = operand(arguments[1]), swizzle_bits(offset)
    else:
        ins.src[0], ins.src[1], ins.offset = operand(arguments[1]), operand(arguments[2]), int(offset, 0)


def _lds(ins, name, arguments, modifiers, labels) -> None:
    ins.form, ins.space = Form.MEMORY, Space.LDS
    ins.offset = int(modifiers.get("offset", "0"), 0)
    what = name.removeprefix("ds_")
    if match := re.fullmatch(r"(read|write)2(st64)?_b(32|64)", what):
        ins.bytes = int(match[3]) // 8
        unit = ins.bytes * (64 if match[2] else 1)
        ins.offset, ins.second_offset = (int(modifiers.get(f"offset{i}", "0"), 0) * unit for i in (0, 1))
        is_load = match[1] == "read"
    elif match := re.fullmatch(r"(read|write)_([bui])(\d+)(_d16)?(_hi)?", what):
        ins.bytes, ins.is_signed = int(match[3]) // 8, match[2] == "i"
        ins.half = 2 if match[5] else 1 if match[4] else 0
        is_load = match[1] == "read"
    elif match := re.fullmatch(r"read_b64_tr_b(4|8|16)", what):
        ins.bytes, ins.transposed, is_load = 8, int(match[1]), True
    else:
        raise KeyError(name)
    if is_load:
        ins.access, ins.dst, ins.src[0] = Access.LOAD, operand(arguments[0]), operand(arguments[1])
    else:
        ins.access, ins.src[0], ins.src[1] = Access.STORE, operand(arguments[0]), operand(arguments[1])
        if ins.second_offset >= 0:
            ins.dst2 = operand(arguments[2])


def swizzle_bits(text: str) -> int:
    """Return the offset of ds_swizzle_b32 that a swizzle(...) stands for."""
    match = re.fullmatch(r"swizzle\((\w+),(.*)\)", text.replace(" ", ""))
    if not match:
        return int(text, 0)
    mode, arguments = match[1], match[2].split(",")
    if mode == "SWAP":
        return int(arguments[0]) << 10 | 0x1F
    if mode == "REVERSE":
        return (int(arguments[0]) - 1) << 10 | 0x1F
    if mode == "BROADCAST":
        size, lane = map(int, arguments)
        return lane << 5 | (0x1F & ~(size - 1))
    if mode == "QUAD_PERM":
        return 0x8000 | sum(int(lane) << 2 * k for k, lane in enumerate(arguments))
    raise ValueError(text)


def _matrix(ins, name, arguments, modifiers, labels) -> None:
    """src: A, B, C and A's scales; dst2: B's scales."""
    match = re.fullmatch(r"v_mfma_(scale_)?f32_(16|32)x\d+x(\d+)_?(\w+)", name)
    if not match or modifiers.keys() - {"op_sel", "op_sel_hi", "cbsz", "blgp"}:
        raise ValueError("matrix product")
    ins.form, ins.rows, ins.depth = Form.MATRIX, int(match[2]), int(match[3])
    ins.dst = operand(arguments[0])
    for n in range(3):
        ins.src[n] = operand(arguments[1 + n])
    if match[4] == "f8f6f4":
        ins.format_a, ins.format_b = (int(modifiers.get(key, "0")) for key in ("cbsz", "blgp"))
    elif {"cbsz", "blgp"} & modifiers.keys():
        raise ValueError("cbsz")
    else:
        ins.format_a = ins.format_b = PLAIN_FORMATS[match[4]]
    if match[1]:
        ins.src[3], ins.dst2 = operand(arguments[4]), operand(arguments[5])
        low, high = bits_of(modifiers.get("op_sel", "[0,0,0]")), bits_of(modifiers.get("op_sel_hi", "[1,1,1]"))
        ins.scale_byte_a, ins.scale_byte_b = (low[n] + 2 * high[n] for n in (0, 1))


def bits_of(text: str) -> list[int]:
    """Return the numbers of a list such as [0,1]."""
    return [int(word) for word in text.strip("[]").split(",")]


def _compare(ins, name, arguments, modifiers, labels) -> None:
    match = re.fullmatch(r"v_cmp(x?)_(\w+?)_(\w\d+)", name)
    ins.form, ins.condition, ins.to_exec = Form.LANE_COMPARE, CONDITIONS[match[2]], bool(match[1])
    ins.number_type = Number[match[3].upper()]
    dtype, ins.sign_bit = ("f16", 15) if ins.number_type == Number.F16 else ("f32", 31)
    ins.dst = operand(arguments[0])
    ins.src[0], ins.src[1] = (operand(text, 2, dtype) for text in arguments[1:])


def _lanes(ins, name, arguments, modifiers, labels) -> None:
    """Decode a vector instruction: one destination, or two, and up to three sources."""
    if modifiers.keys() - KNOWN_MODIFIERS:
        raise ValueError(f"modifiers {modifiers}")
    words = 2 if re.search(r"[iub]64$", name) else 1
    is_half = name in HALF_SOURCES or (name.endswith("f16") and not name.startswith("v_cvt"))
    dtype, ins.sign_bit = ("f16", 15) if is_half else ("f32", 31)
    has_two = ins.form == Form.LANE_CARRY or name in ("v_div_scale_f32", "v_mad_u64_u32", "v_mad_i64_i32")
    ins.dst, sources = operand(arguments[0]), arguments[1:]
    if has_two:
        ins.dst2, sources = operand(sources[0]), sources[1:]
    for n, source in enumerate(sources):
        ins.src[n] = operand(source, words, dtype)
    if len(sources) > 3:
        raise ValueError("sources")
    if name == "v_cndmask_b32" and len(sources) == 2:
        ins.src[2] = operand("vcc")
    if name.startswith("v_bitop3"):
        ins.truth_table = int(modifiers["bitop3"], 0)
    _half_selection(ins, name, modifiers, len(sources))
    if "clamp" in modifiers:
        if name in ("v_add_u32", "v_sub_u32"):
            ins.saturate_integer = 1
        elif name.endswith("f32") and ins.form == Form.LANE:
            ins.clamp = 1
        else:
            raise ValueError("clamp")
    if modifiers.keys() & {"mul", "div"}:
        raise ValueError("output modifiers, which chips ignore where denormals are kept")


def _half_selection(ins, name, modifiers, n_sources: int) -> None:
    """Decode op_sel and its like: a bit for each source."""
    is_packed = name.startswith("v_pk_")
    if not is_packed and "op_sel" in modifiers:
        bits, n_chosen = bits_of(modifiers["op_sel"]), PARTS_OF_SOURCE.get(name, 0)
        high = any(bits[n_sources:])
        if any(bits[n_chosen:n_sources]) or (high and name not in HALVES_OF_RESULT):
            raise ValueError("op_sel")
        ins.op_sel = sum(bit << n for n, bit in enumerate(bits[:n_chosen])) | high << 3
    if not is_packed:
        return
    everyone = (1 << n_sources) - 1
    ins.op_sel = _as_bits(modifiers.get("op_sel", "[0]"))
    ins.op_sel_hi = _as_bits(modifiers["op_sel_hi"]) if "op_sel_hi" in modifiers else everyone
    ins.neg_lo, ins.neg_hi = (_as_bits(modifiers.get(key, "[0]")) for key in ("neg_lo", "neg_hi"))
    if name.endswith("f32"):
        for n in range(n_sources):
            constant = ins.src[n]
            if constant.kind == Kind.CONSTANT and ins.op_sel_hi >> n & 1 and constant.value:
                raise ValueError("high half of a constant")


def _as_bits(text: str) -> int:
    return sum(bit << n for n, bit in enumerate(bits_of(text)))


def _lane_selection(ins, modifiers, is_sdwa: bool) -> None:
    """Decode SDWA, which takes parts of words, or DPP, which takes the first source from other lanes."""
    if is_sdwa:
        if ins.form not in (Form.LANE, Form.LANE_COMPARE):
            raise ValueError("SDWA")
        ins.is_sdwa = 1
        ins.dst_select = Select[modifiers.get("dst_sel", "DWORD")]
        ins.dst_unused = UNUSED[modifiers.get("dst_unused", "UNUSED_PAD")]
        for n in (0, 1):
            ins.src[n].select = Select[modifiers.get(f"src{n}_sel", "DWORD")]
        return
    if ins.form != Form.LANE:
        raise ValueError("DPP")
    (move,) = modifiers.keys() & {dpp.name.lower() for dpp in Dpp}
    ins.dpp = Dpp[move.upper()]
    if ins.dpp == Dpp.QUAD_PERM:
        ins.dpp_argument = sum(lane << 2 * n for n, lane in enumerate(bits_of(modifiers[move])))
    else:
        ins.dpp_argument = int(modifiers[move] or 0)
    ins.row_mask, ins.bank_mask = (int(modifiers.get(key, "0xf"), 0) for key in ("row_mask", "bank_mask"))
    ins.bound_control = "bound_ctrl" in modifiers
