"""tools/setup_env.py and the Makefile's check of the Python version, with stand-ins for pip, GPUs and old Pythons."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tools import setup_env

REPOSITORY = Path(setup_env.__file__).parent.parent
# What the Python of a GPU machine may have; triton's distribution has another name than the module, as ROCm's may.
PARENT_PACKAGES = {
    "torch": "2.11.0+cu130",
    "pytorch-triton-rocm": "3.6.0",
    "numpy": "2.5.2",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.2",
    "huggingface_hub": "1.33.0",
}
WAITED = "setup: waiting for another set-up to end\n"  # of a test in another process
FAKE_TORCH = "class cuda:\n    @staticmethod\n    def is_available():\n        import os\n        return {}\n"


def add_package(site_packages: Path, name: str, version: str) -> None:
    folder = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "RECORD").write_text("")


def make_parent(folder: Path, gpu: str = "True") -> Path:
    """Make a Python environment with fake torch and triton. torch's cuda.is_available() is the expression `gpu`."""
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = setup_env.site_packages(folder)
    for name, version in PARENT_PACKAGES.items():
        add_package(site_packages, name, version)
    (site_packages / "torch.py").write_text(FAKE_TORCH.format(gpu))
    (site_packages / "triton.py").write_text("")
    return folder / "bin" / "python"


