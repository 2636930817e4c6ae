"""command_line.run.run_main: how a script ends; host.start: what goes wrong before its main."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from command_line.run import run_main
from host.generation import stream_generation
from system import program
from system.errors import InputError, RunsDiffer, printable
from system.output_file import replacing
from system.program import ENDING_SIGNALS, signals_deferred


@pytest.fixture(autouse=True)
def python_handles_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_in_a_library() -> None:
    """Interrupt a library that turns the interrupt into another exception, as torch does while it builds a tensor."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        pass
    raise RuntimeError("could not determine the shape")


def failing() -> None:
    raise RuntimeError("a mistake of ours")


def test_ctrl_c_stays_one_when_a_library_makes_another_error_of_it(capsys):
    for _ in range(2):
        assert run_main(interrupted_in_a_library) == 130
    assert capsys.readouterr() == ("", "")


def test_mistakes_are_not_hidden_nor_blamed_on_an_earlier_ctrl_c():
    assert run_main(interrupted_in_a_library) == 130
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_main(failing)


def test_errors_cannot_move_the_cursor(capsys):
    def bad_file() -> None:
        raise InputError("x.json: version \x1b[2J\u202e of\nCaf\u00e9")

    assert run_main(bad_file) == 2
    assert capsys.readouterr().err == "error: x.json: version \\x1b[2J\\u202e of Caf\u00e9\n"


def test_runs_that_differ_are_one_line_and_a_failure(capsys):
    def unsteady() -> None:
        raise RunsDiffer("two runs wrote different tokens")

    assert run_main(unsteady) == 1
    assert capsys.readouterr() == ("", "error: two runs wrote different tokens\n")


def test_errors_keep_the_beginning_and_the_end_of_a_long_text():
    for long in ("A" * 1_000_000, "\x1b" * 1_000_000, "\u4e2d\n" * 1_000_000):
        error = InputError(f"config.json: model_type {long} is not supported")
        assert len(str(error)) == 500
        assert str(error).startswith("config.json: model_type ")
        assert str(error).endswith(" is not supported")
        assert str(error).isprintable()
    assert printable("a" * 500) == "a" * 500
    assert len(printable("a" * 501)) == 500


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stdout", [Terminal, io.StringIO])
def test_a_models_text_cannot_command_a_terminal(monkeypatch, stdout):
    text = "a\x1b[2J\x07\r\x7f\x9b31m\u00e9\tb\n\u200d\U0001f600"
    stream = SimpleNamespace(push=lambda token: text, flush=lambda: "")
    tokenizer, config = SimpleNamespace(stream=lambda: stream), SimpleNamespace(stop_ids=())
    monkeypatch.setattr(sys, "stdout", stdout())
    generation = stream_generation([1], [0], tokenizer, config, "limit", "cpu", "default", as_json=False)
    shown = "a\\x1b[2J\\x07\\r\\x7f\\x9b31m\u00e9\tb\n\u200d\U0001f600" if stdout is Terminal else text
    assert sys.stdout.getvalue() == f"{shown}\n"
    assert generation.text == text


