"""Serve an application on a socket until a signal comes, and let the running answer finish then."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from endpoint.worker import Worker
from system.errors import InputError
from system.program import ENDING_SIGNALS, replaced_handlers

POLL_SECONDS = 0.02
FLUSH_SECONDS = 5  # that a client may take to read the end of its answer, once the server ends
THREAD_SECONDS = 10.0  # that a token, or a long prompt, may take to end then


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet. Raise InputError if it cannot be; port 0 is a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--host {host} --port {port}: {reason}") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """Return a socket's address, as a client writes it."""
    host, port, *_ = bound.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves one application. `drain` ends it."""

    def __init__(self, app: Starlette, worker: Worker, on_ready: Callable[[], None], drain_seconds: float):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="error",
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._worker, self._on_ready, self._drain_seconds = worker, on_ready, drain_seconds
        self._drain: asyncio.Task | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to serve_until_signal."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def drain(self) -> None:
        """Refuse requests, and end once the running answer does or its time is over. Called again, end at once."""
        if self._drain is None:
            self._worker.close()
            self._drain = asyncio.get_running_loop().create_task(self._end_when_idle())
        else:
            self._worker.cancel_running()

    async def _end_when_idle(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle(), self._drain_seconds)
        self._worker.cancel_running()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle(), THREAD_SECONDS)
        self.should_exit = True

    async def _idle(self) -> None:
        while not self._worker.is_idle:
            await asyncio.sleep(POLL_SECONDS)


def serve_until_signal(server: Server, bound: socket.socket) -> int | None:
    """Serve until one of ENDING_SIGNALS has come and the running answer has ended. Return the signal."""
    received: list[int] = []

    async def serve() -> None:
        loop = asyncio.get_running_loop()

        def on_signal(number: int, _frame: object) -> None:
            received.append(number)
            loop.call_soon_threadsafe(server.drain)

        handlers = {n: signal.getsignal(n) for n in ENDING_SIGNALS if callable(signal.getsignal(n))}
        with replaced_handlers(handlers, on_signal):
            await server.serve([bound])

    asyncio.run(serve())
    return received[0] if received else None
