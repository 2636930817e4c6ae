"""Import this first in a script: what goes wrong while its other imports run is then one line, or a quiet end.

For the process's own script only, as it changes how the process ends. See host.cli.run_main for what comes later.
"""

import signal
import sys
from types import TracebackType

from host.errors import EXIT_INPUT_ERROR
from host.program import open_descriptors


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


open_descriptors()
sys.excepthook = _report
# Also where a script's shell has it ignored for what it starts in the background; run_main sets another one.
signal.signal(signal.SIGINT, signal.SIG_DFL)
