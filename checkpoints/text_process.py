"""A process of its own for a tokenizer.json that may be anything.

With such a file the `tokenizers` package can take all memory, never end, or abort the process, and a normalizer or a
pattern that does so cannot be told from one that does not. So the package runs beside the program, with limits, and
whatever happens to it is one TextError.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref

if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]  # the project's and the package's folders, as the starting process has them

from checkpoints.text_backend import TextBackend

SECONDS = 5  # of processor time for one request, plus
SECONDS_PER_BYTE = 4e-6  # of the tokenizer.json or text
MEMORY = 1 << 30  # bytes of address space, plus
MEMORY_PER_FILE_BYTE = 24
MEMORY_PER_TEXT_BYTE = 1024
MOST_ANSWER_BYTES = 128 << 20

CHILD_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0"}


class TextError(Exception):
    """Why the package did not answer, in a few words."""


class TextProcess:
    """The methods of TextBackend, run by another process. Each raises TextError, and the next call starts afresh."""

    def __init__(self, data: bytes):
        """Loads the bytes of a tokenizer.json."""
        self._data = data
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        with self._lock:
            self._start()

    def vocab_size(self) -> int:
        return self._ask("vocab_size")

    def token_id(self, token: str) -> int | None:
        return self._ask("token_id", token)

    def token(self, token_id: int) -> str | None:
        return self._ask("token", token_id)

    def encode(self, text: str, plain: bool) -> list[int]:
        return self._ask("encode", text, plain)

    def decode(self, ids: list[int]) -> str:
        return self._ask("decode", ids)

    def later_piece(self, token_id: int) -> str:
        return self._ask("later_piece", token_id)

    def first_piece(self, token_id: int) -> str:
        return self._ask("first_piece", token_id)

    def stream_kind(self) -> str:
        return self._ask("stream_kind")

    def may_spell_byte(self, token_id: int) -> bool:
        return self._ask("may_spell_byte", token_id)

    def _start(self) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *map(os.path.abspath, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | CHILD_ENVIRONMENT,
                start_new_session=True,  # Ctrl-C is for the program, which ends this one
            )
        except OSError as error:
            raise TextError(f"its process cannot be started: {error.strerror}") from None
        self._process = process
        self._end = weakref.finalize(self, _end, process)
        try:
            self._exchange(b"%d %d %d\n%b" % (len(self._data), SECONDS, MEMORY, self._data))
        except TextError:
            if self._process is not None:
                self._stop(patience=0)
            raise

    def _ask(self, method: str, *arguments) -> object:
        with self._lock:
            if self._process is None:
                self._start()
            return self._exchange(json.dumps([method, *arguments]).encode() + b"\n")

    def _exchange(self, request: bytes) -> object:
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # such as Ctrl-C: the answer must not be taken for that of the next request
            self._stop(patience=0)
            raise
        if not line.endswith(b"\n"):
            raise TextError(_how_it_ended(self._stop(patience=10)))
        answer = json.loads(line)
        if "error" in answer:
            raise TextError(answer["error"])
        return answer["value"]

    def _stop(self, patience: float) -> int:
        """Ends the process and returns its exit code, its own if it has ended by itself within `patience` seconds."""
        process, self._process = self._process, None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        self._end()
        return process.returncode


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # of bytes that were never read
            pipe.close()


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "the tokenizers package takes too long over it"
    if code in (-signal.SIGABRT, -signal.SIGSEGV):
        return "the tokenizers package needs too much memory for it"
    return f"the tokenizers package ended with exit code {code}"


def _serve() -> None:
    """Answers requests on stdin, one line of JSON each, until it is closed."""
    _limit(resource.RLIMIT_CORE, 0)
    size, seconds, memory = map(int, sys.stdin.buffer.readline().split())
    memory += MEMORY_PER_FILE_BYTE * size
    _allow(seconds + SECONDS_PER_BYTE * size, memory)
    backend = None

    def load() -> None:
        nonlocal backend
        backend = TextBackend.load(sys.stdin.buffer.read(size))

    _answer(load)
    for line in sys.stdin.buffer:
        _allow(seconds + SECONDS_PER_BYTE * len(line), memory + MEMORY_PER_TEXT_BYTE * len(line))
        method, *arguments = json.loads(line)
        _answer(lambda method=method, arguments=arguments: getattr(backend, method)(*arguments))


def _allow(seconds: float, memory: int) -> None:
    """Limits the processor time from now on, and the address space in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)
    _limit(resource.RLIMIT_AS, memory)


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answer(work) -> None:
    try:
        answer = json.dumps({"value": work()})
    except BaseException as error:  # noqa: BLE001 - a panic is a BaseException, and nobody else is here to see it
        answer = json.dumps({"error": (str(error).splitlines() or [type(error).__name__])[0][:300]})
    if len(answer) > MOST_ANSWER_BYTES:
        answer = json.dumps({"error": f"an answer of {len(answer)} bytes"})
    sys.stdout.write(answer + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
