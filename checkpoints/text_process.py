"""Run the `tokenizers` package in a separate process for a tokenizer.json that is not trusted.

Such a file can make the package take all memory, never end, or abort its process, and a normalizer or pattern that does
so cannot be recognized beforehand. Here the package runs under limits, and each of its failures becomes one TextError.
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
    sys.path[:] = sys.argv[1:]  # the import path of the parent process

from checkpoints.text_backend import TextBackend

# A request may take SECONDS of processor time and MEMORY bytes of address space, and more for each byte of its data.
SECONDS = 5
SECONDS_PER_BYTE = 4e-6  # of the tokenizer.json or text
MEMORY = 1 << 30
MEMORY_PER_FILE_BYTE = 24
MEMORY_PER_TEXT_BYTE = 1024
MAX_ANSWER_CHARACTERS = 128 << 20

CHILD_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0"}


class TextError(Exception):
    """The package gave no answer; the message says why in a few words."""


class TextProcess:
    """The methods of TextBackend, run in another process. After a TextError the next call starts a new process."""

    def __init__(self, data: bytes):
        """Load the bytes of a tokenizer.json. Raise TextError if the package cannot."""
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
                start_new_session=True,  # Ctrl-C must reach only the parent, which ends this process
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
        except BaseException:  # after Ctrl-C, for example, the answer must not be read as that of the next request
            self._stop(patience=0)
            raise
        if not line.endswith(b"\n"):
            raise TextError(_how_it_ended(self._stop(patience=10)))
        answer = json.loads(line)
        if "error" in answer:
            raise TextError(answer["error"])
        return answer["value"]

    def _stop(self, patience: float) -> int:
        """Return the process's exit code after waiting `patience` seconds for it to end and then killing it."""
        process, self._process = self._process, None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        self._end()
        return process.returncode


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # closing fails if bytes were never read
            pipe.close()


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "the tokenizers package takes too long over it"
    if code in (-signal.SIGABRT, -signal.SIGSEGV):
        return "the tokenizers package needs too much memory for it"
    return f"the tokenizers package ended with exit code {code}"


def _serve() -> None:
    """Answer the requests on stdin, one line of JSON each, until it is closed."""
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
    """Limit the processor time from now on, and the address space in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)
    _limit(resource.RLIMIT_AS, memory)


def _limit(resource_type: int, limit: int) -> None:
    hard_limit = resource.getrlimit(resource_type)[1]
    soft_limit = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
    resource.setrlimit(resource_type, (soft_limit, hard_limit))


def _answer(call) -> None:
    """Print the value that a call returns, or the error that it raises, as one line of JSON."""
    try:
        answer = json.dumps({"value": call()})
    except BaseException as error:  # noqa: BLE001 - a panic is a BaseException, and the parent has to learn of it
        answer = json.dumps({"error": (str(error).splitlines() or [type(error).__name__])[0][:300]})
    if len(answer) > MAX_ANSWER_CHARACTERS:
        answer = json.dumps({"error": f"an answer of {len(answer)} bytes"})
    sys.stdout.write(answer + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
