"""Compare the machine code of every launch in two checkouts, compiled ahead of time with no GPU.

    python tools/compare_code.py OLD [NEW] [--only PATTERN] [--cache FOLDER] [--jobs N]

OLD and NEW are git revisions, or folders with a checkout; NEW is this checkout unless said. tools/launches.py of each
says what there is to compile. Compared are instructions and their encoding, data, registers, spills and shared memory;
names of kernels and functions, files and line numbers are not. Prints a line for each launch that differs, and how many
are the same. Exit code: 0 if all are, 1 if some differ, 2 after bad input.
"""

import argparse
import filecmp
import fnmatch
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line.parser import ArgumentParser, positive_int
from command_line.run import EXIT_FAILURE, run_main
from system.errors import InputError
from tools.machine_code import ERROR, VERSION

ROOT = Path(__file__).resolve().parent.parent
LAUNCHES = Path("tools", "launches.py")


@dataclass(frozen=True)
class Side:
    """A checkout to compare. `tree` is git's hash of its files, None if they may change."""

    name: str
    folder: Path
    tree: str | None = None


def find_side(name: str, scratch: Path) -> Side:
    """Return the checkout that a user names: a folder, or a revision, whose files are written below `scratch`."""
    if (Path(name) / LAUNCHES).is_file():
        return Side(name, Path(name).resolve())
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{tree}}")
    if found.returncode != 0:
        raise InputError(f"{name}: neither a folder with {LAUNCHES} nor a git revision")
    tree = found.stdout.strip()
    if git("cat-file", "-e", f"{tree}:{LAUNCHES.as_posix()}").returncode != 0:
        raise InputError(f"{name}: this revision has no {LAUNCHES}")
    folder = scratch / tree
    index = {"GIT_INDEX_FILE": str(scratch / f"{tree}.index")}  # not the user's
    for command in (("read-tree", tree), ("checkout-index", "--all", "--force", f"--prefix={folder}/")):
        if (done := git(*command, **index)).returncode != 0:
            raise InputError(f"{name}: git {command[0]} failed: {done.stderr.strip()}")
    return Side(name, folder, tree)


def git(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run git in this checkout. Raises InputError without git."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("git: not found") from None


def keys_of_launches(side: Side, only: str, jobs: int, store: Path, scratch: Path) -> dict[str, str]:
    """Return launch -> key of its machine code in the store, made by tools/machine_code.py in other processes.

    The launches of a tree are kept in the store too.
    """
    version = hashlib.sha256(VERSION.encode()).hexdigest()[:8]
    index = store / f"tree-{side.tree}-{version}.json" if side.tree else scratch / f"{uuid.uuid4()}.json"
    options = {"--store": store, "--index": index, "--only": only, "--jobs": jobs, "--label": side.name}
    words = [f"{flag}={value}" for flag, value in options.items()]
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TMPDIR": str(scratch),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, str(ROOT / "tools" / "machine_code.py"), str(side.folder), *words]
    if run_group(command, side.folder, {**os.environ, **environment}) != 0:
        raise InputError(f"{side.name}: its launches cannot be compiled, see above")
    keys = json.loads(index.read_text())
    return {name: keys[name] for name in fnmatch.filter(keys, only)}


def run_group(command: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Run a command and return its exit code; all processes that it started end with it, also after an interrupt."""
    pipe = subprocess.PIPE  # that of stdout ends when nobody holds it
    child = subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, start_new_session=True)
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # keeps its number, which is the group's
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    return child.returncode


def difference(old: str, new: str, store: Path) -> str | None:
    """Describe how the machine code of two keys differs: figures of both and changed lines. None if it is equal."""
    sides = {"old": old, "new": new}
    if errors := [
        f"{side} does not compile: {key.removeprefix(ERROR)}" for side, key in sides.items() if key.startswith(ERROR)
    ]:
        return "; ".join(errors)
    listings = [store / f"{key}.s" for key in (old, new)]
    figures = [json.loads((store / f"{key}.json").read_text()) for key in (old, new)]
    same_code = old == new or filecmp.cmp(*listings, shallow=False)
    if same_code and figures[0] == figures[1]:
        return None
    parts = []
    for name in figures[0]:
        before, after = (side[name] for side in figures)
        parts.append(f"{name} {before}" if before == after else f"{name} {before} -> {after}")
    if not same_code:
        parts.append(f"lines {changed_lines(*listings)}")
    return ", ".join(parts)


def changed_lines(old: Path, new: Path) -> str:
    """Return the number of lines that only the new file has, and only the old one: "+3 -1", for example."""
    done = git("diff", "--no-index", "--no-ext-diff", "--numstat", str(old), str(new))
    added, removed = done.stdout.split()[:2]
    return f"+{added} -{removed}"


def compare(old: dict[str, str], new: dict[str, str], store: Path) -> dict[str, str]:
    """Return launch -> difference, for the launches that differ."""
    found = {}
    for name in old | new:
        if name not in new:
            found[name] = "only in old"
        elif name not in old:
            found[name] = "only in new"
        elif how := difference(old[name], new[name], store):
            found[name] = how
    return found


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Raises InputError if it is wrong."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", help="git revision or folder")
    parser.add_argument("new", metavar="NEW", nargs="?", default=str(ROOT), help="likewise; default: this checkout")
    parser.add_argument(
        "--only", metavar="PATTERN", default="*", help="launches whose names match, with * and ? as in names of files"
    )
    parser.add_argument("--cache", metavar="FOLDER", type=Path, help="keep machine code there for the next comparison")
    parser.add_argument("--jobs", metavar="N", type=positive_int, default=os.cpu_count(), help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="compare-code-") as folder:
        scratch = Path(folder)
        store = args.cache or scratch / "store"
        try:
            store.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--cache {store}: {error.strerror}") from None
        sides = [find_side(name, scratch) for name in (args.old, args.new)]
        old, new = (keys_of_launches(side, args.only, args.jobs, store.resolve(), scratch) for side in sides)
        if not old | new:
            raise InputError(f"--only {args.only}: no launch has such a name")
        differences = compare(old, new, store)
    for name, how in differences.items():
        print(f"{name}: {how}")
    n_launches = len(old | new)
    print(f"{n_launches} launches, {n_launches - len(differences)} the same")
    if differences:
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that nothing is left behind
    sys.exit(run_main(main))
