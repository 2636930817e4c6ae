"""Launch grids, and report their memory accesses to the scheduler and the race detector."""

import contextlib
import dataclasses
import inspect
import random
import threading
from contextvars import ContextVar

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from interpreter import races
from interpreter.scheduler import Grid
from system.errors import ModelInUse
from system.turns import LAUNCHING

Builder = interpreter.InterpreterBuilder
_DEADLOCK_LIMIT = 1000


@dataclasses.dataclass
class Simulation:
    """The settings of launches and their results, see simulate."""

    random: random.Random
    detect_races: bool
    deadlock_limit: int | None
    watch: dict
    races: list = dataclasses.field(default_factory=list)
    switches: int = 0


_simulation = ContextVar("_simulation", default=None)  # one per thread


@contextlib.contextmanager
def simulate(seed=0, detect_races=False, deadlock_limit=_DEADLOCK_LIMIT, watch=None):
    """Configure this thread's launches inside the `with` block, and give a Simulation.

    seed: determines the order in which programs take turns.
    detect_races: fill `.races` with one line for each pair of code locations whose accesses race. The memory of tensors
        passed to the launch, also inside tuples, and of those in `watch` is observed.
    deadlock_limit: raise GridDeadlock when each live program has polled that often while nothing changed memory; None
        means never, for kernels that bound their own spinning.
    watch: {name: tensor, or a tuple, list or dict of tensors} that kernels reach through a table of addresses.
    """
    simulation = Simulation(random.Random(seed), detect_races, deadlock_limit, watch or {})
    token = _simulation.set(simulation)
    try:
        yield simulation
    finally:
        _simulation.reset(token)


class _Executor(interpreter.GridExecutor):
    """Runs a grid's programs concurrently.

    Stock: runs programs one after another, and copies every argument's storage onto itself after a launch.
    """

    def __call__(self, *args, **kwargs):
        _run_together([self.prepare(*args, **kwargs)])

    def prepare(self, *args, **kwargs):
        """Return (arguments by name, shape of the grid, what each program calls)."""
        parameters = inspect.signature(self.fn).parameters
        kwargs = {name: value for name, value in kwargs.items() if name in parameters}
        for hook in self.pre_run_hooks:
            hook(*args, **kwargs)
        arguments = inspect.getcallargs(self.fn, *args, **kwargs)
        for name, value in arguments.items():
            for tensor_name, tensor in races.named_tensors(name, value):
                if tensor.device.type != "cpu":
                    raise RuntimeError(f"interpreted kernels take CPU tensors, and {tensor_name} is on {tensor.device}")
        shape = self.grid(arguments) if callable(self.grid) else self.grid
        shape = tuple(int(extent) for extent in shape)
        shape += (1,) * (3 - len(shape))
        converted = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in arguments.items()
        }
        return arguments, shape, lambda: self.fn(**converted)


def _run_together(prepared):
    """Run the programs of prepared launches concurrently, to their end."""
    simulation = _simulation.get() or Simulation(random.Random(0), False, _DEADLOCK_LIMIT, {})
    grid = Grid([launch[1:] for launch in prepared], simulation.random, simulation.deadlock_limit)
    if simulation.detect_races:
        named = [arguments for arguments, _, _ in prepared]
        if len(named) > 1:
            named = [{f"launch {n}: {name}": value for name, value in each.items()} for n, each in enumerate(named)]
        watched = {name: value for each in named for name, value in each.items()} | simulation.watch
        grid.detector = races.RaceDetector(watched, len(grid.programs), simulation.races)
    try:
        grid.run()
    finally:
        simulation.switches += grid.switches


def launch_together(launches):
    """Run several launches at the same time, as several GPUs do, and return when all have ended.

    launches: (kernel, grid, arguments, options) of each, as in kernel[grid](*arguments, **options). Programs are
    numbered through all launches. Raises what the first failing program raises, ModelInUse amid another launch.
    """
    with _exclusive_launch():
        _run_together(
            [
                _Executor(kernel.rewrite(), kernel.arg_names, grid, kernel.pre_run_hooks).prepare(*arguments, **options)
                for kernel, grid, arguments, options in launches
            ]
        )


@contextlib.contextmanager
def _exclusive_launch():
    """Refuse launches from within launches, and make those of other threads wait."""
    if (active := Grid.active) is not None and active.runs_in(threading.current_thread()):
        raise ModelInUse("a kernel launches another one")
    with LAUNCHING:
        if Grid.active is not None:
            raise ModelInUse("a kernel is launched in the middle of a launch, as by a signal handler")
        yield


