"""Make .venv, the environment that the Makefile's targets run in. Needs nothing but Python and pip.

    python tools/setup_env.py [--venv FOLDER] [--torch-index URL] run|test|lint

A torch and a triton that this Python already has for the machine's GPU are used, never replaced: .venv then sees this
Python's packages, and pip adds only what is missing. Otherwise .venv stands alone and holds CPU builds, at the versions
of constraints-cpu.txt.

.venv/setup.json records what is done, so that a second call has nothing to do, an interrupted one continues, and a
changed requirements file is noticed. pip's output is kept in .venv/setup.log.
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# What a target of the Makefile needs. ruff stands apart: a machine that cannot get it can still run the tests.
TARGETS = {"run": ["runtime"], "test": ["runtime", "tests"], "lint": ["lint"]}
GPU_PACKAGES = ("torch", "triton")
EXIT_ERROR = 2

PROBE = """
import json, sys
import torch, triton
print(json.dumps({"gpu": torch.cuda.is_available(), "path": sys.path}))
"""


class SetupError(Exception):
    """An error that stops the set-up, in one line."""


class NoSuchWheel(SetupError):
    """Raised when pip finds no wheel of a version for this Python and machine."""


class Interrupted(BaseException):
    """A signal that ends the set-up."""

    def __init__(self, number: int):
        self.number = number


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        print(f"setup: {line}", file=sys.stderr, flush=True)


# Packages that are needed


def read_requirements(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def package_name(requirement: str) -> str:
    """Return a name normalized as in PEP 503."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def stage_requirements(stage: str) -> list[str]:
    if stage == "runtime":
        return read_requirements(REPOSITORY / "requirements.txt")
    requirements = read_requirements(REPOSITORY / "requirements-test.txt")
    return [line for line in requirements if (package_name(line) == "ruff") == (stage == "lint")]


def torch_pin(constraints: list[str]) -> str:
    return next(line for line in constraints if package_name(line) == "torch")


