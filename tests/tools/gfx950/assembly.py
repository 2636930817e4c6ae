"""Run a few hand-written instructions in the emulator: values into lanes or scalars, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tools.gfx950.emulator import Conditions, Program, Result

LANES = 64
MAX_WAVES = 64  # of a launch
FIRST_POINTER, FIRST_SOURCE, OUT_WORDS = 32, 12, 6
CONDITIONS = Conditions(late=True)
ARGUMENT = """      - .offset: {offset}
        .size: 8
        .value_kind: global_buffer"""


def kernel(body: str, n_tensors: int) -> Program:
    """Return a program that has its tensors' addresses in s[32:33], s[34:35] and so on, and its workgroup in s2."""
    pointers = range(n_tensors)
    loads = [f"s_load_dwordx2 {pointer(n)}, s[0:1], {8 * n}" for n in pointers]
    arguments = [ARGUMENT.format(offset=8 * n) for n in pointers]
    lines = [
        *loads,
        "s_waitcnt lgkmcnt(0)",
        body,
        "s_endpgm",
        ".amdhsa_user_sgpr_count 2",
        f".amdhsa_kernarg_size {8 * n_tensors}",
        "amdhsa.kernels:",
        "  - .args:",
        *arguments,
        "    .group_segment_fixed_size: 0",
    ]
    return Program("\n".join(lines))


def pointer(n: int) -> str:
    """Return the registers that hold the address of the n-th tensor."""
    return registers("s", FIRST_POINTER + 2 * n, 2)


def registers(file: str, first: int, n: int = 1) -> str:
    return f"{file}{first}" if n == 1 else f"{file}[{first}:{first + n - 1}]"


def run(body: str, *tensors: torch.Tensor, n_workgroups=1, n_warps=1, shared=0, conditions=CONDITIONS) -> Result:
    """Execute a body of instructions, and check that nothing was reported."""
    program = kernel(body, len(tensors))
    result = program.launch(n_workgroups, n_warps, shared, tensors, conditions)
    assert result.is_clean, (result.outcome, [str(finding) for finding in result.findings])
    return result


def words_of(values: np.ndarray) -> np.ndarray:
    """Return values of 32 or 64 bits, or rows of them, as uint32 [n, words]."""
    values = np.ascontiguousarray(values)
    return values.reshape(len(values), -1).view(np.uint32)


@dataclass(frozen=True)
class Lanes:
    """What a body left in each lane."""

    words: np.ndarray  # uint32 [n, 4]
    mask: np.ndarray  # bool [n]

    @property
    def word(self) -> np.ndarray:
        return self.words[:, 0]

    @property
    def float32(self) -> np.ndarray:
        return np.ascontiguousarray(self.word).view(np.float32)

    @property
    def pair(self) -> np.ndarray:
        return np.ascontiguousarray(self.words[:, :2]).view(np.uint64)[:, 0]


def evaluate(code: str, *sources: np.ndarray, words=1, old=None, mask=None, shared=0) -> Lanes:
    """Execute code for all values, 64 of them in a wave.

    {a}, {b}, {c}, {e} stand for the sources' registers, {d} for those of the result (`old` is what they hold before),
    {x} for registers from v40 on, {mask} for the mask that is given, a bool for each lane, and {out} for one that is
    returned.
    """
    n = len(sources[0])
    sources = [words_of(source) for source in sources]
    previous = np.full((n, 4), 0x7FC0DEAD, np.uint32)
    if old is not None:
        previous[:, : words_of(old).shape[1]] = words_of(old)
    n_waves = -(-n // LANES)
    given = np.resize(np.concatenate([previous, *sources], 1), (n_waves * LANES, 4 + sum(s.shape[1] for s in sources)))
    masks = np.packbits(np.resize([False] if mask is None else mask, (n_waves, LANES)), axis=1, bitorder="little")
    names = {"d": registers("v", 4, words), "out": "s[20:21]", "mask": "s[22:23]"}
    names |= {f"x{k}": f"v{40 + k}" for k in range(8)}
    first = FIRST_SOURCE
    for name, source in zip("abce", sources, strict=False):
        names[name] = registers("v", first, source.shape[1])
        first += source.shape[1]
    width = given.shape[1]
    targets = [*range(4, 8), *range(FIRST_SOURCE, first)]
    body = f"""
        s_lshl_b32 s4, s2, 6
        s_lshl_b32 s5, s2, 3
        s_load_dwordx2 s[22:23], {pointer(1)}, s5
        v_add_u32 v1, s4, v0
        v_mul_lo_u32 v2, v1, {4 * width}
        v_mul_lo_u32 v3, v1, {4 * OUT_WORDS}
        {"".join(f"global_load_dword v{to}, v2, {pointer(0)} offset:{4 * k}{chr(10)}" for k, to in enumerate(targets))}
        s_mov_b64 s[20:21], 0
        s_waitcnt vmcnt(0) lgkmcnt(0)
        {code.format(**names)}
        s_waitcnt vmcnt(0) lgkmcnt(0)
        s_mov_b64 exec, -1
        v_mov_b32 v8, s20
        v_mov_b32 v9, s21
        global_store_dwordx4 v3, v[4:7], {pointer(2)}
        global_store_dwordx2 v3, v[8:9], {pointer(2)} offset:16"""
    program = kernel(body, 3)
    out = np.zeros((n_waves * LANES, OUT_WORDS), np.uint32)
    for wave in range(0, n_waves, MAX_WAVES):
        waves = slice(wave, wave + MAX_WAVES)
        lanes = slice(LANES * wave, LANES * (wave + MAX_WAVES))
        parts = [given[lanes], masks[waves], out[lanes]]
        result = program.launch(len(masks[waves]), 1, shared, [torch.from_numpy(part) for part in parts], CONDITIONS)
        assert result.is_clean, (code, result.outcome, [str(finding) for finding in result.findings])
    bits = np.unpackbits(np.ascontiguousarray(out[::LANES, 4:]).view(np.uint8), axis=1, bitorder="little")
    return Lanes(out[:n, :4], bits.reshape(-1)[:n].astype(bool))


def evaluate_scalar(
    code: str, x: Sequence[int], y: Sequence[int], old: Sequence[int], scc: Sequence[int]
) -> np.ndarray:
    """Execute code for each x, y, what the destination holds and SCC. Return result and SCC, uint64 [n, 2].

    {x}, {y}, {d} stand for 32 bits, {x2}, {y2}, {d2} for 64.
    """
    given = torch.from_numpy(np.array([x, y, old, scc], np.uint64).T.copy())
    out = torch.zeros(len(x), 2, dtype=torch.uint64)
    names = {"x": "s64", "y": "s66", "d": "s68", "x2": "s[64:65]", "y2": "s[66:67]", "d2": "s[68:69]"}
    run(
        f"""
        s_mov_b32 s12, 0
        v_mov_b32 v1, 0
        v_mov_b32 v5, 0
        loop:
        s_load_dwordx8 s[64:71], {pointer(0)}, s12
        s_waitcnt lgkmcnt(0)
        s_cmp_lg_u32 s70, 0
        {code.format(**names)}
        s_cselect_b32 s13, 1, 0
        v_mov_b32 v2, s68
        v_mov_b32 v3, s69
        v_mov_b32 v4, s13
        global_store_dwordx4 v1, v[2:5], {pointer(1)}
        v_add_u32 v1, v1, 16
        s_add_u32 s12, s12, 32
        s_cmp_lt_u32 s12, {32 * len(x)}
        s_cbranch_scc1 loop""",
        given,
        out,
    )
    return out.numpy()