def test_a_thread_that_cannot_be_had_is_one_line(capsys, monkeypatch):
    def none_left(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading._start_new_thread", none_left)
    assert run_main(threading.Thread(target=failing).start) == 2
    line = "error: can't start new thread: the limit on this user's processes, or memory, is reached\n"
    assert capsys.readouterr() == ("", line)


# Signals


def ended_by(number: signal.Signals):
    def main() -> None:
        os.kill(os.getpid(), number)
        signal.pause()

    return main


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_that_end_a_program_clean_up_and_give_a_shells_exit_code(tmp_path, capsys, number, code):
    def writing() -> None:
        with replacing(tmp_path / "file", 3, force=False) as file:
            file.write(b"half", 0)
            ended_by(number)()

    previous = signal.signal(number, signal.SIG_DFL)  # nohup leaves SIGHUP ignored
    try:
        before = [signal.getsignal(each) for each in ENDING_SIGNALS]
        assert run_main(writing) == code
        after = [signal.getsignal(each) for each in ENDING_SIGNALS]
    finally:
        signal.signal(number, previous)
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert after == before


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_an_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert run_main(lambda: os.kill(os.getpid(), number)) == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_signal_does_not_break_into_cleaning_up():
    """A terminal that closes sends SIGHUP twice, a service manager SIGTERM and SIGHUP."""
    steps = []

    def main() -> None:
        try:
            ended_by(signal.SIGTERM)()
        finally:
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
            steps.append("cleaned up")

    assert (run_main(main), steps) == (143, ["cleaned up"])


def test_a_later_signal_ends_what_hangs(monkeypatch):
    monkeypatch.setattr(program, "REPEAT_SECONDS", 0.01)

    def main() -> None:
        try:
            ended_by(signal.SIGTERM)()
        except KeyboardInterrupt:
            time.sleep(0.02)
        ended_by(signal.SIGTERM)()
        pytest.fail("still there")

    assert run_main(main) == 143


def test_deferred_signals_interrupt_only_where_it_is_asked_for():
    steps = []

    def main() -> None:
        with signals_deferred() as check:
            check()
            os.kill(os.getpid(), signal.SIGHUP)
            steps.append("went on")
            check()
        pytest.fail("not interrupted")

    assert (run_main(main), steps) == (129, ["went on"])


# Standard streams

# Runs main functions in forks of one process that has imported everything, each on streams of its own.
FORKS = """
import argparse, json, os, resource, sys
sys.path.insert(0, sys.argv[1])
from command_line.run import run_main
from system.errors import InputError
from huggingface_hub.utils import tqdm

def say():
    print("text")

def say_much():
    for n in range(100_000):
        print(n, flush=True)

def talk():
    for n in tqdm(range(3)):
        print("working", file=sys.stderr, flush=True)
    print("text", sys.stderr.isatty())

def fail():
    print("text")
    raise InputError("bad")

def ask_for_help():
    argparse.ArgumentParser(prog="program").parse_args(["--help"])

def stop():
    print("text")
    raise SystemExit(1)

def opened(path):
    if path != "no reader":
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    reader, writer = os.pipe()
    os.close(reader)
    return writer

def streams(*paths):
    descriptors = [None if path == "closed" else opened(path) for path in paths]
    for number, descriptor in enumerate(descriptors, 1):
        os.close(number) if descriptor is None else os.dup2(descriptor, number)
    return [descriptor and open(number, "w", closefd=False) for number, descriptor in enumerate(descriptors, 1)]

def end(code):
    # An interpreter that ends does this; then it takes down its libraries, for seconds.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except Exception:
            code = 120
    os._exit(code)

for line in sys.stdin:
    main, out, err, limit = json.loads(line)
    pid = os.fork()
    if pid == 0:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = streams(out, err)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            code = run_main(globals()[main])
        except SystemExit as stop:
            code = stop.code or 0
        end(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
FULL, CLOSED, NO_READER = "/dev/full", "closed", "no reader"


@pytest.fixture(scope="module")
def forks():
    root = Path(__file__).parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS, root], **pipes) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize(
    ("main", "out", "err", "limit", "code", "told", "complaint"),
    [
        ("say", "out", "err", None, 0, "text\n", ""),
        ("say", CLOSED, "err", None, 2, "", "error: stdout: is closed\n"),
        ("say", FULL, "err", None, 2, "", "error: stdout: No space left on device\n"),
        ("say", NO_READER, "err", None, 141, "", ""),
        ("say_much", FULL, "err", None, 2, "", "error: stdout: No space left on device\n"),
        ("say_much", NO_READER, "err", None, 141, "", ""),
        ("say_much", "out", "err", 7, 2, "0\n1\n2\n3", "error: "),  # stderr is a file too
        ("say", "out", "err", 0, 2, "", ""),
        ("say", "out", CLOSED, None, 0, "text\n", ""),
        ("talk", "out", CLOSED, None, 0, "text False\n", ""),
        ("talk", "out", FULL, None, 0, "text False\n", ""),
        ("talk", "out", NO_READER, None, 0, "text False\n", ""),
        ("fail", "out", "err", None, 2, "text\n", "error: bad\n"),
        ("fail", "out", CLOSED, None, 2, "text\n", ""),
        ("fail", "out", FULL, None, 2, "text\n", ""),
        ("fail", "out", NO_READER, None, 2, "text\n", ""),
        ("fail", FULL, FULL, None, 2, "", ""),
        ("fail", NO_READER, NO_READER, None, 2, "", ""),
        ("fail", CLOSED, CLOSED, None, 2, "", ""),
        ("ask_for_help", "out", "err", None, 0, None, ""),
        ("ask_for_help", FULL, "err", None, 2, "", "error: stdout: No space left on device\n"),
        ("ask_for_help", NO_READER, "err", None, 141, "", ""),
        ("ask_for_help", CLOSED, "err", None, 2, "", "error: stdout: is closed\n"),
        ("stop", "out", "err", None, 1, "text\n", ""),
        ("stop", FULL, "err", None, 2, "", "error: stdout: No space left on device\n"),
    ],
)
def test_streams_that_are_closed_full_or_not_read(forks, tmp_path, main, out, err, limit, code, told, complaint):
    """If stdout takes no output that is an error, never a traceback; what stderr does not take is lost."""
    paths = [name if name in (FULL, CLOSED, NO_READER) else str(tmp_path / name) for name in (out, err)]
    forks.stdin.write(json.dumps([main, *paths, limit]) + "\n")
    forks.stdin.flush()
    assert int(forks.stdout.readline()) == code
    for name, expected in (("out", told), ("err", complaint)):
        path = tmp_path / name
        if expected is not None:
            assert (path.read_text() if path.exists() else "") == expected


# Imports


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        ("import nothing_of_this_name", 2, "error: No module named 'nothing_of_this_name'; `make run` sets up .venv"),
        ("open('/nothing of this name')", 2, "error: [Errno 2] No such file or directory: '/nothing of this name'\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGHUP)", -signal.SIGHUP, ""),
        ("1 / 0", 1, "Traceback"),
    ],
)
def test_what_goes_wrong_during_the_imports_of_a_script(content, code, line):
    script = str(Path(__file__).parents[2] / "bench_tpot.py")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.modules['__main__'].__file__ = {script!r}\nimport host.start\n{content}",
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(line)
    assert line == "Traceback" or done.stderr.count("\n") == bool(line)


def test_a_process_that_imports_the_project_keeps_its_excepthook_and_handlers():
    program = "import signal, sys; hook, handler = sys.excepthook, signal.getsignal(signal.SIGINT); import host.start; "
    program += "assert (hook, handler) == (sys.excepthook, signal.getsignal(signal.SIGINT))"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], timeout=60, check=True)
