"""Run a script's main, and say by one line and the exit code how it ended."""

import errno
import sys
from collections.abc import Callable

from system.errors import EXIT_INPUT_ERROR, InputError, MegakernelAborted, RunsDiffer, printable
from system.program import signal_exit_code, signals_as_interrupts, standard_streams

EXIT_FAILURE = 1
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
NO_THREAD = "can't start new thread"  # the text of Python's RuntimeError
# RuntimeErrors that mean out of memory: on a GPU, on a CPU, for pinned memory, files and threads.
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "Cannot allocate memory", NO_THREAD)


def run_main(main: Callable[[], None]) -> int:
    """Call `main` and return the process's exit code. system.program says how signals and streams behave meanwhile.

    The code is 0 on success; 2 after an InputError, without enough memory, or if a file or stdout could not be written;
    1 if the kernel gave up or runs that must agree differ; 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP; 141 if the
    reader of stdout is gone. An error is printed as one line on stderr. If stderr cannot be written, the exit code
    still tells the outcome.
    """
    with signals_as_interrupts() as signals, standard_streams() as check_stdout:
        code = _exit_code(check_stdout, signals)  # stdout may be closed from the start
        if code:
            return code
        try:
            code = _exit_code(main, signals)
        except SystemExit:  # --help raises it, for example
            code = _exit_code(check_stdout, signals)
            if code:
                return code
            raise
        return code or _exit_code(check_stdout, signals)


def _exit_code(call: Callable[[], None], signals: list[int]) -> int:
    """Make a call, print its error if it raises one, and return the exit code. `signals` lists those received."""
    try:
        call()
        return 0
    except InputError as error:
        _print_error(str(error))
        return EXIT_INPUT_ERROR
    except (MegakernelAborted, RunsDiffer) as error:
        _print_error(str(error))
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return signal_exit_code(signals)
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return EXIT_INPUT_ERROR
    except Exception as error:  # a library may have turned a KeyboardInterrupt into another exception
        if signals:
            return signal_exit_code(signals)
        if str(error) == NO_THREAD:
            _print_error(f"{error}: the limit on this user's processes, or memory, is reached")
            return EXIT_INPUT_ERROR
        if not _is_out_of_memory(error):
            raise
        _print_error(f"not enough memory: {(str(error).splitlines() or ['the system gives no more'])[0]}")
        return EXIT_INPUT_ERROR


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that memory could not be allocated."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def _print_error(message: str) -> None:
    print(f"error: {printable(message)}", file=sys.stderr)
