"""Ends a reply of the hub that comes too slowly.

The timeouts of the hub's client are for one read each, so that a server that sends a byte a second holds it for ever.
"""

import time

import httpx

REPLY_SECONDS = 30.0  # of waiting for one reply, after which it must have brought LEAST_RATE bytes for each of them
LEAST_RATE = 1024  # bytes a second


class TooSlow(Exception):
    """A reply brought fewer bytes than LEAST_RATE asks for."""


def watch(client: httpx.Client) -> None:
    """From now on the client's new connections raise TooSlow."""
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
    """An httpcore.NetworkStream: what it brings is set against the seconds that reads of it have taken."""

    def __init__(self, stream):
        self._stream = stream
        self._waited = self._received = 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        start = time.monotonic()
        data = self._stream.read(max_bytes, REPLY_SECONDS if timeout is None else min(timeout, REPLY_SECONDS))
        self._waited += time.monotonic() - start
        self._received += len(data)
        if self._waited > REPLY_SECONDS:
            if self._received < LEAST_RATE * REPLY_SECONDS:
                raise TooSlow(f"{self._received} bytes in {self._waited:.0f} s")
            self._waited = self._received = 0
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._waited = self._received = 0  # another request
        self._stream.write(buffer, timeout)

    def start_tls(self, *args, **kwargs) -> "_WatchedStream":
        return _WatchedStream(self._stream.start_tls(*args, **kwargs))

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str):
        return self._stream.get_extra_info(info)
