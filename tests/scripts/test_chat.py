"""chat.py at a terminal and in a pipe, with the shipped model on the CPU interpreter."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shipped import SONNET_73_START
from small_model import assert_rejected, run_script

import chat

ROOT = Path(__file__).parents[2]
SECONDS = 120  # that anything may take on a loaded machine
FIRST_LINE = "Shall I compare thee to a summer's day?"


class Terminal:
    """chat.py with a terminal on all its streams."""

    def __init__(self, *words: str):
        self._fd, other = pty.openpty()
        command = [sys.executable, "chat.py", *words]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=other, stdout=other, stderr=other, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(other)
        self.text = ""

    def read_until(self, pattern: str) -> str:
        """Read until a pattern appears, and return what came with it."""
        end = time.monotonic() + SECONDS
        while not (match := re.search(pattern, self.text, re.S)):
            assert time.monotonic() < end, self.text
            if select.select([self._fd], [], [], 0.2)[0]:
                self.text += os.read(self._fd, 1 << 16).decode().replace("\r\n", "\n")
        found, self.text = self.text[: match.end()], self.text[match.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def kill(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        code = self._process.wait(SECONDS)
        os.close(self._fd)
        return code


def _own_terminal() -> None:
    """Make stdin the terminal whose Ctrl-C this process gets."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_three_turns_at_a_terminal():
    """Ctrl-C in the second one ends its answer, not the program."""
    terminal = Terminal("--quant", "--max-new-tokens", "40")
    terminal.read_until("> ")
    terminal.type("Recite sonnet 18.\n")
    answer = terminal.read_until(r"\[cut after 40 tokens\]")
    assert f"{chat.DIM}The user asks for sonnet 18." in answer
    assert f"{chat.PLAIN}{FIRST_LINE}" in answer
    terminal.read_until("> ")
    terminal.type("Recite sonnet 73.\n")
    terminal.read_until("73.")
    time.sleep(1)
    terminal.type("\x03")
    terminal.read_until("> ")
    terminal.type("/reset\n")
    terminal.read_until("> ")
    terminal.type("Recite sonnet 18.\n")
    assert FIRST_LINE in terminal.read_until(r"\[cut after 40 tokens\]")
    terminal.read_until("> ")
    time.sleep(0.5)  # Python misses a signal that comes between its prompt and its wait for input
    terminal.type("\x03")
    terminal.read_until("Ctrl-D ends the program\n> ")
    terminal.type("/quit\n")
    assert terminal.end() == 0


def piped(typed: str | bytes, *words: str, **options) -> subprocess.CompletedProcess:
    """Run chat.py with its input from a pipe."""
    command = [sys.executable, "chat.py", *words]
    data = typed if isinstance(typed, bytes) else typed.encode()
    return subprocess.run(command, cwd=ROOT, input=data, capture_output=True, timeout=SECONDS, **options)


def test_a_pipe_gets_final_answers_alone(tmp_path):
    saved = tmp_path / "chat.json"
    typed = f"/time\nRecite sonnet 18.\n\n/save {saved}\n/reasoning\thigh\nRecite sonnet 73.\n/quit now\nmore\n"
    done = piped(typed, "--max-new-tokens", "60", "--load-rate")
    assert done.returncode == 0
    answer = done.stdout.decode()
    assert answer.startswith(f"{FIRST_LINE}\nThou art more lovely")
    answer, second, _ = answer.partition(SONNET_73_START)
    assert second
    errors = done.stderr.decode().splitlines()
    assert errors.pop(0).startswith("weights: 0.003 GB in ")
    assert errors[:2] == ["times are shown", "[cut after 60 tokens]"]
    assert re.fullmatch(r"\[61 prompt \+ 60 new tokens, first [\d.]+ ms, then [\d.]+ ms per token\]", errors[2])
    assert errors[3:5] == [f"saved {saved}", "[cut after 60 tokens]"]
    assert re.fullmatch(r"\[\d+ prompt \+ 60 new tokens, .*\]", errors[5]) and not errors[6:]
    content = json.loads(saved.read_text())
    assert [message["role"] for message in content["messages"]] == ["user", "assistant"]
    assert content["messages"][1]["content"] == answer.rstrip("\n")


def test_a_seed_repeats_a_conversation_after_a_reset(tmp_path):
    words = ("--max-new-tokens", "24", "--temperature", "1.5", "--seed", "3")
    conversations = [
        f"Recite sonnet {sonnet}.\n/save {tmp_path / str(n)}\n/reset\n" for n, sonnet in enumerate((18, 73, 18))
    ]
    done = piped("".join(conversations), *words)
    assert done.returncode == 0, done.stderr
    first, other, again = ((tmp_path / str(n)).read_text() for n in range(3))
    assert first == again != other
    assert len(json.loads(first)["messages"]) > 1, "there is nothing to compare"


BAD_LINES = {
    b"/nonsense": "/nonsense: no such command; /help lists them",
    b"/reasoning huge": "reasoning effort 'huge': expected one of low, medium, high",
    b"/save": "/save: where to? /save FILE",
    b"/save folder/": "/save: 'folder/' names no file",
    b"/save README.md": "/save README.md: is there already",
    b"a\xff": "the text is not valid UTF-8",
    b"/system \xff": "the identity is not valid UTF-8",
}


@pytest.mark.parametrize("line, culprit", BAD_LINES.items())
def test_a_bad_line_of_a_pipe_is_an_error(line, culprit):
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = piped(line + b"\n/help\n", env=environment)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith(f"error: {culprit}")
    assert done.stderr.count(b"\n") == 1


def test_a_closed_stdin_is_an_error():
    command = ["/bin/sh", "-c", 'exec "$0" chat.py <&-', sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: stdin is closed: there is nobody to chat with\n"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_end_the_program_at_a_terminal(number, code):
    terminal = Terminal()
    terminal.read_until("> ")
    terminal.type("Recite sonnet 18.\n")
    terminal.read_until("18.")
    time.sleep(1)
    terminal.kill(number)
    assert terminal.end() == code


@pytest.mark.parametrize(
    "words, culprit",
    [
        (["--random-weights", "20b", "--layers", 1], "has no tokenizer, and cannot chat"),
        (["--system", "\udcff"], "--system: is not valid UTF-8"),
        (["--date", "2024-13-45"], "date '2024-13-45': expected YYYY-MM-DD"),
        (["--date", "June"], "date 'June': expected YYYY-MM-DD"),
        (["--reasoning", "huge"], "--reasoning"),
        (["--top-p", "0.5"], "--top-p: nothing is drawn without --temperature"),
        (["--show-reasoning", "loud"], "--show-reasoning"),
    ],
)
def test_bad_input_is_one_line(words, culprit, monkeypatch, capsys):
    assert_rejected(run_script(chat.main, words, monkeypatch, capsys), culprit)
