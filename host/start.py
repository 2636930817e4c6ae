"""Import this first: it sets what PyTorch, NumPy and Triton read when they are imported or define a kernel.

In a script of this project it also makes what goes wrong during the other imports one line, or a quiet end; a process
that merely imports the project keeps its own ways. See host.cli.run_main for what comes later.
"""

import os
import signal
import sys
from pathlib import Path
from types import TracebackType

from system.errors import EXIT_INPUT_ERROR
from system.program import open_descriptors

ROOT = Path(__file__).resolve().parent.parent


def _is_script_of_ours() -> bool:
    """Whether this process runs a file of the project's root or of tools/."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return path is not None and Path(path).resolve().parent in (ROOT, ROOT / "tools")


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """An excepthook: one line for what the user's environment lacks, a traceback for mistakes of ours."""
    if not isinstance(error, (ImportError, OSError)):
        sys.__excepthook__(kind, error, traceback)
        return
    hint = "; `make run` sets up .venv, which has all packages" if isinstance(error, ModuleNotFoundError) else ""
    try:
        print(f"error: {str(error).splitlines()[0]}{hint}", file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = None  # it would be flushed once more
    raise SystemExit(EXIT_INPUT_ERROR)


def _prepare_libraries() -> None:
    """Set, in this order, what each library reads when it is imported."""
    # NumPy. Interpreted blocks are too small for threads: 65 against 270 ms per token.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from host.devices import gpu_runs_kernels

    if not gpu_runs_kernels():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton, when it defines a kernel

    from host import compilers, shared_memory

    compilers.quiet_compilers()
    shared_memory.install()


if _is_script_of_ours():
    open_descriptors()
    sys.excepthook = _report
    # Also where a script's shell has it ignored for what it starts in the background; run_main sets another one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
_prepare_libraries()