def run_set_up(python: Path, folder: Path, target: str = "run", **environment) -> subprocess.CompletedProcess:
    command = [python, REPOSITORY / "tools" / "setup_env.py", "--venv", folder, target]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **environment}
    environment = {name: value for name, value in environment.items() if name not in ("PIP_FIND_LINKS", "PYTHONPATH")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    done.stderr = done.stderr.replace(WAITED, "")
    return done


@pytest.fixture
def pip_calls(monkeypatch):
    """Return the arguments of the calls to pip, none of which is made."""
    calls = []
    monkeypatch.setattr(setup_env, "pip_install", lambda venv, arguments: calls.append(arguments))
    return calls


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder where set_up may make its environment quickly, on a machine without a GPU."""
    monkeypatch.setattr(setup_env, "has_gpu_device", lambda: False)
    monkeypatch.setattr(setup_env, "probe_gpu_packages", lambda python: None)
    find_spec = setup_env.importlib.util.find_spec
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: name != "ensurepip" and find_spec(name))
    return tmp_path / "env"


# Sharing the packages of a Python that has torch for a GPU


def test_gpu_packages_of_a_parent_environment_are_shared_without_a_network(tmp_path):
    python, folder = make_parent(tmp_path / "parent"), tmp_path / "env"
    done = run_set_up(python, folder)
    assert done.returncode == 0, done.stderr
    assert f"using torch 2.11.0+cu130 and triton of {tmp_path / 'parent'}" in done.stderr
    assert "installed" not in (folder / "setup.log").read_text()
    assert (folder / "constraints-gpu.txt").read_text() == "torch==2.11.0+cu130\n"

    lookup = "import sys, torch, triton; print(torch.__file__, triton.__file__, *sys.path)"
    seen = subprocess.run([folder / "bin" / "python", "-c", lookup], capture_output=True, text=True, check=True)
    torch_file, triton_file, *path = seen.stdout.split()
    shared = setup_env.site_packages(tmp_path / "parent")
    assert (torch_file, triton_file) == (str(shared / "torch.py"), str(shared / "triton.py"))
    assert path.index(str(setup_env.site_packages(folder))) < path.index(str(shared))

    again = run_set_up(python, folder)
    assert (again.returncode, again.stderr) == (0, "")
    from_inside = run_set_up(folder / "bin" / "python", folder)
    assert (from_inside.returncode, from_inside.stderr) == (0, "")

    # Packages that are missing and cannot be had: one line.
    lint = run_set_up(python, folder, "lint")
    assert lint.returncode == setup_env.EXIT_ERROR
    assert lint.stderr.splitlines()[-1].startswith("error: pip finds no ruff")


def test_a_torch_without_gpu_is_not_shared(tmp_path):
    assert setup_env.probe_gpu_packages(str(make_parent(tmp_path / "parent", gpu="False"))) is None


def test_a_python_without_torch_shares_nothing(tmp_path):
    venv.create(tmp_path / "parent", with_pip=False, symlinks=True)
    assert setup_env.probe_gpu_packages(str(tmp_path / "parent" / "bin" / "python")) is None


def test_hidden_gpus_count(tmp_path, monkeypatch):
    """A GPU that is hidden for one run does not decide what is installed."""
    python = make_parent(tmp_path / "parent", gpu="'CUDA_VISIBLE_DEVICES' not in os.environ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert setup_env.probe_gpu_packages(str(python))


def test_package_folders_leave_out_the_standard_library_and_pythonpath(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    for name in ("mine", "site-packages"):
        (tmp_path / name).mkdir()
    standard = [entry for entry in sys.path if entry.endswith(("lib-dynload", f"python3.{sys.version_info[1]}"))]
    assert len(standard) == 2
    path = ["", str(tmp_path / "mine"), *standard, str(tmp_path / "none.zip"), str(tmp_path / "site-packages")]
    assert setup_env.package_folders(path) == [str(tmp_path / "site-packages")]


# Standing alone, with CPU builds


def test_cpu_environment_takes_torch_first_and_alone(folder, pip_calls):
    setup_env.set_up(folder, "test", torch_index="somewhere")
    torch, runtime, tests = pip_calls
    assert torch == ["--extra-index-url", "somewhere", "torch==2.13.0+cpu"]
    for arguments in (runtime, tests):
        assert arguments[:2] == ["--constraint", str(REPOSITORY / "constraints-cpu.txt")]
    assert [setup_env.package_name(line) for line in tests[2:]] == [
        "transformers",
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "pydantic",
        "starlette",
        "uvicorn",
        "openai",
    ]
    assert not (setup_env.site_packages(folder) / "shared-packages.pth").exists()


def test_plain_torch_is_taken_where_none_is_marked_cpu(tmp_path, monkeypatch):
    calls = offer_torch(monkeypatch, tmp_path, ["sympy>=1.13.3", "filelock"])
    setup_env.install_cpu_torch(tmp_path, "torch==2.13.0", "")
    assert calls[-1] == ["torch==2.13.0"]


def test_cuda_build_of_torch_is_refused(tmp_path, monkeypatch):
    calls = offer_torch(monkeypatch, tmp_path, ["sympy>=1.13.3", "nvidia-cudnn-cu13==9.20; platform_system == 'Linux'"])
    with pytest.raises(setup_env.SetupError, match=r"only a CUDA build of torch==2\.13\.0 .* TORCH_INDEX=URL"):
        setup_env.install_cpu_torch(tmp_path, "torch==2.13.0", "")
    assert all("--dry-run" in call or call[-1].endswith("+cpu") for call in calls)


def offer_torch(monkeypatch, folder, requires_dist) -> list[list[str]]:
    """Make pip find torch under its plain version only, with these requirements; return the list of calls."""
    calls = []

    def pip_install(venv, arguments):
        calls.append(arguments)
        if arguments[-1].endswith("+cpu"):
            raise setup_env.NoSuchWheel("no wheel")
        if "--report" in arguments:
            report = {"install": [{"metadata": {"name": "torch", "requires_dist": requires_dist}}]}
            Path(arguments[arguments.index("--report") + 1]).write_text(json.dumps(report))

    monkeypatch.setattr(setup_env, "pip_install", pip_install)
    return calls


# Doing only what is left to do


def test_nothing_is_done_twice(folder, pip_calls):
    setup_env.set_up(folder, "run", "")
    assert len(pip_calls) == 2
    setup_env.set_up(folder, "run", "")
    assert len(pip_calls) == 2
    setup_env.set_up(folder, "test", "")
    assert len(pip_calls) == 3


@pytest.mark.parametrize("name", ["requirements.txt", "constraints-cpu.txt"])
def test_a_changed_requirements_file_is_noticed(name, folder, pip_calls, tmp_path, monkeypatch):
    for path in [*REPOSITORY.glob("requirements*.txt"), REPOSITORY / "constraints-cpu.txt"]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(setup_env, "REPOSITORY", tmp_path)
    setup_env.set_up(folder, "run", "")
    kept = folder / "kept"
    kept.touch()
    with open(tmp_path / name, "a") as file:
        file.write("\ntqdm>=4 # said why\n")
    pip_calls.clear()
    setup_env.set_up(folder, "run", "")
    assert len(pip_calls) == 2 and ("tqdm>=4" in pip_calls[-1]) == (name == "requirements.txt")
    assert kept.exists()


def test_an_interrupted_installation_is_taken_up_again(folder, pip_calls, monkeypatch):
    def interrupted(venv, arguments):
        add_package(setup_env.site_packages(venv), "whole", "1.0")
        add_package(setup_env.site_packages(venv), "half", "1.0")
        (setup_env.site_packages(venv) / "half-1.0.dist-info" / "RECORD").unlink()
        add_package(setup_env.site_packages(venv), "~utgoing", "1.0")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "pip_install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            setup_env.set_up(folder, "run", "")
    setup_env.set_up(folder, "run", "")
    assert len(pip_calls) == 2
    assert [path.name for path in setup_env.site_packages(folder).glob("*.dist-info")] == ["whole-1.0.dist-info"]


def test_an_interrupted_environment_is_made_anew(folder, pip_calls, monkeypatch):
    def interrupted(venv, command, **options):
        (venv / "bin").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "run_logged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            setup_env.set_up(folder, "run", "")
    setup_env.set_up(folder, "run", "")
    assert setup_env.venv_python(folder).exists() and len(pip_calls) == 2


@pytest.mark.parametrize("damage", ["bin", "setup.json"])
def test_a_damaged_environment_is_made_anew(damage, folder, pip_calls):
    setup_env.set_up(folder, "run", "")
    shutil.rmtree(folder / damage) if damage == "bin" else (folder / damage).write_text('{"made_f')
    setup_env.set_up(folder, "run", "")
    assert setup_env.venv_python(folder).exists() and len(pip_calls) == 4


@pytest.mark.parametrize("content", [b"[1]", b"null", b"7", b"\xff\xfe", b""])
def test_a_record_that_is_none_is_made_anew(content, folder, pip_calls):
    setup_env.set_up(folder, "run", "")
    (folder / "setup.json").write_bytes(content)
    setup_env.set_up(folder, "run", "")
    assert len(pip_calls) == 4


def test_packages_that_the_user_may_not_read_are_named(folder, pip_calls, monkeypatch):
    setup_env.set_up(folder, "run", "")
    add_package(setup_env.site_packages(folder), "torch", "2.13.0")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "torch" not in str(path) and access(path, mode))
    with pytest.raises(setup_env.SetupError, match=r"torch-2\.13\.0\.dist-info: this user may not read it"):
        setup_env.set_up(folder, "run", "")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(setup_env.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--venv", str(tmp_path / "env"), "run"])
    assert setup_env.main() == setup_env.EXIT_ERROR
    assert capsys.readouterr().err.replace(WAITED, "") == f"error: {tmp_path / 'env'}: Permission denied\n"


def test_a_package_that_was_removed_is_installed_again(folder, pip_calls, monkeypatch):
    def pip_install(venv, arguments):
        pip_calls.append(arguments)
        add_package(setup_env.site_packages(venv), f"package{len(pip_calls)}", "1.0")

    monkeypatch.setattr(setup_env, "pip_install", pip_install)
    setup_env.set_up(folder, "run", "")
    shutil.rmtree(setup_env.site_packages(folder) / "package2-1.0.dist-info")
    setup_env.set_up(folder, "run", "")
    assert len(pip_calls) == 4


@pytest.mark.parametrize("change", [{"gpu_device": True}, {"torch": "2.11.0"}, {"version": [3, 99]}], ids=str)
def test_another_machine_wants_another_environment(change, folder, pip_calls, monkeypatch):
    setup_env.set_up(folder, "run", "")
    machine = {**setup_env.describe_machine(), **change}
    monkeypatch.setattr(setup_env, "describe_machine", lambda: machine)
    setup_env.set_up(folder, "run", "")
    assert len(pip_calls) == 4
    setup_env.set_up(folder, "run", "")
    assert len(pip_calls) == 4


def test_packages_that_someone_else_installed_are_not_removed(folder, pip_calls):
    add_package(setup_env.site_packages(folder), "torch", "2.11.0+rocm7")
    with pytest.raises(setup_env.SetupError, match="make did not install"):
        setup_env.set_up(folder, "run", "")
    assert not pip_calls


# Errors


def test_what_pip_says_becomes_one_line(tmp_path):
    log = tmp_path / "setup.log"
    nothing = (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'\n"
        "ERROR: Could not find a version that satisfies the requirement pytest>=9 (from versions: none)\n"
        "ERROR: No matching distribution found for pytest>=9\n"
    )
    found = setup_env.explain_pip(nothing, log)
    assert isinstance(found, setup_env.NoSuchWheel)
    assert str(found).startswith("pip finds no pytest>=9 for ")
    assert str(found).endswith("no package index could be reached")
    conflict = setup_env.explain_pip("x\nERROR: Cannot install torch>=2.9\nERROR: ResolutionImpossible: ...\n", log)
    assert str(conflict) == f"pip failed: Cannot install torch>=2.9 (see {log})"
    assert str(setup_env.explain_pip("Killed\n", log)) == f"pip failed: Killed (see {log})"


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("target", ["run", "test", "test-gpu", "lint"])
def test_an_old_python_is_refused_by_one_line(target, tmp_path):
    """The Makefile itself checks, because an older Python could not read setup_env.py."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    old = tmp_path / "old-python"
    check = "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[2])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{check}' \"$@\"\n")
    old.chmod(0o755)
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", target, f"PYTHON={old}"]
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, check=False)
    first, *rest = done.stderr.splitlines()
    assert first == "error: Python 3.10 or newer is needed, not 3.9: name one with PYTHON="
    assert len(rest) == 1 and rest[0].startswith("make: ***")
    assert not (tmp_path / ".venv").exists()
