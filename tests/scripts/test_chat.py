"""chat.py at a terminal and in a pipe, with the shipped model on the CPU interpreter."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
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


def test_a_pipe_gets_final_answers_alone(tmp_path):
    saved = tmp_path / "chat.json"
    lines = ["/time", "Recite sonnet 18.", "", "/nonsense", "/reasoning huge", "/save"]
    typed = "\n".join([*lines, f"/save {saved}", f"/save {saved}", "/quit", "more", ""])
    command = [sys.executable, "chat.py", "--max-new-tokens", "60"]
    done = subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{FIRST_LINE}\nThou art more lovely")
    errors = done.stderr.splitlines()
    assert errors[0] == "times are shown"
    assert errors[1] == "[cut after 60 tokens]"
    assert re.fullmatch(r"\[61 prompt \+ 60 new tokens, first [\d.]+ ms, then [\d.]+ ms per token\]", errors[2])
    assert errors[3] == "error: /nonsense: no such command; /help lists them"
    assert errors[4] == "error: reasoning effort 'huge': expected one of low, medium, high"
    assert errors[5] == "error: /save: where to? /save FILE"
    assert errors[6] == f"saved {saved}"
    assert errors[7].startswith(f"error: /save {saved}: ")
    assert len(errors) == 8
    content = json.loads(saved.read_text())
    assert [message["role"] for message in content["messages"]] == ["user", "assistant"]
    assert content["messages"][1]["content"] == done.stdout.rstrip("\n")


@pytest.mark.parametrize(
    "words, culprit",
    [
        (["--random-weights", "20b", "--layers", 1], "has no tokenizer, and cannot chat"),
        (["--date", "June"], "date 'June': expected YYYY-MM-DD"),
        (["--reasoning", "huge"], "--reasoning"),
        (["--top-p", "0.5"], "--top-p: nothing is drawn without --temperature"),
        (["--show-reasoning", "loud"], "--show-reasoning"),
    ],
)
def test_bad_input_is_one_line(words, culprit, monkeypatch, capsys):
    assert_rejected(run_script(chat.main, words, monkeypatch, capsys), culprit)