def _run(self, *args, grid, warmup, **kwargs):
    # Stock: launches of several threads share the interpreter's global state, such as the program's index.
    if warmup:
        return
    with _exclusive_launch():
        _stock_run(self, *args, grid=grid, warmup=warmup, **kwargs)


_stock_run = interpreter.InterpretedFunction.run


# ---------------------------------------------------------------- memory operations

_stock_load = Builder.create_masked_load
_stock_store = Builder.create_masked_store
_stock_rmw = Builder.create_atomic_rmw
_stock_cas = Builder.create_atomic_cas

_UNCHANGED = {
    ir.ATOMIC_OP.ADD: lambda old, value: value == 0,
    ir.ATOMIC_OP.FADD: lambda old, value: value == 0,
    ir.ATOMIC_OP.OR: lambda old, value: old | value == old,
    ir.ATOMIC_OP.AND: lambda old, value: old & value == old,
    ir.ATOMIC_OP.XOR: lambda old, value: value == 0,
    ir.ATOMIC_OP.XCHG: lambda old, value: old == value,
    ir.ATOMIC_OP.MAX: lambda old, value: value <= old,
    ir.ATOMIC_OP.UMAX: lambda old, value: value <= old,
    ir.ATOMIC_OP.MIN: lambda old, value: value >= old,
    ir.ATOMIC_OP.UMIN: lambda old, value: value >= old,
}


def _width(pointer_handle):
    return max(1, pointer_handle.get_element_ty().primitive_bitwidth // 8)


def _load(self, pointers, mask, other, *policy, **options):
    grid = Grid.active
    is_volatile = options.get("is_volatile", policy[-1] if policy else False) is True
    if grid is not None:
        if is_volatile:
            grid.switch()
        if grid.detector is not None:
            access_type = races.VOLATILE_LOAD if is_volatile else races.LOAD
            grid.detector.access(access_type, grid.running.number, pointers.data, mask.data, _width(pointers))
    return _stock_load(self, pointers, mask, other, *policy, **options)


def _store(self, pointers, value, mask, *policy):
    grid = Grid.active
    if grid is not None:
        grid.memory_changed()
        if grid.detector is not None:
            # A store that is written through may meet volatile loads, as an atomic's may.
            access_type = races.ATOMIC if ir.CACHE_MODIFIER.WT in policy else races.STORE
            grid.detector.access(access_type, grid.running.number, pointers.data, mask.data, _width(pointers))
    return _stock_store(self, pointers, value, mask, *policy)


def _store_all(self, pointers, value, *policy):
    # Stock: forgets the policy of a store without a mask.
    mask = interpreter.TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1)
    return self.create_masked_store(pointers, value, mask, *policy)


def _atomic(grid, pointers, mask, semantics, operate, find_changes):
    if grid is None:
        return operate()
    grid.switch()
    old = operate()
    changed = find_changes(old.data)
    if grid.detector is not None:
        program = grid.running.number
        stored = changed is not None
        grid.detector.atomic(program, pointers.data, mask, semantics, stored, _width(pointers))
    if changed:
        grid.memory_changed()
        grid.switch()
    return old


def _atomic_rmw(self, operation, pointers, value, mask, semantics, scope):
    lanes = mask.data

    def memory_changes(old):
        return bool((lanes & ~_UNCHANGED[operation](old, value.data)).any())

    return _atomic(
        Grid.active,
        pointers,
        lanes,
        semantics,
        lambda: _stock_rmw(self, operation, pointers, value, mask, semantics, scope),
        memory_changes,
    )


def _atomic_cas(self, pointers, expected, value, semantics, scope):
    def memory_changes(old):
        swapped = old == expected.data
        if not swapped.any():
            return None
        return bool((swapped & (old != value.data)).any())

    return _atomic(
        Grid.active,
        pointers,
        None,
        semantics,
        lambda: _stock_cas(self, pointers, expected, value, semantics, scope),
        memory_changes,
    )


def install():
    interpreter.InterpretedFunction.run = _run
    interpreter.GridExecutor = _Executor
    Builder.create_masked_load = _load
    Builder.create_masked_store = _store
    Builder.create_store = _store_all
    Builder.create_atomic_rmw = _atomic_rmw
    Builder.create_atomic_cas = _atomic_cas
