"""One thread that uses the model, and the line of requests that wait for it."""

import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator

from endpoint.errors import SERVER, ApiError, draining
from host.answers import Event, Order, PromptTooLong, answer
from system.errors import InputError, MegakernelAborted, printable

RETRY_SECONDS = range(1, 61)  # that a refused client is told to wait


class Cancelled(Exception):
    """Nobody wants the answer any more."""


class Job:
    """An answer that somebody waits for."""

    def __init__(self, order: Order, emit: Callable[[Event | ApiError], None]):
        """emit: is called with each event, from any thread; Finished or an ApiError is the last one."""
        self.order, self.emit = order, emit
        self.is_cancelled = False
        self.end_error: ApiError | None = None  # what a client that still waits is told about it

    def check_wanted(self) -> None:
        """Raise Cancelled if the job was cancelled."""
        if self.is_cancelled:
            raise Cancelled


class Worker:
    """Answers one job after another, in the order in which they came."""

    def __init__(self, model, tokenizer, max_waiting: int):
        """model: host.decoder.Decoder. max_waiting: jobs that may wait besides the one that runs."""
        self._model, self._tokenizer, self._max_waiting = model, tokenizer, max_waiting
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._is_closed = False
        self._last_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether new jobs are refused."""
        return self._is_closed

    @property
    def n_jobs(self) -> int:
        """The number of jobs that run or wait."""
        with self._changed:
            return len(self._waiting) + (self._running is not None)

    @property
    def is_idle(self) -> bool:
        """Whether no job runs or waits."""
        return self.n_jobs == 0

    def submit(self, job: Job) -> None:
        """Put a job in line. Raise ApiError if the line is full or the worker is closed."""
        with self._changed:
            if self._is_closed:
                raise draining()
            if self.n_jobs > self._max_waiting:
                raise self._too_many()
            self._waiting.append(job)
            self._changed.notify_all()

    def _too_many(self) -> ApiError:
        """Return the refusal, with the time after which a place may be free: what the last answer took."""
        seconds = min(max(round(self._last_seconds), RETRY_SECONDS[0]), RETRY_SECONDS[-1])
        return ApiError(
            429,
            f"{self._max_waiting} requests are waiting already",
            code="queue_full",
            kind="rate_limit_error",
            headers={"Retry-After": str(seconds)},
        )

    def cancel(self, job: Job, error: ApiError | None = None) -> None:
        """Take a job out of the line, or end it at its next token. Its client is told the error, if there is one."""
        with self._changed:
            was_waiting = job in self._waiting
            if was_waiting:
                self._waiting.remove(job)
            job.end_error, job.is_cancelled = error, True
        if was_waiting and error:
            job.emit(error)

    def close(self) -> None:
        """Refuse the jobs that wait and those that come; the running one goes on."""
        with self._changed:
            self._is_closed, waiting = True, list(self._waiting)
            self._changed.notify_all()
        for job in waiting:
            self.cancel(job, draining())

    def cancel_running(self) -> None:
        """End the running job at its next token, or its prompt's next block, if there is one."""
        running = self._running
        if running is not None:
            self.cancel(running, draining())

    def _run(self) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            try:
                self._answer(job)
            finally:
                with self._changed:
                    self._running, self._last_seconds = None, time.monotonic() - start

    def _next(self) -> Job | None:
        """Wait for a job. Return None once the worker is closed."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _answer(self, job: Job) -> None:
        try:
            for events in self._begin(job):
                job.check_wanted()
                for event in events:
                    job.emit(event)
        except Cancelled:
            if job.end_error:
                job.emit(job.end_error)
        except ApiError as error:
            job.emit(error)
        except MegakernelAborted as error:
            _report(str(error))
            self._reset()
            job.emit(_failed("the kernel gave up; the model was reset, so that the request may be sent again"))
        except InputError as error:
            _report(str(error))
            job.emit(_failed("the model failed to answer"))
        except Exception:  # noqa: BLE001 - the next request must find a thread
            traceback.print_exc()
            job.emit(_failed("internal error"))

    def _begin(self, job: Job) -> Iterator[list[Event]]:
        """Return an iterator over an answer's events. Raise ApiError if its prompt is refused."""
        try:
            return answer(self._model, self._tokenizer, job.order, job.check_wanted)[1]
        except PromptTooLong as error:
            raise ApiError(400, str(error), job.order.param, "context_length_exceeded") from None
        except InputError as error:
            raise ApiError(400, str(error), job.order.param) from None

    def _reset(self) -> None:
        """Reset the model. If that fails too, the next job's failure tries it again."""
        try:
            self._model.reset()
        except Exception:  # noqa: BLE001 - as above
            traceback.print_exc()


def _failed(message: str) -> ApiError:
    return ApiError(500, message, code="model_failed", kind=SERVER)


def _report(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"error: {printable(message)}", file=sys.stderr, flush=True)
