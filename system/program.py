"""Handle the signals that end a program, and standard streams that may be closed, full or disconnected.

command_line.run.run_main does both around a script's main. This module imports nothing that is slow or may be missing.
"""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from system.errors import InputError

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT_SECONDS = 1.0


@contextlib.contextmanager
def replaced_handlers(handlers: Mapping[int, Any], replacement: Callable) -> Iterator[None]:
    """Replace the handlers of these signals in the body, and restore them after it."""
    try:
        for number in handlers:
            signal.signal(number, replacement)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[list[int]]:
    """Make each of ENDING_SIGNALS raise KeyboardInterrupt in the body. Give the list of the signals received so far.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. Signals that follow within REPEAT_SECONDS, as
    when a terminal closes, are only recorded, because they would interrupt the cleanup that the first one started.
    """
    received: list[int] = []
    last = -REPEAT_SECONDS

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        received.append(number)
        if time.monotonic() - last >= REPEAT_SECONDS:
            last = time.monotonic()
            raise KeyboardInterrupt

    defaults = (signal.SIG_DFL, signal.default_int_handler)
    handlers = {n: signal.getsignal(n) for n in ENDING_SIGNALS if signal.getsignal(n) in defaults}
    with replaced_handlers(handlers, handle):
        yield received


@contextlib.contextmanager
def signals_deferred() -> Iterator[Callable[[], None]]:
    """Defer signals that have a handler in the body. Give a function that runs the handler of one received since.

    An exception from a signal's handler would reach the code that runs at that moment, and torch may mistake it for an
    error of a tensor.
    """
    pending: list[int] = []

    def check() -> None:
        if pending:
            number = pending.pop(0)
            handlers[number](number, None)

    handlers = {n: signal.getsignal(n) for n in ENDING_SIGNALS if callable(signal.getsignal(n))}
    with replaced_handlers(handlers, lambda number, _: pending.append(number)):
        yield check


def signal_exit_code(received: list[int]) -> int:
    """Return a shell's exit code for a program that the first of these signals ended, or Ctrl-C if there is none."""
    return 128 + (received[0] if received else signal.SIGINT)


class Stdout(io.FileIO):
    """Turns the system's first error into an InputError (BrokenPipeError stays) and discards later output."""

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
    """Ignores errors, as a message that cannot be written must not cost the work that it is about."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


@contextlib.contextmanager
def standard_streams() -> Iterator[Callable[[], None]]:
    """Make sys.stdout and sys.stderr use Stdout and Stderr in the body, even if they were closed.

    Give a function that flushes stdout and raises its first error. Streams that are not the process's own, as in tests,
    are not replaced.
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
    """Open /dev/null at those of descriptors 0 to 2 that are closed, so that no file gets their numbers."""
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
    """Return a text stream on `raw` that encodes and buffers like another stream, if one is given."""
    if like is not None:
        options = {
            "encoding": like.encoding,
            "errors": "backslashreplace",  # a model may write characters that the terminal cannot show
            "line_buffering": like.line_buffering,
            "write_through": like.write_through,
        } | options
    return io.TextIOWrapper(io.BufferedWriter(raw), **options)
