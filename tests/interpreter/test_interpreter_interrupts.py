"""Interrupts and threads that cannot start, while interpreted programs run concurrently: the launch ends anyway."""

import os
import signal
import threading

import pytest
import torch
import triton
import triton.language as tl

from interpreter.scheduler import Grid

PROGRAMS, TURNS = 3, 20
LIMIT = 30  # seconds until a launch that hangs is a failure


@triton.jit
def count_kernel(counter_ptr, TURNS: tl.constexpr):
    for _ in range(TURNS):
        tl.atomic_add(counter_ptr, 1)


def count() -> int:
    counter = torch.zeros(1, dtype=torch.int32)
    count_kernel[(PROGRAMS,)](counter, TURNS)
    return counter.item()


def hang(*_):
    raise TimeoutError("the launch hangs")


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Assert that no thread, lock or handler is left behind."""
    threads = threading.active_count()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(LIMIT)
    try:
        yield
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        assert threading.active_count() == threads
        assert count() == PROGRAMS * TURNS
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class LateLock:
    """A lock whose second acquire, which waits for the last program, is interrupted once it has succeeded."""

    def __init__(self):
        self.lock, self.acquired = threading.Lock(), 0

    def acquire(self):
        self.lock.acquire()
        self.acquired += 1
        if self.acquired == 2:
            signal.raise_signal(signal.SIGINT)

    def release(self):
        self.lock.release()


@pytest.mark.parametrize("when", ["before it starts", "after it started"])
def test_an_interrupt_beside_the_first_programs_start(when, monkeypatch):
    class Thread(threading.Thread):
        def start(self):
            first = threading.current_thread() is threading.main_thread()
            if first and when == "before it starts":
                signal.raise_signal(signal.SIGINT)
            super().start()
            if first and when == "after it started":
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", Thread)
        with pytest.raises(KeyboardInterrupt):
            count()


def test_what_another_signals_handler_raises(monkeypatch):
    """An exception of another handler ends the launch like Ctrl-C's, and the earlier handlers are restored."""
    switch, sent = Grid.switch, []

    def handler(*_):
        raise ZeroDivisionError

    def signalled(grid):
        if not sent and grid.switches > PROGRAMS * TURNS // 2:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGUSR1)
        switch(grid)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Grid, "switch", signalled)
            with pytest.raises(ZeroDivisionError):
                count()
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def interrupted_switch(monkeypatch):
    """Interrupt once, in the thread of a program."""
    switch, sent = Grid.switch, []

    def interrupted(grid):
        if not sent and grid.switches > PROGRAMS * TURNS // 2:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        switch(grid)

    with monkeypatch.context() as patch:
        patch.setattr(Grid, "switch", interrupted)
        yield
        assert sent


def test_an_interrupt_while_programs_run(interrupted_switch):
    with pytest.raises(KeyboardInterrupt):
        count()


def test_an_interrupt_when_the_last_program_has_ended(monkeypatch):
    run = Grid._run_threads

    def run_with_late_lock(grid):
        grid.finished = LateLock()
        run(grid)

    with monkeypatch.context() as patch:
        patch.setattr(Grid, "_run_threads", run_with_late_lock)
        with pytest.raises(KeyboardInterrupt):
            count()


def test_a_handler_that_raises_nothing_stops_nothing(interrupted_switch):
    calls = []
    signal.signal(signal.SIGINT, lambda *call: calls.append(call))
    assert count() == PROGRAMS * TURNS
    assert calls
    signal.signal(signal.SIGINT, signal.default_int_handler)


@triton.jit
def store_kernel(x_ptr):
    tl.store(x_ptr + tl.program_id(0), 1)


def store() -> None:
    """Run programs that end without having given up their turn."""
    store_kernel[(PROGRAMS,)](torch.zeros(PROGRAMS, dtype=torch.int32))


@pytest.mark.parametrize("launch", [count, store])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
@pytest.mark.parametrize("started", range(PROGRAMS))
def test_a_thread_too_many_ends_the_launch(started, error, launch, monkeypatch):
    """A number of programs get a thread, the next one gets none."""
    had = []

    class Thread(threading.Thread):
        def start(self):
            if len(had) == started:
                raise error("can't start new thread")
            had.append(self)
            super().start()

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", Thread)
        with pytest.raises(error, match="can't start new thread"):
            launch()


def test_a_launch_outside_the_main_thread():
    """Only the main thread has signal handlers."""
    found = []
    thread = threading.Thread(target=lambda: found.append(count()))
    thread.start()
    thread.join(LIMIT)
    assert found == [PROGRAMS * TURNS]
