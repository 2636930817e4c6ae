"""Abort replies of the hub that arrive too slowly.

The timeouts of the hub's client apply to a single read, so a server that sends a byte per second would hold it forever.
"""

import time

import httpx

REPLY_SECONDS = 30.0  # of waiting for a reply, in which it must bring at least MIN_RATE bytes per second
MIN_RATE = 1024  # bytes per second


class TooSlow(Exception):
    """A reply arrived at less than MIN_RATE."""


def watch(client: httpx.Client) -> None:
    """Make a client's new connections raise TooSlow for replies that arrive at less than MIN_RATE."""
    for transport in (client._transport, *client._mounts.values()):
        pool = getattr(transport, "_pool", None)
        backend = getattr(pool, "_network_backend", None)
        if backend is not None and not isinstance(backend, _WatchedBackend):
            pool._network_backend = _WatchedBackend(backend)


class _WatchedBackend:
    """An httpcore.NetworkBackend whose streams are watched."""

    def __init__(self, backend):
        self._backend = backend

    def connect_tcp(self, *args, **kwargs) -> "_WatchedStream":
        return _WatchedStream(self._backend.connect_tcp(*args, **kwargs))

    def connect_unix_socket(self, *args, **kwargs) -> "_WatchedStream":
        return _WatchedStream(self._backend.connect_unix_socket(*args, **kwargs))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


class _WatchedStream:
    """An httpcore.NetworkStream that compares the bytes of a reply with the seconds spent reading it."""

    def __init__(self, stream):
        self._stream = stream
        self._waited = self._received = 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        start = time.monotonic()
        data = self._stream.read(max_bytes, REPLY_SECONDS if timeout is None else min(timeout, REPLY_SECONDS))
        self._waited += time.monotonic() - start
        self._received += len(data)
        if self._waited > REPLY_SECONDS:
            if self._received < MIN_RATE * REPLY_SECONDS:
                raise TooSlow(f"{self._received} bytes in {self._waited:.0f} s")
            self._waited = self._received = 0
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._waited = self._received = 0  # a new request begins
        self._stream.write(buffer, timeout)

    def start_tls(self, *args, **kwargs) -> "_WatchedStream":
        return _WatchedStream(self._stream.start_tls(*args, **kwargs))

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str):
        return self._stream.get_extra_info(info)