# Packages and GPUs that exist


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_gpu_device() -> bool:
    """Return whether the kernel shows an NVIDIA or AMD GPU; torch decides whether it can use it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()


def this_python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}"


def describe_machine() -> dict:
    """Describe what an environment is made for: another Python, torch or GPU needs another one. Imports nothing."""
    return {
        "python": sys.prefix,
        "version": list(sys.version_info[:2]),
        "gpu_device": has_gpu_device(),
        **{package: installed_version(package) for package in GPU_PACKAGES},
    }


def probe_gpu_packages(python: str) -> dict | None:
    """Return {"path": sys.path} of a Python whose torch and triton can use a GPU, else None."""
    hidden = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([python, "-c", PROBE], env=environment, capture_output=True, text=True, cwd="/", check=False)
    if done.returncode != 0:
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    return found if found["gpu"] else None


def package_folders(path: list[str]) -> list[str]:
    """Return a sys.path's folders of installed packages, without the standard library and those of PYTHONPATH."""
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_config_var("DESTSHARED")}
    own = {os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    return [entry for entry in path if os.path.isdir(entry) and entry not in standard | own]


# The environment


def venv_python(venv: Path) -> Path:
    return venv / "bin" / "python"


def site_packages(venv: Path) -> Path:
    return venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def read_state(venv: Path) -> dict:
    try:
        state = json.loads((venv / "setup.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # not JSON, or not even text
        return {}
    return state if isinstance(state, dict) else {}


def write_state(venv: Path, state: dict) -> None:
    unfinished = venv / "setup.json.new"
    unfinished.write_text(json.dumps(state, indent=1) + "\n")
    unfinished.replace(venv / "setup.json")


def check_ours(venv: Path) -> None:
    """Raise SetupError if removing the folder would lose what someone else installed."""
    bare = ("pip-", "setuptools-", "wheel-")
    packages = [found.name for found in venv.glob("lib/python*/site-packages/*.dist-info")]
    if not read_state(venv) and any(not name.startswith(bare) for name in packages):
        raise SetupError(f"{venv} holds packages that make did not install: move it away, or remove it with make clean")


def make_venv(venv: Path) -> dict:
    """Make an environment without packages, and return its state."""
    check_ours(venv)
    if venv.exists():
        say(f"removing {venv.name}, which is unfinished or was made for another Python or GPU")
        shutil.rmtree(venv)
    venv.mkdir(parents=True)
    write_state(venv, {"python": sys.executable})
    found = probe_gpu_packages(sys.executable)
    if has_gpu_device() and not found:
        say(f"a GPU is here, but {sys.executable} has no torch and triton that can use it: taking CPU builds")
    say(f"making {venv.name} with Python {platform.python_version()}")
    # Debian packs ensurepip separately; pip itself will then serve from outside.
    without_pip = [] if importlib.util.find_spec("ensurepip") else ["--without-pip"]
    done = run_logged(venv, [sys.executable, "-m", "venv", *without_pip, str(venv)])
    if done.returncode != 0:
        raise SetupError(f"{sys.executable} -m venv failed: {last_line(done.stdout)}")
    if found:
        share_packages(venv, package_folders(found["path"]))
    state = {"python": sys.executable, "made_for": describe_machine(), "shares_gpu_packages": bool(found), "done": {}}
    write_state(venv, state)
    return state


def share_packages(venv: Path, folders: list[str]) -> None:
    """Put another Python's packages on the path, after the environment's own.

    `venv --system-site-packages` would not do: of a Python that is itself in an environment, it shows the base.
    addsitedir, unlike plain lines, also reads the .pth files there, for example of editable installs.
    """
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    (site_packages(venv) / "shared-packages.pth").write_text("".join(lines))
    if not probe_gpu_packages(str(venv_python(venv))):
        raise SetupError(f"{sys.executable} can use a GPU, but {venv} does not see its torch and triton")
    versions = " and ".join(f"{package} {installed_version(package) or ''}".strip() for package in GPU_PACKAGES)
    say(f"using {versions} of {sys.prefix}")


def is_usable(venv: Path, state: dict) -> bool:
    whole = venv_python(venv).exists() and (venv / "pyvenv.cfg").exists() and site_packages(venv).exists()
    return whole and state.get("made_for") == describe_machine()


def is_done(venv: Path, stage: dict, wanted: dict) -> bool:
    """Return whether the stage is recorded as wanted, and its packages are all still there."""
    return stage["wanted"] == wanted and set(stage["packages"]) <= set(installed_packages(venv))


def installed_packages(venv: Path) -> list[str]:
    return sorted(folder.name for folder in site_packages(venv).glob("*.dist-info"))


def check_access(venv: Path) -> None:
    """Raise SetupError if a user may not use what another one installed."""
    for path in site_packages(venv).iterdir():
        if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
            raise SetupError(f"{path}: this user may not read it; the one who ran make first has to allow that")


def remove_unfinished_packages(venv: Path) -> None:
    """Remove what pip leaves behind when interrupted, which would mislead it.

    It writes RECORD last, but accepts a half unpacked package without one. ~NAME is a package on its way out.
    """
    unfinished = [folder for folder in site_packages(venv).glob("*.dist-info") if not (folder / "RECORD").exists()]
    for path in {*unfinished, *site_packages(venv).glob("~*")}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# pip


def run_logged(venv: Path, command: list[str], **options) -> subprocess.CompletedProcess:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    with open(venv / "setup.log", "a") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}")
    return done


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def pip_command(venv: Path) -> list[str]:
    if importlib.util.find_spec("ensurepip"):
        return [str(venv_python(venv)), "-m", "pip"]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--python", str(venv_python(venv))]
    raise SetupError(f"{sys.executable} has neither ensurepip nor pip: install one of them (Debian: python3-venv)")


def pip_install(venv: Path, arguments: list[str]) -> None:
    """Install packages with pip. Raises NoSuchWheel or SetupError."""
    # Wheels only: a build from source would take long and then fail for want of a compiler.
    # Not compiled: that takes longer than the first imports, which compile what they need.
    command = [*pip_command(venv), "install", "--only-binary", ":all:", "--no-compile", *arguments]
    environment = {**os.environ, "PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = run_logged(venv, command, env=environment)
    if done.returncode != 0:
        raise explain_pip(done.stdout, venv / "setup.log")


def explain_pip(output: str, log: Path) -> SetupError:
    missing = re.search(r"^ERROR: No matching distribution found for (\S+)", output, re.MULTILINE)
    unreachable = re.search(r"Retrying \(|NewConnectionError|NameResolutionError|ConnectTimeout", output)
    if missing:
        reason = "no package index could be reached" if unreachable else f"see {log}"
        return NoSuchWheel(f"pip finds no {missing.group(1)} for {this_python()}: {reason}")
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return SetupError(f"pip failed: {errors[0] if errors else last_line(output)} (see {log})")


def install_cpu_torch(venv: Path, pin: str, torch_index: str) -> None:
    """Install a CPU build of torch and what it needs. Raises SetupError rather than load gigabytes of CUDA libraries.

    Package indexes may have a CUDA build under the same version, so the one marked as a CPU build is asked for first.
    Where there is none (not every platform marks it), the plain one is taken, unless it asks for CUDA packages.
    """
    index = ["--extra-index-url", torch_index] if torch_index else []
    try:
        pip_install(venv, [*index, f"{pin}+cpu"])
    except NoSuchWheel:
        if cuda_packages(venv, [*index, pin]):
            raise SetupError(
                f"pip finds only a CUDA build of {pin} for {this_python()}, but a CPU build is wanted: name a package"
                " index that has it by TORCH_INDEX=URL (PyTorch's installation page lists one), or another Python by"
                " PYTHON="
            ) from None
        pip_install(venv, [*index, pin])


def cuda_packages(venv: Path, arguments: list[str]) -> list[str]:
    """Return the CUDA packages that a requirement would bring along, from its metadata alone."""
    report = venv / "torch-report.json"
    pip_install(venv, ["--dry-run", "--ignore-installed", "--no-deps", "--report", str(report), *arguments])
    return cuda_requirements(json.loads(report.read_text()))


def cuda_requirements(report: dict) -> list[str]:
    needed = [line for package in report["install"] for line in package["metadata"].get("requires_dist", [])]
    return [line for line in needed if package_name(line).startswith(("nvidia-", "cuda-"))]


def install_stage(venv: Path, stage: str, requirements: list[str], shares_gpu_packages: bool, torch_index: str) -> None:
    names = [package_name(line) for line in requirements]
    if shares_gpu_packages:
        say(f"installing what is missing of {' '.join(name for name in names if name not in GPU_PACKAGES)}")
    else:
        say(f"installing {' '.join(names)}")
    remove_unfinished_packages(venv)
    if shares_gpu_packages:
        versions = {package: installed_version(package) for package in GPU_PACKAGES}
        # One without a version goes by another name, such as pytorch-triton-rocm: pip must not see the requirement.
        requirements = [line for line in requirements if versions.get(package_name(line), "") is not None]
        constraints = venv / "constraints-gpu.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions.items() if version))
    else:
        constraints = REPOSITORY / "constraints-cpu.txt"
        if stage == "runtime":
            install_cpu_torch(venv, torch_pin(read_requirements(constraints)), torch_index)
    pip_install(venv, ["--constraint", str(constraints), *requirements])


# The whole set-up


@contextlib.contextmanager
def only_one_at_a_time() -> Iterator[None]:
    with open(__file__) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def leave_environment(venv: Path) -> None:
    """Start again with the Python that made the environment, if this is the environment's own."""
    if Path(sys.prefix).resolve() != venv.resolve():
        return
    maker = read_state(venv).get("python") or sys._base_executable
    if not os.access(maker, os.X_OK):
        raise SetupError(f"{maker}, which made {venv}, is gone: deactivate {venv.name}, or name a Python by PYTHON=")
    os.execv(maker, [maker, *sys.argv])


def set_up(venv: Path, target: str, torch_index: str) -> None:
    """Set up a stage of the environment. Raises SetupError."""
    leave_environment(venv)
    with only_one_at_a_time():
        state = read_state(venv)
        if not is_usable(venv, state):
            state = make_venv(venv)
        shares = state["shares_gpu_packages"]
        pins = [] if shares else read_requirements(REPOSITORY / "constraints-cpu.txt")
        for stage in TARGETS[target]:
            requirements = stage_requirements(stage)
            wanted = {"requirements": requirements, "constraints": pins}
            if stage not in state["done"] or not is_done(venv, state["done"][stage], wanted):
                install_stage(venv, stage, requirements, shares, torch_index)
                state["done"][stage] = {"wanted": wanted, "packages": installed_packages(venv)}
                write_state(venv, state)
        check_access(venv)


def interrupt(number: int, _frame: object) -> None:
    """Handle a signal: end pip as well; the next run removes what it leaves."""
    raise Interrupted(number)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--venv", metavar="FOLDER", type=Path, default=REPOSITORY / ".venv")
    parser.add_argument("--torch-index", metavar="URL", default="", help="one more package index to find torch in")
    arguments = parser.parse_args()
    try:
        set_up(arguments.venv.absolute(), arguments.target, arguments.torch_index)
    except SetupError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Interrupted as interrupted:
        say("interrupted; the same command takes it up again")
        return 128 + interrupted.number
    return 0


def fail(message: str) -> int:
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
