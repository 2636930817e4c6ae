"""Run the language as if compiled: bind triton.language once, and convert arguments, loops and boolean operators."""

import ast

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
semantic = interpreter.interpreter_semantic


class _KeepPatches:
    """Replaces stock's patch scope, so that patches stay for the life of the process."""

    def set_attr(self, owner, name, value):
        setattr(owner, name, value)

    def restore(self):
        pass


def _bind(owner, name, member, builder, scope):
    function = getattr(member, "__wrapped__", member)

    def bound(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    bound.__name__ = name
    setattr(owner, name, bound)


def bind_language():
    # Stock: patches all of triton.language at every launch and at every call of a device function.
    interpreter._patch_attr = _bind
    scope = _KeepPatches()
    for module in (tl.core, tl):
        interpreter._patch_builtin(module, interpreter.interpreter_builder, scope)
        interpreter._patch_lang_core(module, scope)
    interpreter._patch_builtin(tl.tensor, interpreter.interpreter_builder, scope)
    interpreter._patch_builtin(tl.math, interpreter.interpreter_builder, scope)
    interpreter._patch_builtin(tl.core.tensor_descriptor_base, interpreter.interpreter_builder, scope)
    interpreter._patch_lang_tensor(tl.tensor, scope)
    interpreter._patch_lang = lambda function: scope
    # Stock: calls int() on a one-element array for a bound of a runtime range, which numpy >= 2.4 refuses.
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    tl.tensor.__bool__ = _tensor_bool
    for module in (tl.core, tl):
        module.range = _runtime_range
        module.static_range = _static_range


def _tensor_bool(self):
    data = self.handle.data
    return bool(data.item()) if data.size == 1 else True


# ---------------------------------------------------------------- loops and boolean operators


def _scalar(value, dtype):
    return tl.tensor(Handle(np.array([value], interpreter._get_np_dtype(dtype)), dtype), dtype)


def _unwrap(value):
    return value.value if isinstance(value, tl.constexpr) else value


def _runtime_range(first, second=None, step=1, **hints):
    """Run range() and tl.range() as compiled: the loop variable is a scalar tensor (stock: a Python int)."""
    start, stop = (0, first) if second is None else (first, second)
    bounds = [_unwrap(bound) for bound in (start, stop, step)]
    is_wide = any(isinstance(bound, tl.tensor) and bound.dtype.primitive_bitwidth == 64 for bound in bounds)
    dtype = tl.int64 if is_wide or not all(-(2**31) <= int(bound) < 2**31 for bound in bounds[:2]) else tl.int32
    for value in range(*map(int, bounds)):
        yield _scalar(value, dtype)


def _static_range(first, second=None, step=1, **hints):
    """Run tl.static_range(): the loop variable is a Python int, which the language accepts as a constexpr."""
    start, stop = (0, first) if second is None else (first, second)
    return range(*(int(_unwrap(bound)) for bound in (start, stop, step)))


def _is_block(value):
    return isinstance(value, tl.tensor) and value.type.is_block()


def _logical(left, right, method):
    """Evaluate `left and right` or `left or right`, where `right` is a thunk, elementwise on blocks.

    Stock: evaluates them as Python does, which returns one of the blocks.
    """
    if _is_block(left):
        return getattr(left, method)(right())
    decided = bool(left) == (method == "logical_or")
    if decided:
        return left
    return right()


def _logical_not(value):
    return value.__not__() if _is_block(value) else not value


def _assigned(value):
    """Return the value that a variable has after an assignment: numbers become scalar tensors."""
    return value if type(value) is tl.tensor else semantic.to_tensor(value, False)


class _Rewriter(ast.NodeTransformer):
    """Rewrites assignments, as stock does, and also loops, `and`, `or` and `not`."""

    def visit_Assign(self, node):
        self.generic_visit(node)
        if len(node.targets) > 1:
            raise ValueError("a kernel assigns to one target at a time")
        function = ast.Name(id="_assigned", ctx=ast.Load())
        node.value = ast.Call(func=function, args=[node.value], keywords=[])
        return node

    def visit_For(self, node):
        self.generic_visit(node)
        call = node.iter
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range":
            call.func.id = "_runtime_range"
        return node

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        method = "logical_and" if isinstance(node.op, ast.And) else "logical_or"
        result = node.values[-1]
        for value in reversed(node.values[:-1]):
            no_arguments = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
            thunk = ast.Lambda(args=no_arguments, body=result)
            function = ast.Name(id="_logical", ctx=ast.Load())
            result = ast.Call(func=function, args=[value, thunk, ast.Constant(value=method)], keywords=[])
        return ast.copy_location(result, node)

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        function = ast.Name(id="_logical_not", ctx=ast.Load())
        return ast.copy_location(ast.Call(func=function, args=[node.operand], keywords=[]), node)


def rewrite_functions():
    interpreter.FunctionRewriter.ast_transformer = _Rewriter()
    # Rewritten kernels find these names because stock adds the interpreter module's names to every kernel's module.
    for helper in (_assigned, _runtime_range, _logical, _logical_not):
        setattr(interpreter, helper.__name__, helper)
    interpreter.InterpretedFunction.rewritten_fn.clear()


# ---------------------------------------------------------------- arguments and calls


def _argument(value):
    # Stock: leaves float arguments Python floats (compiled: float32 scalars); 3.6 fails on bool arguments.
    if isinstance(value, bool):
        return _scalar(value, tl.int1)
    if isinstance(value, float):
        return _scalar(value, tl.float32)
    if isinstance(value, tuple):
        return interpreter._tuple_create(value, map(_argument, value))
    return _stock_implicit_cvt(value)


_stock_implicit_cvt = interpreter._implicit_cvt


def _call_device_function(self, *args, **kwargs):
    # Stock: patches the language again at each call, and wraps an error once per level of calls.
    function = self.rewritten_fn.get(self.fn) or self.rewrite()
    return function(*args, **kwargs)


def install():
    bind_language()
    rewrite_functions()
    interpreter._implicit_cvt = _argument
    interpreter.InterpretedFunction.__call__ = _call_device_function
