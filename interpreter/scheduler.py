"""Run the programs of a grid concurrently: one thread per program, of which one runs at a time, in a seeded order.

The running program may lose its turn at every atomic and every volatile load.
"""

import contextlib
import os
import signal
import sys
import threading

import numpy as np
import triton
from triton.runtime import interpreter

from system.program import replaced_handlers

_SKIPPED_FOLDERS = (os.path.dirname(triton.__file__), os.path.dirname(np.__file__), os.path.dirname(__file__))


class GridDeadlock(RuntimeError):
    """All live programs of a grid spin on values that none of them will change. The message says where each one is."""


class _ProgramEnded(BaseException):
    """Unwinds the other programs of a grid after one of them failed."""


def kernel_sites(frame):
    """Return ((file, line), ...) of the kernel code that a frame is in, innermost first."""
    sites = []
    while frame is not None and frame.f_code is not Grid._program_main.__code__:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED_FOLDERS):
            sites.append((name, frame.f_lineno))
        elif frame.f_code is Grid.run.__code__:
            break
        frame = frame.f_back
    return tuple(sites)


def describe_sites(sites):
    """Return sites as text, for example 'barrier.py:12, called from kernel.py:240'."""
    return ", called from ".join(f"{os.path.basename(name)}:{line}" for name, line in sites) or "no kernel code"


_SIGNALS = [int(number) for number in signal.valid_signals()]


@contextlib.contextmanager
def interrupts_to(fail):
    """Pass what a signal's handler raises in the body to `fail`, as the exception could leave a lock held forever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}

    def handle(number, frame):
        try:
            handlers[number](number, frame)
        except BaseException as error:  # noqa: BLE001 (it is raised after the grid has stopped)
            fail(error)

    with replaced_handlers(handlers, handle):
        yield


class _Program:
    __slots__ = ("body", "grid_index", "grid_shape", "idle_turns", "number", "seen_version", "shared", "thread", "turn")

    def __init__(self, number, grid_index, grid_shape, body):
        self.number = number
        self.grid_index = grid_index
        self.grid_shape = grid_shape
        self.body = body
        self.thread = None
        self.turn = threading.Lock()
        self.turn.acquire()
        self.idle_turns = 0
        self.seen_version = -1


class Grid:
    """The programs of one launch, or of several that run at the same time, as on several GPUs.

    launches: (shape, body) of each; all its programs call its body.

    A program's turn is *idle* if no program has changed memory since its last one. A program with two idle turns in a
    row is polling, and is skipped until memory changes, unless all live programs are polling. It is a deadlock if every
    live program has had `deadlock_limit` idle turns in a row and none has changed memory. A loop that polls a bounded
    number of times is no deadlock, but looks like one from outside; for such loops raise the limit or set it to None.
    """

    active = None

    def __init__(self, launches, random, deadlock_limit):
        self.builder = interpreter.interpreter_builder
        self.random = random
        self.deadlock_limit = deadlock_limit
        places = ((index, shape, body) for shape, body in launches for index in np.ndindex(*shape))
        self.programs = [_Program(number, *place) for number, place in enumerate(places)]
        self.live = list(self.programs)
        self.running = None
        self.version = 0
        self.switches = 0
        self.detector = None
        self.error = None
        self.aborting = False
        self.finished = threading.Lock()

    def run(self):
        """Run all programs to their end, and raise the exception of the first one that fails. Only one grid may run."""
        try:
            Grid.active = self
            if len(self.programs) == 1:
                self._enter(self.programs[0])
                with np.errstate(all="ignore"):
                    self.running.body()
            elif self.programs:
                self._run_threads()
        finally:
            Grid.active = None

    def runs_in(self, thread):
        """Return whether a thread is that of the running program; a grid of one program has no thread of its own."""
        return getattr(self.running, "thread", None) is thread

    def _run_threads(self):
        with interrupts_to(self._fail):
            self.finished.acquire()
            self._give_turn(self._choose())
            self.finished.acquire()
            for program in self.programs:
                if program.thread is not None:
                    program.thread.join()
        if self.error is not None:
            raise self.error

    def _fail(self, error):
        """Record an error and stop every program at its next switch or before it starts."""
        if self.error is None:
            self.error = error
        self.aborting = True

    def _program_main(self, program):
        try:
            if not self.aborting:
                with np.errstate(all="ignore"):
                    program.body()
        except _ProgramEnded:
            pass
        except BaseException as error:  # noqa: BLE001 (the launcher raises it)
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"in program {program.grid_index}")
            self._fail(error)
        self.live.remove(program)
        self._pass_on()

    def _pass_on(self):
        """Give the turn to another program after the running one has ended."""
        while True:
            if self.aborting:
                self.live = [other for other in self.live if other.thread is not None]
            if not self.live:
                self.finished.release()
                return
            try:
                self._give_turn(self._choose())
                return
            except Exception as error:  # noqa: BLE001 (no thread could be started; the launcher raises it)
                self._fail(error)

    def _enter(self, program):
        self.running = program
        self.builder.set_grid_dim(*program.grid_shape)
        self.builder.grid_idx = program.grid_index

    def _give_turn(self, program):
        self._enter(program)
        if program.thread is None:
            try:
                program.thread = threading.Thread(target=self._program_main, args=(program,), daemon=True)
                program.thread.start()
            except (RuntimeError, MemoryError):  # there are too many threads: no one must wait for this one
                program.thread = None
                raise
        else:
            program.turn.release()

    def _choose(self):
        version = self.version
        useful = [p for p in self.live if p.idle_turns < 2 or p.seen_version != version]
        candidates = useful or self.live
        return candidates[int(self.random.random() * len(candidates))]

    def switch(self):
        """Let another program run instead of the calling one, and return when the caller has the turn again."""
        if self.aborting:
            raise _ProgramEnded
        program = self.running
        self.switches += 1
        if program.seen_version == self.version:
            program.idle_turns += 1
            if self.deadlock_limit is not None and program.idle_turns >= self.deadlock_limit:
                self._check_deadlock()
        else:
            program.idle_turns = 0
            program.seen_version = self.version
        chosen = self._choose()
        if chosen is not program:
            self._give_turn(chosen)
            program.turn.acquire()
            if self.aborting:
                raise _ProgramEnded

    def memory_changed(self):
        self.version += 1

    def _check_deadlock(self):
        if any(p.seen_version != self.version or p.idle_turns < self.deadlock_limit for p in self.live):
            return
        frames = sys._current_frames()
        places = []
        for program in sorted(self.live, key=lambda p: p.number):
            ident = threading.get_ident() if program is self.running else program.thread.ident
            places.append(f"program {program.grid_index} at {describe_sites(kernel_sites(frames[ident]))}")
        ended = len(self.programs) - len(self.live)
        raise GridDeadlock(
            f"deadlock: nothing changed memory while each live program polled {self.deadlock_limit} times: "
            + "; ".join(places)
            + (f"; {ended} of {len(self.programs)} programs have ended" if ended else "")
        )
