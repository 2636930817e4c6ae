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
from common.quant import e8m0_to_float32
from common.sm90 import prompt_tiles, ptx, tile_product
from common.sm90.tiles import FACTORS, MASKS
from interpreter.scheduler import Grid

Handle = interpreter.TensorHandle
POISON = 0xFF  # fills shared memory that was never written; as a float it is NaN
REQUEST = re.compile(r"// shared memory behind Triton's own: (\d+) bytes")  # host.shared_memory reads it on a GPU


class Results:
    """The results of an operation, with the method by which Triton reads them."""

    def __init__(self, handles: list[Handle]):
        self._handles = handles

    def get_result(self, index: int) -> Handle:
        return self._handles[index]


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


def multiply_quad(step: int) -> Callable:
    """Return a function for tile_product's product of a quad: number `step` of two whose scales share a word."""

    def multiply(*arrays: np.ndarray) -> list[np.ndarray]:
        even, odd, *operands, scales, x_scale = map(as_tensor, arrays)
        return [result.handle.data for result in add_quad(even, odd, tuple(operands), scales, x_scale, step)]

    return multiply


@triton.jit
def add_quad(even, odd, operands, scales, x_scale, STEP: tl.constexpr):
    """Add a quad's products to the sums of even and odd rows, and return both sums.

    operands: four words of the even row, four of the odd row, and sixteen of the vector.
    """
    even_scale = e8m0_to_float32((scales >> (16 * STEP)) & 0xFF)
    odd_scale = e8m0_to_float32((scales >> (16 * STEP + 8)) & 0xFF)
    x = operands[8:]
    even += products(operands[:4], x) * x_scale * even_scale
    return even, odd + products(operands[4:8], x) * x_scale * odd_scale


@triton.jit
def products(words, x):
    """Return the tensor cores' products of a row's four words and the vector; thread 4 r + q has the sum of group q."""
    w = stack(words[0], words[1], words[2], words[3])
    places = ()
    for place in tl.static_range(4):
        places = places + (((w & MASKS[place]) * FACTORS[place]) & MASKS[0],)
    w = stack(places[0], places[1], places[2], places[3])  # threads, word, place
    x0 = stack(x[0], x[1], x[2], x[3])
    x1 = stack(x[4], x[5], x[6], x[7])
    x2 = stack(x[8], x[9], x[10], x[11])
    x3 = stack(x[12], x[13], x[14], x[15])
    x = tl.permute(stack(x0, x1, x2, x3), (0, 2, 1))
    return column_sums(w, x) + column_sums(w >> 16, x >> 16)


@triton.jit
def stack(a, b, c, d):
    """Stack four tensors along a new last dimension."""
    both = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(both, a.shape + [4])


@triton.jit
def column_sums(w, x):
    """Return the sums of products [threads] of the lower halves, as float16, of int32 w and x [threads, 4, 4]."""
    WARPS: tl.constexpr = w.shape[0] // 32
    w = tl.reshape(w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), (WARPS, 8, 1, 64))
    x = tl.reshape(x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), (WARPS, 4, 2, 64))
    value, rest = tl.split(tl.permute(x, (0, 1, 3, 2)))
    x = tl.reshape(value + rest / tile_product.REST_FACTOR, (WARPS, 1, 4, 64))
    return tl.reshape(tl.sum(w * x, axis=3), (WARPS * 32,))


# ---------------------------------------------------------------- memory ordering and clocks


def no_op(*arrays: np.ndarray) -> list[np.ndarray]:
    """Return 0, for texts that order memory operations, which the interpreter executes in order."""
    return [np.zeros(arrays[0].shape if arrays else 1, np.int32)]


def write_back() -> list[np.ndarray]:
    """Let the running program's next atomic publish what it has stored, and return 0."""
    if (detector := Grid.active.detector) is not None:
        detector.write_back(Grid.active.running.number)
    return no_op()


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
    ptx.CLOCK: clock_ns,
    ptx.E4M3_TO_FLOAT32: by_language(e4m3_to_float32),
    tile_product.FIRST_STEP: multiply_quad(0),
    tile_product.SECOND_STEP: multiply_quad(1),
    prompt_tiles.DECODE: by_language(decode_word),
    asm.DRAIN: no_op,
    asm.WRITE_BACK: write_back,
    asm.ZERO: no_op,
    asm.CLOCK: clock_100_mhz,
    asm.E4M3_TO_FLOAT32: by_language(e4m3_to_float32),
    cpu.CLOCK: clock_ns,
}
BY_TEXT = {text.value: emulate for text, emulate in EMULATIONS.items()}


def inline_asm(self, text: str, _constraints: str, handles: list[Handle], types: list, *_options) -> Results:
    """Execute inline assembly, as an operation of the interpreter. Raise NotImplementedError for an unknown text."""
    if text == ptx.POLL.value:
        return Results([poll(self, *handles)])
    if request := REQUEST.search(text):
        arrays = [open_memory(int(request.group(1)))]
    elif text in BY_TEXT:
        arrays = BY_TEXT[text](*(handle.data for handle in handles))
    else:
        raise NotImplementedError(
            "inline assembly has no meaning on a CPU: interpreter/assembly.py must say what it does, or a constexpr "
            "that is false under TRITON_INTERPRET=1 keep it out"
        )
    return Results([Handle(array, type_.scalar) for array, type_ in zip(arrays, types)])


def poll(builder, address: Handle, target: Handle) -> Handle:
    """Return the value of a counter, read by an atomic with acquire semantics."""
    pointer = Handle(address.data.astype(np.uint64), tl.pointer_type(tl.int32))
    zero, mask = Handle(np.zeros_like(target.data), tl.int32), Handle(np.ones(target.data.shape, bool), tl.int1)
    return builder.create_atomic_rmw(
        ir.ATOMIC_OP.ADD, pointer, zero, mask, ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SYNC_SCOPE.GPU
    )


def install() -> None:
    """Add inline assembly to the interpreter."""
    interpreter.InterpreterBuilder.create_inline_asm = inline_asm
