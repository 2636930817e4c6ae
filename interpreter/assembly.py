"""Emulate the inline assembly of common/sm90, common/gfx950 and common/cpu on a CPU, with a function for each text.

The shared memory of a program is an array of bytes, and the copy engine copies immediately.
"""

import ctypes
import re
import time
from collections.abc import Callable

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from common import cpu
from common.gemm_fp4 import as_half
from common.gemv_fp8 import e4m3_to_float32
from common.gfx950 import asm
from common.sm90 import prompt_tiles, ptx, tile_product
from common.sm90.tiles import FACTORS, MASKS
from interpreter.scheduler import Grid

Handle = interpreter.TensorHandle
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
POISON = 0xFF  # fills shared memory that was never written; as a float it is NaN
REQUEST = re.compile(r"// shared memory behind Triton's own: (\d+) bytes")  # host.shared_memory reads it on a GPU


# ---------------------------------------------------------------- shared memory


def open_memory(n_bytes: int) -> np.ndarray:
    """Allocate the running program's shared memory, and return its address, 0."""
    Grid.active.running.shared = np.full(n_bytes, POISON, np.uint8)
    return np.zeros(1, np.int32)


def memory(dtype: type) -> np.ndarray:
    """Return the running program's shared memory as an array of a type."""
    shared = Grid.active.running.shared
    return shared[: len(shared) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize].view(dtype)


