"""Correct and extend Triton's CPU interpreter (TRITON_INTERPRET=1): exact numbers, speed, and concurrent grids.

Comments that begin with "Stock:" say what Triton's own interpreter does instead.

os.environ["TRITON_INTERPRET"] = "1"  # before triton or a module with kernels is imported
import interpreter
interpreter.install()
kernel[(8,)](...)  # the eight programs take turns: barriers that spin work

with interpreter.simulate(seed=1, detect_races=True) as simulation:
    kernel[(8,)](...)
assert not simulation.races
"""

import triton

from interpreter.launch import Simulation, launch_together, simulate
from interpreter.scheduler import GridDeadlock
from system.errors import InputError
from system.turns import LAUNCHING

__all__ = ["GridDeadlock", "Simulation", "install", "launch_together", "simulate"]

_KNOWN_VERSIONS = ("3.6.", "3.9.")


def install():
    """Correct and extend the interpreter for the life of the process; a second call does nothing.

    From then on launches of several threads wait for each other, and a launch within a launch raises ModelInUse. Raise
    InputError if this version of Triton is not known, RuntimeError if TRITON_INTERPRET=1 was set too late.
    """
    from triton.runtime import interpreter

    if getattr(interpreter, "_is_patched", False):
        return
    if not triton.__version__.startswith(_KNOWN_VERSIONS):
        known = ", ".join(version + "x" for version in _KNOWN_VERSIONS)
        raise InputError(f"the CPU interpreter knows Triton {known}, not {triton.__version__}")
    if not triton.knobs.runtime.interpret or not isinstance(triton.language.sum, interpreter.InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 before triton or a module with kernels is imported")
    from interpreter import assembly, fast_paths, language, launch, numerics, reductions

    with LAUNCHING:
        if getattr(interpreter, "_is_patched", False):
            return
        numerics.install()
        language.install()
        reductions.install()
        launch.install()
        fast_paths.install()
        assembly.install()
        interpreter._is_patched = True
