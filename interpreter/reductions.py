"""Replace tl.reduce and tl.associative_scan: they combine whole blocks instead of single elements, and support bf16.

Both assume that the combine function is associative, as Triton does, and keep the order of the elements.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from interpreter import numerics

_NARROW = {"bf16", "fp8e4nv", "fp8e5"}

_stock_reduce = interpreter.ReduceOps.apply_impl
_stock_scan = interpreter.ScanOps.apply_impl
_stock_min_max = interpreter.ReduceOps.min_max
_WITHOUT_WARNINGS = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}


def _combine(combine_fn, left, right, dtypes):
    """Apply the combine function elementwise to lists of equally shaped arrays."""
    operands = [
        tl.tensor(interpreter.TensorHandle(array, dtype), tl.block_type(dtype, list(array.shape)))
        for arrays in (left, right)
        for array, dtype in zip(arrays, dtypes)
    ]
    results = combine_fn(*operands)
    results = results if isinstance(results, (tuple, tl.core.tuple)) else (results,)
    tensors = [interpreter.interpreter_semantic.to_tensor(result) for result in results]
    return [np.broadcast_to(t.handle.data, old.shape).astype(old.dtype) for t, old in zip(tensors, left)]


def _generic_reduce(self, input):
    # Stock: calls the combine function once per element, and flattens only the first input if axis is None.
    dtypes = [tensor.dtype for tensor in input]
    arrays = [tensor.handle.data for tensor in input]
    rank = arrays[0].ndim
    if self.axis is None:
        arrays = [array.reshape(-1) for array in arrays]
    axis = self.axis or 0
    arrays = [np.moveaxis(array, axis, 0) for array in arrays]
    while arrays[0].shape[0] > 1:
        arrays = _combine(self.combine_fn, [a[0::2] for a in arrays], [a[1::2] for a in arrays], dtypes)
    results = [array[0] for array in arrays]
    if self.keep_dims:
        axes = tuple(range(rank)) if self.axis is None else axis
        results = [np.expand_dims(result, axes) for result in results]
    return [self.to_tensor(result, dtype) for result, dtype in zip(results, dtypes)]


def _generic_scan(self, input):
    # Stock: calls the combine function once per element.
    dtypes = [tensor.dtype for tensor in input]
    arrays = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in input]
    length, distance = arrays[0].shape[0], 1
    while distance < length:
        shifted = [np.concatenate([array[:distance], array[:-distance]]) for array in arrays]
        combined = _combine(self.combine_fn, shifted, arrays, dtypes)
        arrays = [np.concatenate([old[:distance], new[distance:]]) for old, new in zip(arrays, combined)]
        distance *= 2
    arrays = [np.ascontiguousarray(np.moveaxis(array, 0, self.axis)) for array in arrays]
    return [self.to_tensor(array, dtype) for array, dtype in zip(arrays, dtypes)]


def _reduce(self, input):
    # Stock: sums, compares and searches the bit patterns of bf16 and fp8.
    if any(tensor.dtype.name in _NARROW for tensor in input):
        if self.combine_fn is not tl.standard._sum_combine:
            return self.generic_reduce(input)
        (tensor,) = input
        values = numerics.decode(tensor.handle.data, tensor.dtype)
        total = np.sum(values, axis=self.axis, keepdims=self.keep_dims, dtype=np.float32)
        return self.to_tensor(numerics.encode(np.asarray(total), tensor.dtype), tensor.dtype)
    return _stock_reduce(self, input)


def _min_max(self, input, val_reduce_op, idx_reduce_op=None):
    # Stock: warns if all values are NaN.
    return _stock_min_max(self, input, _WITHOUT_WARNINGS.get(val_reduce_op, val_reduce_op), idx_reduce_op)


def _scan(self, input):
    # Stock: sums and multiplies the bit patterns of bf16 and fp8.
    if not any(tensor.dtype.name in _NARROW for tensor in input):
        return _stock_scan(self, input)
    if self.reverse:
        input = [self.to_tensor(np.flip(t.handle.data, axis=self.axis), t.dtype) for t in input]
    results = self.generic_scan(input)
    if self.reverse:
        results = [self.to_tensor(np.flip(t.handle.data, axis=self.axis), t.dtype) for t in results]
    return results


def install():
    interpreter.ReduceOps.generic_reduce = _generic_reduce
    interpreter.ReduceOps.apply_impl = _reduce
    interpreter.ReduceOps.min_max = _min_max
    interpreter.ScanOps.generic_scan = _generic_scan
    interpreter.ScanOps.apply_impl = _scan