def load(dtype: type, count: int) -> Callable:
    """Return a function that loads `count` consecutive items at each address."""

    def load_items(address: np.ndarray) -> list[np.ndarray]:
        return [memory(dtype)[address // np.dtype(dtype).itemsize + i] for i in range(count)]

    return load_items


def load_byte(address: np.ndarray) -> list[np.ndarray]:
    return [memory(np.uint8)[address].astype(np.int32)]


def load_4_words_if(address: np.ndarray, inside: np.ndarray) -> list[np.ndarray]:
    inside = inside != 0
    return [np.where(inside, words, 0) for words in load(np.int32, 4)(np.where(inside, address, 0))]


def store(dtype: type) -> Callable:
    """Return a function that stores consecutive items at each address."""

    def store_items(address: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
        for i, value in enumerate(values):
            memory(dtype)[address // np.dtype(dtype).itemsize + i] = value
        return [np.zeros_like(address)]

    return store_items


def store_4_longs_if(address: np.ndarray, *values_and_mask: np.ndarray) -> list[np.ndarray]:
    *values, mask = values_and_mask
    inside = mask != 0
    store(np.int64)(address[inside], *(value[inside] for value in values))
    return [np.zeros_like(address)]


def copy_tile(_barrier: np.ndarray, stage: np.ndarray, description: np.ndarray) -> list[np.ndarray]:
    """Copy the two pieces of a tile, whose description is (pointer, bytes) of each, to a stage of the ring."""
    index, offset = int(description.item()) // 8, int(stage.item())
    first_ptr, first_bytes, second_ptr, second_bytes = memory(np.int64)[index : index + 4].tolist()
    shared = Grid.active.running.shared
    for source, size in ((first_ptr, first_bytes), (second_ptr, second_bytes)):
        if size:
            target = shared[offset : offset + size]
            if len(target) < size:
                raise IndexError(f"a tile of {size} bytes does not fit shared memory")
            ctypes.memmove(target.ctypes.data, source, size)
        offset += size
    return [np.zeros_like(stage)]


def wait_for_copy(_barrier: np.ndarray, _parity: np.ndarray, stage: np.ndarray) -> list[np.ndarray]:
    return [stage]


# ---------------------------------------------------------------- numbers, computed in Triton's language


def by_language(function: Callable) -> Callable:
    """Return a function of arrays that calls an interpreted function of tensors."""

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        results = function(*map(as_tensor, arrays))
        return [result.handle.data for result in results]

    return call


def as_tensor(array: np.ndarray) -> tl.tensor:
    dtype = {"i": tl.int32, "f": tl.float32}[array.dtype.kind]
    return tl.tensor(Handle(array, dtype), tl.block_type(dtype, list(array.shape)))


@triton.jit
def decode_word(words, scales):
    """Return the eight float16 of a packed word times its scale, which a word of `scales` holds twice.

    See prompt_tiles.DECODE.
    """
    e = ()
    scale = as_half(scales)
    for i in tl.static_range(8):
        place = ((words & MASKS[i // 2]) * FACTORS[i // 2]) & MASKS[0]
        e = e + (as_half(place >> (16 * (i % 2))) * scale,)
    return e


def e2m1_pairs(words: np.ndarray) -> list[np.ndarray]:
    """Return the eight E2M1 elements of each int32 as four int64, each of two float32; see asm.E2M1_TO_FLOAT32."""
    nibbles = [words >> 4 * n & 15 for n in range(8)]
    bits = [E2M1[nibble].view(np.uint32).astype(np.uint64) for nibble in nibbles]
    return [(low | high << np.uint64(32)).view(np.int64) for low, high in zip(bits[::2], bits[1::2])]


def multiply_quad(step: int) -> Callable:
    """Return a function for tile_product's product of a quad: number `step` of two whose scales share a word.

    It adds to the sums of even and odd rows. The operands are four words of the even row, four of the odd row, and
    sixteen of the vector.
    """

    def multiply(even: np.ndarray, odd: np.ndarray, *operands: np.ndarray) -> list[np.ndarray]:
        *words, scales, x_scale = operands
        x = tile_columns(np.stack(words[8:], -1).reshape(-1, 4, 4))
        sums = []
        for row, before in enumerate((even, odd)):
            scale = e8m0_value(scales >> (16 * step + 8 * row) & 0xFF)
            w = np.stack(words[4 * row : 4 * row + 4], -1)
            places = np.stack([((w & mask) * factor) & _MASKS[0] for mask, factor in zip(_MASKS, _FACTORS)], -1)
            products = column_sums(places, x[0]) + column_sums(places >> 16, x[1])
            sums.append(before + products * x_scale * scale)
        return sums

    return multiply


_MASKS, _FACTORS = (np.array([int(value) for value in values.value], np.int32) for values in (MASKS, FACTORS))


def tile_columns(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the vector, float32 [warps, 1, 4, 64], for the lower and for the upper halves of a row's words.

    x: int32 [threads, place, word]; of eight columns the first four hold values, the others what rounding left of them.
    """
    return tuple(_joined(halves(part).reshape(-1, 4, 2, 64)) for part in (x, x >> 16))


def _joined(x: np.ndarray) -> np.ndarray:
    return (x[:, :, 0] + x[:, :, 1] / np.float32(tile_product.REST_FACTOR.value))[:, None]


def halves(words: np.ndarray) -> np.ndarray:
    """Return the lower 16 bits of int32 words, as float16, in float32."""
    return words.astype(np.int16).view(np.float16).astype(np.float32)


def column_sums(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the sums [threads] of products of the lower halves of int32 w [threads, 4, 4] and x; see tile_columns."""
    return (halves(w).reshape(-1, 8, 1, 64) * x).sum(3).reshape(-1)


def e8m0_value(e8m0: np.ndarray) -> np.ndarray:
    """Return 2^(e8m0 - 127) as float32; 255 is NaN."""
    return np.where(e8m0 == 255, np.float32(np.nan), np.ldexp(np.float32(1), e8m0 - 127))


# ---------------------------------------------------------------- memory ordering and clocks


def no_op(*arrays: np.ndarray) -> list[np.ndarray]:
    """Return 0, for texts that order memory operations, which the interpreter executes in order."""
    return [np.zeros(arrays[0].shape if arrays else 1, np.int32)]


def write_back() -> list[np.ndarray]:
    """Let the running program's next atomic publish what it has stored, and return 0."""
    if (detector := Grid.active.detector) is not None:
        detector.write_back(Grid.active.running.number)
    return no_op()


def poll(address: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
    """Return the value of a counter, read by an atomic with acquire semantics."""
    pointer = Handle(address.astype(np.uint64), tl.pointer_type(tl.int32))
    zero, mask = Handle(np.zeros_like(target), tl.int32), Handle(np.ones(target.shape, bool), tl.int1)
    value = interpreter.interpreter_builder.create_atomic_rmw(
        ir.ATOMIC_OP.ADD, pointer, zero, mask, ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SYNC_SCOPE.GPU
    )
    return [value.data]


def load_now(scalar: tl.dtype) -> Callable:
    """Return a function that reads what is at each address by a volatile load."""

    def load_items(address: np.ndarray) -> list[np.ndarray]:
        pointer = Handle(address.astype(np.uint64), tl.pointer_type(scalar))
        mask = Handle(np.ones(address.shape, bool), tl.int1)
        zeros = Handle(np.zeros(address.shape, np.dtype(scalar.name)), scalar)
        return [interpreter.interpreter_builder.create_masked_load(pointer, mask, zeros, None, None, True).data]

    return load_items


def clock_ns() -> list[np.ndarray]:
    return [np.array([time.perf_counter_ns()], np.int64)]


def clock_100_mhz() -> list[np.ndarray]:
    return [np.array([time.perf_counter_ns() // 10], np.int64)]


EMULATIONS = {
    ptx.LOAD_WORD: load(np.int32, 1),
    ptx.LOAD_BYTE: load_byte,
    ptx.LOAD_FLOAT: load(np.float32, 1),
    ptx.LOAD_4_FLOATS: load(np.float32, 4),
    ptx.LOAD_4_WORDS: load(np.int32, 4),
    ptx.LOAD_4_WORDS_IF: load_4_words_if,
    ptx.STORE_FLOAT: store(np.float32),
    ptx.STORE_4_FLOATS: store(np.float32),
    ptx.STORE_4_LONGS_IF: store_4_longs_if,
    ptx.COPY: copy_tile,
    ptx.WAIT: wait_for_copy,
    ptx.PREFETCH: no_op,
    ptx.POLL: poll,
    ptx.POLL_RANKS: poll,
    ptx.LOAD_WORD_NOW: load_now(tl.int32),
    ptx.LOAD_LONG_NOW: load_now(tl.int64),
    ptx.CLOCK: clock_ns,
    ptx.E4M3_TO_FLOAT32: by_language(e4m3_to_float32),
    tile_product.FIRST_STEP: multiply_quad(0),
    tile_product.SECOND_STEP: multiply_quad(1),
    prompt_tiles.DECODE: by_language(decode_word),
    asm.DRAIN: no_op,
    asm.WRITE_BACK: write_back,
    asm.WRITE_BACK_TO_RANKS: write_back,
    asm.LOAD_WORD_NOW: load_now(tl.int32),
    asm.LOAD_LONG_NOW: load_now(tl.int64),
    asm.ZERO: no_op,
    asm.CLOCK: clock_100_mhz,
    asm.E4M3_TO_FLOAT32: by_language(e4m3_to_float32),
    asm.E2M1_TO_FLOAT32: e2m1_pairs,
    cpu.CLOCK: clock_ns,
}
BY_TEXT = {text.value: emulate for text, emulate in EMULATIONS.items()}


def inline_asm_elementwise(asm, _constraints, args, dtype, is_pure, pack, _semantic=None):
    """Execute inline assembly on tensors broadcast to one shape. Raise NotImplementedError for an unknown text."""
    # Stock: broadcasts each argument against each other one.
    text = asm.value if isinstance(asm, tl.constexpr) else asm
    arrays = [interpreter.interpreter_semantic.to_tensor(arg).handle.data for arg in args]
    is_block = any(isinstance(arg, tl.tensor) and arg.type.is_block() for arg in args)
    if len(arrays) > 1:
        arrays = np.broadcast_arrays(*arrays)
    if request := REQUEST.search(text):
        results = [open_memory(int(request.group(1)))]
    elif text in BY_TEXT:
        results = BY_TEXT[text](*arrays)
    else:
        raise NotImplementedError(
            "inline assembly has no meaning on a CPU: interpreter/assembly.py must say what it does, or a constexpr "
            "that is false under TRITON_INTERPRET=1 keep it out"
        )
    dtypes = dtype if isinstance(dtype, (tuple, tl.tuple)) else (dtype,)
    tensors = [
        tl.tensor(Handle(array, scalar), tl.block_type(scalar, list(array.shape)) if is_block else scalar)
        for array, scalar in zip(results, dtypes)
    ]
    return tl.tuple(tensors) if isinstance(dtype, (tuple, tl.tuple)) else tensors[0]


def install() -> None:
    """Give inline assembly a meaning in the interpreter."""
    for module in (tl, tl.core):
        module.inline_asm_elementwise = inline_asm_elementwise
