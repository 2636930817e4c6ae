"""host.cli.run_main: what a script's end looks like."""

import os
import signal

import pytest

from host.cli import run_main
from host.errors import InputError, RunsDiffer


@pytest.fixture(autouse=True)
def python_handles_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_in_a_library() -> None:
    """One that makes another exception of it, as torch does while it builds a tensor."""
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
