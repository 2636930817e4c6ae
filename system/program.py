"""What surrounds a program's work: the signals that end it, and standard streams that may be closed, full or gone.

host.cli.run_main puts both around a script's main. Imports nothing that takes long or may be missing.
"""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from system.errors import InputError

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT_SECONDS = 1.0


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[list[int]]:
    """In the body each of ENDING_SIGNALS raises KeyboardInterrupt; gives the list of those that came.

    One that is ignored, as nohup leaves SIGHUP, stays ignored. Those that follow within REPEAT_SECONDS, as from a
    terminal that closes, are noted only: they would break into the cleaning up that the first one began.
    """
    came: list[int] = []
    last = -REPEAT_SECONDS

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        came.append(number)
        if time.monotonic() - last >= REPEAT_SECONDS:
            last = time.monotonic()
            raise KeyboardInterrupt

    usual = (signal.SIG_DFL, signal.default_int_handler)
    handlers = {n: signal.signal(n, handle) for n in ENDING_SIGNALS if signal.getsignal(n) in usual}
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_deferred() -> Iterator[Callable[[], None]]:
    """In the body signals that have a handler interrupt nothing: a call of the function that this gives handles them.

    An exception out of a signal's handler reaches whatever runs then; torch may take it for one of a tensor's.
    """
    came: list[int] = []

    def check() -> None:
        if came:
            number = came.pop(0)
            handlers[number](number, None)

    handlers = {n: signal.getsignal(n) for n in ENDING_SIGNALS if callable(signal.getsignal(n))}
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: came.append(number))
        yield check
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def signal_exit_code(came: list[int]) -> int:
    """A shell's for a program that the first of these signals ended; without any that of Ctrl-C."""
    return 128 + (came[0] if came else signal.SIGINT)


class Stdout(io.FileIO):
    """Turns the system's first error into an InputError, but for BrokenPipeError, and takes no more after it."""

    failure: Exception | None = None

    def write(self, data) -> int | None:
        if self.failure:
            return len(data)
        try:
            return super().write(data)
        except BrokenPipeError as error:
            self.failure = error
            raise
        except OSError as error:
            self.failure = InputError(f"stdout: {error.strerror}")
            raise self.failure from None


class Stderr(io.FileIO):
    """Passes over what cannot be written: a message that is lost must not cost the work that it is about."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


@contextlib.contextmanager
def standard_streams() -> Iterator[Callable[[], None]]:
    """In the body sys.stdout and sys.stderr work as Stdout and Stderr say, also where they were closed.

    Gives a function that raises what was, or is now, wrong with stdout. Streams that are not the process's own, as in
    tests, are left alone.
    """
    open_descriptors()
    before = sys.stdout, sys.stderr
    raw = Stdout(1, "w", closefd=False)
    if sys.stdout is None:
        raw.failure = InputError("stdout: is closed")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(raw, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(Stderr(2, "w", closefd=False), sys.stderr, errors="backslashreplace", line_buffering=True)

    def check_stdout() -> None:
        sys.stdout.flush()
        if raw.failure:
            raise raw.failure

    try:
        yield check_stdout
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(InputError, OSError):
                stream.flush()
        sys.stdout, sys.stderr = before


def open_descriptors() -> None:
    """Descriptors 0 to 2 that are closed become /dev/null, so that no file gets their numbers."""
    for descriptor in (0, 1, 2):
        if not _is_open(descriptor):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            if null != descriptor:
                os.close(null)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _text(raw: io.FileIO, like: io.TextIOWrapper | None, **options) -> io.TextIOWrapper:
    """A text stream on `raw` that encodes and buffers as another one does."""
    if like is not None:
        options = {
            "encoding": like.encoding,
            "errors": "backslashreplace",  # a model may write what the terminal cannot show
            "line_buffering": like.line_buffering,
            "write_through": like.write_through,
        } | options
    return io.TextIOWrapper(io.BufferedWriter(raw), **options)
