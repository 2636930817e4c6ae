"""Shortcuts for the common cases of the language, for which the stock interpreter makes dozens of Python calls.

Each shortcut returns exactly what the stock function returns, and calls it, its `__wrapped__`, for all other cases.
"""

import functools
import math
import operator

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from interpreter import formats, numerics

Handle = interpreter.TensorHandle
Tensor = tl.tensor
builder = interpreter.interpreter_builder

_NUMPY = {
    "int1": np.bool_,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
}
_STORAGE = {name: np.dtype(kind) for name, kind in _NUMPY.items()} | {
    "bf16": np.dtype(np.uint16),
    "fp8e4nv": np.dtype(np.uint8),
    "fp8e5": np.dtype(np.uint8),
}
_FLOATS = {"fp32", "fp64"}
_INTEGERS = {"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}
_LIMITS = {name: (int(np.iinfo(_NUMPY[name]).min), int(np.iinfo(_NUMPY[name]).max)) for name in _INTEGERS}
_NUMBERS = _FLOATS | _INTEGERS
_NEGATIVE_ZERO_BECOMES_ZERO = triton.__version__.startswith("3.6.")  # also in compiled kernels


# ---------------------------------------------------------------- cheap handles, types and tensors


def _tensor_init(self, handle, type):
    # Stock: rebuilds shape and numel for each tensor.
    self.handle = handle
    self.type = type
    self.shape, self.numel = type._extents
    self.dtype = type.scalar


def _handle_init(self, data, dtype, attr=None):
    # Stock: creates a dictionary for each handle.
    self.data = data
    self.dtype = dtype
    self.__post_init__()


def _handle_set_attr(self, key, value):
    self.__dict__.setdefault("attr", {})[key] = value


def _extents(dims):
    """Return a tensor's `shape` and `numel` for the extents of its block, which are () for a scalar."""
    return tl.core.tuple([tl.constexpr(extent) for extent in dims]), tl.constexpr(math.prod(dims))


_stock_block_init = tl.block_type.__init__
_block_shapes = {}


def _block_init(self, element_ty, shape):
    # Stock: checks the shape and formats a name for each type.
    dims = tuple(tl.core._unwrap_shape(shape))
    cached = _block_shapes.get(dims)
    if cached is None:
        _stock_block_init(self, element_ty, list(dims))
        cached = _block_shapes[dims] = (self.shape, self.numel, _extents(dims))
    self.element_ty = element_ty
    self.shape, self.numel, self._extents = cached
    self._dims = dims


def _block_name(self):
    return f"<{self.shape}, {self.element_ty}>"


def _block(scalar, dims):
    """Return the block type, which is created once for each scalar type and shape."""
    try:
        return scalar._blocks[dims]
    except AttributeError:
        scalar._blocks = {}
    except KeyError:
        pass
    block = scalar._blocks[dims] = tl.block_type(scalar, dims)
    return block


def _make(data, dtype, type):
    handle = object.__new__(Handle)
    handle.data = data
    handle.dtype = dtype
    result = object.__new__(Tensor)
    result.handle = handle
    result.type = type
    result.dtype = dtype
    result.shape, result.numel = type._extents
    return result


def _common_shape(left, right):
    """Return the shape that two shapes broadcast to, or None if the stock function must decide."""
    if left == right or not right:
        return left
    if not left:
        return right
    rank = max(len(left), len(right))
    left, right = (1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right
    shape = []
    for a, b in zip(left, right):
        if a != b and a != 1 and b != 1:
            return None
        shape.append(b if a == 1 else a)
    return tuple(shape)


def _constant(value, name, compared=False):
    """Return a Python number as a numpy scalar of the dtype, or None if stock would use another dtype or fail."""
    number_type = type(value)
    if name in _FLOATS:
        if number_type is not float and number_type is not int:
            return None
        if value == 0 and _NEGATIVE_ZERO_BECOMES_ZERO:
            return _NUMPY[name](0)
        if compared and not 1e-37 < abs(value) < 3e38:
            return None
        return _NUMPY[name](value)
    if number_type is not int or name not in _LIMITS:
        return None
    low, high = _LIMITS[name]
    return _NUMPY[name](value) if low <= value <= high else None


# ---------------------------------------------------------------- operators


def _binary(owner, method, operation, names, compared=False, reflected=False):
    stock = getattr(owner, method)

    def fast(self, other):
        dtype, result_type = self.dtype, self.type
        name = dtype.name
        if name not in names:
            moved = None
            if name not in _STORAGE and method in ("__add__", "__radd__") and dtype.is_ptr():
                moved = _move_pointer(self, other)
            return stock(self, other) if moved is None else moved
        if type(other) is Tensor:
            if other.dtype is not dtype:
                return stock(self, other)
            other_type = other.type
            if result_type is dtype:
                result_type = other_type
            elif result_type is not other_type and other_type is not dtype:
                shape = _common_shape(result_type._dims, other_type._dims)
                if shape is None:
                    return stock(self, other)
                result_type = _block(dtype, shape)
            right = other.handle.data
        else:
            if type(other) is tl.constexpr:
                other = other.value
            right = _constant(other, name, compared)
            if right is None:
                return stock(self, other)
        left = self.handle.data
        data = operation(right, left) if reflected else operation(left, right)
        if compared:
            return _make(data, tl.int1, tl.int1 if result_type is dtype else _block(tl.int1, result_type._dims))
        return _make(data, dtype, result_type)

    fast.__wrapped__ = stock
    setattr(owner, method, fast)


def _move_pointer(pointer, offset):
    dtype = pointer.dtype
    width = max(1, dtype.element_ty.primitive_bitwidth // 8)
    if type(offset) is tl.constexpr:
        offset = offset.value
    if type(offset) is int:
        return _make(pointer.handle.data + np.uint64(offset * width & 0xFFFFFFFFFFFFFFFF), dtype, pointer.type)
    if type(offset) is not Tensor or offset.dtype.name not in _INTEGERS:
        return None
    shape = _common_shape(pointer.type._dims, offset.type._dims)
    if shape is None:
        return None
    steps = offset.handle.data.astype(np.uint64)
    if width > 1:
        steps *= np.uint64(width)
    return _make(pointer.handle.data + steps, dtype, _block(dtype, shape) if shape else dtype)


def _quotient(left, right):
    return (left - np.fmod(left, right)) // right


_stock_np_dtype = interpreter._get_np_dtype


def _get_np_dtype(dtype):
    storage = _STORAGE.get(dtype.scalar.name)
    return _stock_np_dtype(dtype) if storage is None else storage


def _install_operators():
    for symbol, operation in (("add", operator.add), ("sub", operator.sub), ("mul", operator.mul)):
        _binary(Tensor, f"__{symbol}__", operation, _NUMBERS)
        _binary(Tensor, f"__r{symbol}__", operation, _NUMBERS, reflected=True)
    _binary(Tensor, "__truediv__", operator.truediv, _FLOATS)
    _binary(Tensor, "__rtruediv__", operator.truediv, _FLOATS, reflected=True)
    _binary(Tensor, "__floordiv__", _quotient, _INTEGERS)
    _binary(Tensor, "__mod__", np.fmod, _INTEGERS)
    for symbol, operation in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        _binary(Tensor, f"__{symbol}__", operation, _INTEGERS | {"int1"})
    for symbol, operation in (("lshift", operator.lshift), ("rshift", operator.rshift)):
        _binary(Tensor, f"__{symbol}__", operation, _INTEGERS)
    for symbol in ("lt", "le", "gt", "ge", "eq", "ne"):
        _binary(Tensor, f"__{symbol}__", getattr(operator, symbol), _NUMBERS, compared=True)


def _install_getitem():
    stock = Tensor.__getitem__

    def getitem(self, slices):
        items = slices if type(slices) is tuple else (slices,)
        if self.type is not self.dtype and all(item is None or item == slice(None) for item in items):
            data = self.handle.data[slices]
            return _make(data, self.dtype, _block(self.dtype, data.shape))
        return stock(self, slices)

    Tensor.__getitem__ = getitem


# ---------------------------------------------------------------- memory


class _Memory:
    """The process's memory from an address on, as a numpy array."""

    def __init__(self, address, size, typestr):
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": typestr, "version": 3}


_MIN_GATHER_SIZE = 256  # elements; for fewer, stock's loop is faster


def _gather(pointers, dtype):
    """Return an array of the memory that spans flat `pointers` and their indices in it, or None if misaligned."""
    start = int(pointers.min())
    positions = pointers - np.uint64(start)
    width = dtype.itemsize
    if width > 1:
        if (np.bitwise_or.reduce(positions) & np.uint64(width - 1)) != 0:
            return None
        positions >>= np.uint64(width.bit_length() - 1)
    size = int(positions.max()) + 1
    return np.asarray(_Memory(start, size, dtype.str)), positions.view(np.int64)


def _read(stock_read, pointers, mask, other, dtype):
    if pointers.size >= _MIN_GATHER_SIZE:
        if mask.all():
            gathered = _gather(pointers.reshape(-1), dtype)
            if gathered:
                return gathered[0].take(gathered[1]).reshape(pointers.shape)
        elif mask.any():
            gathered = _gather(pointers[mask], dtype)
            if gathered:
                result = other.copy()
                result[mask] = gathered[0].take(gathered[1])
                return result
        else:
            return other.copy()
    return stock_read(pointers, mask, other, dtype)


def _write(stock_write, pointers, value, mask):
    if pointers.size >= _MIN_GATHER_SIZE:
        everywhere = mask.all()
        lanes = pointers.reshape(-1) if everywhere else pointers[mask]
        if not lanes.size:
            return None
        gathered = _gather(lanes, value.dtype)
        if gathered:
            gathered[0][gathered[1]] = value.reshape(-1) if everywhere else value[mask]
            return None
    return stock_write(pointers, value, mask)


class _FastMemory:
    """Triton's C++ interpreter with faster loads and stores of large blocks (stock: 10 to 30 ns per element)."""

    def __init__(self, stock):
        self._stock = stock
        self.load = functools.partial(_read, stock.load)
        self.store = functools.partial(_write, stock.store)

    def __getattr__(self, name):
        return getattr(self._stock, name)


def _lanes(mask, shape):
    """Return a mask's data in the shape of the pointers, or None if the stock function must decide."""
    if type(mask) is not Tensor or mask.dtype is not tl.int1:
        return None
    data = mask.handle.data
    if not shape or data.shape == shape:
        return None if not shape and data.size != 1 else data
    return np.broadcast_to(data, shape) if _common_shape(shape, mask.type._dims) == shape else None


def _number(value):
    """Return a number and its text, which distinguishes -0.0 from 0.0 and 1 from 1.0 in a cache's key."""
    value = tl.core._unwrap_if_constexpr(value)
    return (value, repr(value)) if type(value) in (int, float) else (None, "")


def _fill(dims, name, value, text):
    """Return the block that masked-off lanes of a load take their value from, or None if stock must make it."""
    if text in ("0", "0.0"):
        return np.zeros(dims, _STORAGE[name])
    constant = _constant(value, name) if name in _NUMBERS else None
    return None if constant is None else np.full(dims, constant)


def _install_memory(module):
    interpreter._interpreter = _FastMemory(interpreter._interpreter)
    stock_load, stock_store = module.load, module.store
    ones = functools.lru_cache(None)(lambda shape: np.ones(shape, bool))
    fills = functools.lru_cache(256)(_fill)

    def load(pointer, mask=None, other=None, *rest, **options):
        def call_stock():
            return stock_load(pointer, mask, other, *rest, **options)

        volatile = options.get("volatile", False)
        if rest or not options.keys() <= _HINTS or type(volatile) is not bool:
            return call_stock()
        if type(pointer) is not Tensor or not pointer.dtype.is_ptr():
            return call_stock()
        element = pointer.dtype.element_ty
        name = element.name
        if name not in _STORAGE or name == "int1" or (mask is None and other is not None):
            return call_stock()
        data = pointer.handle.data
        shape = data.shape
        lanes = ones(shape) if mask is None else _lanes(mask, pointer.type._dims)
        if lanes is None:
            return call_stock()
        if other is None:
            fill = fills(shape, name, 0, "0")
        else:
            fill = fills(shape, name, *_number(other))
            if fill is None:
                return call_stock()
        handle = builder.create_masked_load(
            pointer.handle, _bare(lanes, tl.int1), _bare(fill, element), *_NO_POLICY, volatile
        )
        return _make(handle.data, element, _block(element, shape) if pointer.type.is_block() else element)

    def store(pointer, value, mask=None, *rest, **options):
        def call_stock():
            return stock_store(pointer, value, mask, *rest, **options)

        if rest or not options.keys() <= _HINTS or options.get("cache_modifier") == ".wt":  # see launch._store
            return call_stock()
        if type(pointer) is not Tensor or not pointer.dtype.is_ptr() or pointer.dtype.const:
            return call_stock()
        element = pointer.dtype.element_ty
        if type(value) is not Tensor or element.name not in _STORAGE or element.name == "int1":
            return call_stock()
        shape = pointer.type._dims
        if value.type._dims != shape:
            return call_stock()
        lanes = ones(pointer.handle.data.shape) if mask is None else _lanes(mask, shape)
        if lanes is None:
            return call_stock()
        value = value if value.dtype is element else value.to(element)
        builder.create_masked_store(pointer.handle, value.handle, _bare(lanes, tl.int1), *_NO_POLICY)

    return load, store


_HINTS = {"cache_modifier", "eviction_policy", "volatile"}
_NO_POLICY = (None,) * (interpreter.InterpreterBuilder.create_masked_store.__code__.co_argcount - 4)


def _bare(data, dtype):
    handle = object.__new__(Handle)
    handle.data = data
    handle.dtype = dtype
    return handle


# ---------------------------------------------------------------- functions


def _where(stock):
    def where(condition, x, y):
        if type(condition) is Tensor and condition.dtype is tl.int1:
            typed = x if type(x) is Tensor else y
            if type(typed) is Tensor and typed.dtype.name in _NUMBERS:
                dtype = typed.dtype
                shape, sides = condition.type._dims, []
                for side in (x, y):
                    if type(side) is Tensor:
                        if side.dtype is not dtype or shape is None:
                            return stock(condition, x, y)
                        shape = _common_shape(shape, side.type._dims)
                        sides.append(side.handle.data)
                    elif dtype.name in ("fp32", "int32"):
                        sides.append(_constant(tl.core._unwrap_if_constexpr(side), dtype.name, compared=True))
                    else:
                        sides.append(None)
                if shape is not None and sides[0] is not None and sides[1] is not None:
                    data = np.where(condition.handle.data, *sides)
                    return _make(data, dtype, _block(dtype, shape) if shape else dtype)
        return stock(condition, x, y)

    return where


def _extremum(stock, float_operation, integer_operation):
    def extremum(x, y, propagate_nan=tl.PropagateNan.NONE):
        if type(x) is Tensor and x.dtype.name in _NUMBERS and propagate_nan == tl.PropagateNan.NONE:
            operation = float_operation if x.dtype.name in _FLOATS else integer_operation
            if type(y) is Tensor:
                shape = _common_shape(x.type._dims, y.type._dims) if x.dtype is y.dtype else None
                if shape is not None:
                    data = operation(x.handle.data, y.handle.data)
                    return _make(data, x.dtype, _block(x.dtype, shape) if shape else x.dtype)
            elif x.dtype.name in ("fp32", "int32"):
                constant = _constant(tl.core._unwrap_if_constexpr(y), x.dtype.name, compared=True)
                if constant is not None:
                    return _make(operation(x.handle.data, constant), x.dtype, x.type)
        return stock(x, y, propagate_nan)

    return extremum


_CASTS = _NUMBERS | {"bf16", "fp16", "fp8e4nv", "fp8e5", "int1"}


def _cast(stock):
    def cast(input, dtype, fp_downcast_rounding=None, bitcast=False):
        dtype = tl.core._unwrap_if_constexpr(dtype)
        if type(input) is Tensor and type(dtype) is tl.dtype and fp_downcast_rounding is None:
            source = input.dtype
            if source is dtype:
                return input
            name, target = source.name, dtype.name
            if name in _CASTS and target in _CASTS and target != "int1":
                data = input.handle.data
                if tl.core._unwrap_if_constexpr(bitcast):
                    same_width = source.primitive_bitwidth == dtype.primitive_bitwidth
                    data = data.view(_STORAGE[target]) if same_width else None
                elif name in _NUMPY and target in _NUMPY:
                    data = data.astype(_NUMPY[target])
                elif name == "bf16" and target == "fp32":
                    data = formats.bf16_to_float32(data)
                elif name == "fp32":
                    data = numerics.encode(data, dtype)
                elif target == "fp32":
                    data = numerics.decode(data, source)
                else:
                    data = None
                if data is not None:
                    return _make(data, dtype, _block(dtype, input.type._dims) if input.type.is_block() else dtype)
        return stock(input, dtype, fp_downcast_rounding, bitcast)

    return cast


def _full(stock):
    def full(shape, value, dtype):
        dtype = tl.core._unwrap_if_constexpr(dtype)
        value = tl.core._unwrap_if_constexpr(value)
        if dtype.name in _NUMBERS and type(value) in (int, float):
            constant = _constant(value, dtype.name)
            shape = tuple(tl.core._unwrap_shape(shape))
            if constant is not None and shape:
                return _make(np.full(shape, constant), dtype, _block(dtype, shape))
        return stock(shape, value, dtype)

    return full


def _zeros(shape, dtype):
    return tl.full(shape, 0, dtype)


def _arange(stock):
    def arange(start, end):
        start, end = tl.core._unwrap_if_constexpr(start), tl.core._unwrap_if_constexpr(end)
        shape = (end - start,)
        if type(start) is int and type(end) is int and end > start and not shape[0] & shape[0] - 1:
            return _make(np.arange(start, end, dtype=np.int32), tl.int32, _block(tl.int32, shape))
        return stock(start, end)

    return arange


def _reduction(stock, operation, names):
    """Return a shortcut for tl.sum, tl.max or tl.min over one axis of the dtypes in `names`."""

    def reduce(input, axis=None, *args, **kwargs):
        axis = tl.core._unwrap_if_constexpr(axis)
        if not args and not kwargs and type(input) is Tensor and input.dtype.name in names and type(axis) is int:
            type_ = input.type
            if type_.is_block() and 0 <= axis < len(type_._dims):
                data = operation(input.handle.data, axis)
                dtype = input.dtype
                if len(type_._dims) == 1:
                    return _make(data.reshape(1), dtype, dtype)
                return _make(data, dtype, _block(dtype, data.shape))
        return stock(input, axis, *args, **kwargs)

    reduce.__wrapped__ = stock
    return reduce


def _unary(stock, operation):
    def unary(x):
        if type(x) is Tensor and x.dtype is tl.float32:
            return _make(operation(x.handle.data), x.dtype, x.type)
        return stock(x)

    return unary


_UNARY = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda data: 1 / np.sqrt(data),
    "sin": np.sin,
    "cos": np.cos,
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
}

_REDUCED = {"fp32", "fp64", "int32", "int64", "uint32", "uint64"}


def _sum(data, axis):
    return np.add.reduce(data, axis, data.dtype)


def install():
    Handle.__init__ = _handle_init
    Handle.set_attr = _handle_set_attr
    Tensor.__init__ = _tensor_init
    tl.block_type.__init__ = _block_init
    # Scalars have no extents; _block_init sets those of blocks.
    tl.dtype._dims = ()
    tl.dtype._extents = _extents(())
    tl.block_type.name = property(_block_name, lambda self, name: None)
    # Stock: builds a table of all dtypes for each lookup.
    interpreter._get_np_dtype = _get_np_dtype
    # Stock: seven more operations for each one on integers, for an overflow check whose result it discards.
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None
    _install_operators()
    _install_getitem()
    load, store = _install_memory(tl)
    shortcuts = {
        "load": load,
        "store": store,
        "where": _where(tl.where),
        "minimum": _extremum(tl.minimum, np.fmin, np.minimum),
        "maximum": _extremum(tl.maximum, np.fmax, np.maximum),
        "cast": _cast(tl.cast),
        "full": _full(tl.full),
        "arange": _arange(tl.arange),
    }
    for name, function in shortcuts.items():
        function = _without_semantic(function, getattr(tl, name))
        for module in (tl, tl.core):
            setattr(module, name, function)
    for name, operation in _UNARY.items():
        function = _without_semantic(_unary(getattr(tl, name), operation), getattr(tl, name))
        setattr(tl, name, function)
        setattr(tl.math, name, function)
        setattr(Tensor, name, _method(function))
    tl.zeros = _zeros
    tl.sum = _reduction(tl.sum, _sum, _REDUCED)
    tl.max = _reduction(tl.max, np.fmax.reduce, _REDUCED)
    tl.min = _reduction(tl.min, np.fmin.reduce, _REDUCED)
    for name, function in (("to", tl.cast), ("cast", tl.cast), ("sum", tl.sum), ("max", tl.max), ("min", tl.min)):
        setattr(Tensor, name, _method(function))


def _method(function):
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


def _without_semantic(function, stock):
    """Accept the argument `_semantic`, which Triton's library passes, and drop it."""

    def shortcut(*args, **kwargs):
        kwargs.pop("_semantic", None)
        return function(*args, **kwargs)

    shortcut.__wrapped__ = stock
    return shortcut
