"""Prepare the process for NumPy, PyTorch and Triton; scripts import this module before anything else.

It sets what these libraries read when they are imported or define a kernel. In a script of this project it also
answers --help and refuses a wrong command line before these libraries, which take seconds, are imported; it reports a
failing import in one line, and lets Ctrl-C end the imports quietly. A process that only imports the project keeps its
own hooks. command_line.run.run_main takes over once a script's main begins.
"""

import os
import signal
import sys
from pathlib import Path
from types import TracebackType

from command_line.run import run_main
from command_line.scripts import SCRIPTS, arguments
from system.errors import EXIT_INPUT_ERROR
from system.program import open_descriptors

ROOT = Path(__file__).resolve().parent.parent


def _running_script() -> str | None:
    """Return the path below the root of the file of the root, of tools/ or of multi_gpu/ that this process runs."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    path = None if file is None else Path(file).resolve()
    is_script = path is not None and path.parent in (ROOT, ROOT / "tools", ROOT / "multi_gpu")
    return path.relative_to(ROOT).as_posix() if is_script else None


def _report(error_type: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report an uncaught exception: one line if the user's environment lacks something, else a traceback."""
    if not isinstance(error, (ImportError, OSError)):
        sys.__excepthook__(error_type, error, traceback)
        return
    hint = "; `make run` sets up .venv, which has all packages" if isinstance(error, ModuleNotFoundError) else ""
    try:
        print(f"error: {str(error).splitlines()[0]}{hint}", file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = None  # Python would flush it again at exit, and fail again
    raise SystemExit(EXIT_INPUT_ERROR)


def _prepare_libraries() -> None:
    """Set what each library reads when it is imported, in the order in which they are."""
    # For NumPy: interpreted blocks are too small for threads; 65 ms per token instead of 270.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from host.devices import gpu_runs_kernels

    if not gpu_runs_kernels():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it defines a kernel

    from host import compilers, shared_memory

    compilers.quiet_compilers()
    shared_memory.install()


if script := _running_script():
    open_descriptors()
    sys.excepthook = _report
    # A shell may start background scripts with SIGINT ignored. run_main later installs its own handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if script in SCRIPTS and (code := run_main(lambda: arguments(script))):  # main parses the same words again
        sys.exit(code)
_prepare_libraries()
