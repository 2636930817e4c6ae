"""Every script's --help and usage errors, which are answered before any large package is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import assert_rejected, run_script

import run_reference
from command_line.scripts import SCRIPTS

ROOT = Path(__file__).parents[2]
LARGE = ("torch", "triton", "numpy", "tokenizers")
REQUIRED = {"convert_to_iris.py": ["--info", "x.iris"]}  # words without which a command line is wrong


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Make the environment of a process that ends as soon as it imports a large package."""
    folder = tmp_path_factory.mktemp("packages")
    for name in LARGE:
        (folder / f"{name}.py").write_text("raise SystemExit(f'{__name__} is imported')\n")
    return os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}


@pytest.fixture
def run(environment):
    """Return a function that runs a script as a process and returns (exit code, stdout, stderr)."""

    def run(script: str, *words: str, redirection: str = "") -> tuple[int, str, str]:
        command = ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, str(ROOT / script), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_table_has_every_script():
    """Of tools/ it has those that take the options of the scripts."""
    files = [*ROOT.glob("*.py"), *(ROOT / "multi_gpu").glob("*.py")]
    scripts = {path.relative_to(ROOT).as_posix() for path in files if "run_main(main)" in path.read_text()}
    assert scripts == {script for script in SCRIPTS if not script.startswith("tools/")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_large(run, script):
    code, out, err = run(script, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: python {script} [-h] ")
    assert SCRIPTS[script][0] in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_one_line_that_names_help(run, script):
    message = f"error: unrecognized arguments: --frobnicate (see python {script} --help)\n"
    assert run(script, *REQUIRED.get(script, ()), "--frobnicate") == (2, "", message)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_right_command_line_goes_on_to_the_imports(run, script):
    """Otherwise the tests above would show nothing."""
    code, out, err = run(script, *REQUIRED.get(script, ()))
    assert (code, out) == (1, "")
    assert err in [f"{name} is imported\n" for name in LARGE]


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (
            "gpt_oss_megakernel.py",
            ["--prompt", "a", "--chat", "b"],
            "argument --chat: not allowed with argument --prompt",
        ),
        ("chat.py", ["--reasoning", "huge"], "argument --reasoning: invalid choice: 'huge'"),
        ("serve.py", ["--port", "65536"], "argument --port: '65536' is not a port: at most 65535"),
        ("bench_tpot.py", ["--contexts", "64,0"], "argument --contexts: '0' is not a positive integer"),
        ("bench_islosl.py", ["--configs", "16"], "argument --configs: '16' is not INPUT:OUTPUT, such as 1024:100"),
        ("acc_eval.py", ["--test", "fp8"], "argument --test: 'fp8' is not one of the sides reference, reference-quant"),
        ("acc_eval.py", ["--fail-under", "kl"], "argument --fail-under: 'kl' is not of the form KEY=VALUE"),
        ("convert_to_iris.py", [], "one of the arguments --out --verify --info is required"),
        ("run_reference.py", ["--layers"], "argument --layers: expected one argument"),
        ("run_triton_phased.py", ["--temperature", "1"], "unrecognized arguments: --temperature 1"),
        ("multi_gpu/run_multi_gpu.py", ["--layout", "ring"], "argument --layout: invalid choice: 'ring'"),
        ("multi_gpu/bench_exchange.py", ["--bytes", "4", "-8"], "argument --bytes: '-8' is not a positive integer"),
    ],
)
def test_usage_errors_import_nothing_large(run, script, words, message):
    result = run(script, *words)
    assert_rejected(result)
    assert result[2].startswith(f"error: {message}")
    assert result[2].endswith(f" (see python {script} --help)\n")


@pytest.mark.parametrize(
    ("redirection", "code", "err"),
    [
        (">&-", 2, "error: stdout: is closed\n"),
        ("> /dev/full", 2, "error: stdout: No space left on device\n"),
        ("> /dev/full 2>&1", 2, ""),
        (">&- 2>&-", 2, ""),
        ("2>&-", 0, ""),
    ],
)
def test_help_without_a_stdout_that_takes_it(run, redirection, code, err):
    found = run("bench_tpot.py", "--help", redirection=redirection)
    assert (found[0], found[2]) == (code, err)
    assert bool(found[1]) == (code == 0)


def test_a_usage_error_without_stderr_is_in_the_exit_code(run):
    assert run("bench_tpot.py", "--frobnicate", redirection="2>&-") == (2, "", "")


def test_other_errors_name_no_help(monkeypatch, capsys):
    result = run_script(run_reference.main, ["--model", "nowhere/at/all"], monkeypatch, capsys)
    assert_rejected(result, "nowhere/at/all")
    assert "--help" not in result[2]
