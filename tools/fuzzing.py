"""Parts that the fuzzers share: their command line, the time limit of a case, and the count of all outcomes."""

import argparse
import collections
import re
import signal
import sys
from collections.abc import Callable, Iterable

from huggingface_hub.utils import tqdm

from command_line.parser import ArgumentParser, positive_int
from command_line.run import EXIT_FAILURE
from system.errors import InputError

MOST_SECONDS = 2.0
SHOWN_KINDS = 40
QUIET_SECONDS = 10  # between two lines of progress where there is no terminal
JSON_VALUES = (
    "null",
    "-1",
    "0",
    "1",
    "64",
    "1e999",
    "4294967296",
    "9" * 4500,
    '"x"',
    '"\\ud800"',
    "[]",
    "{}",
    "[" * 2000,
)


class TooSlow(BaseException):
    """Raised when a case's time is over; no Exception, so that the code under test does not catch it."""


def parse_arguments(description: str) -> argparse.Namespace:
    """Parse --cases, --seed and --first. Raises InputError; from here on SIGALRM raises TooSlow."""
    parser = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", metavar="N", type=positive_int, default=100_000, help="default: %(default)s")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--first", metavar="NUMBER", type=int, default=0, help="the first case; default: %(default)s")
    signal.signal(signal.SIGALRM, too_slow)
    return parser.parse_args()


def outcome(read: Callable[[], object], prefix: str, seconds: float) -> tuple[str | None, str | None]:
    """Return (problem, the InputError's message) of reading a case; both None if it could be read.

    A problem is any other exception, a message that is not printable or lacks `prefix`, or a longer time.
    """
    message = problem = None
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        read()
    except InputError as error:
        message = str(error)
        if not message.isprintable() or not message.startswith(prefix):
            problem = f"message {message!r}"
    except TooSlow:
        problem = f"not done after {seconds} s"
    except Exception as error:  # noqa: BLE001 - any exception is a finding
        problem = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return problem, message


def count(outcomes: Iterable[tuple[int, str | None, str | None]], args: argparse.Namespace, prefix: str) -> None:
    """Print the number of each outcome (case, problem, message), messages without `prefix`.

    Raises SystemExit with 1 after a problem.
    """
    accepted, problems, kinds = 0, 0, collections.Counter()
    mininterval = 0.1 if sys.stderr.isatty() else QUIET_SECONDS
    bar = tqdm(outcomes, total=args.cases, unit=" cases", mininterval=mininterval)
    for number, problem, message in bar:
        if problem:
            problems += 1
            bar.write(f"seed {args.seed} case {number}: {problem}")
        elif message is None:
            accepted += 1
        else:
            kinds[kind_of(message.removeprefix(prefix))] += 1
    for kind, times in kinds.most_common(SHOWN_KINDS):
        print(f"{times:8} {kind}")
    print(f"{accepted} accepted, {kinds.total()} rejected with {len(kinds)} kinds of message, {problems} problems")
    if problems:
        raise SystemExit(EXIT_FAILURE)


def kind_of(message: str) -> str:
    """Return a message without what differs from case to case."""
    message = re.sub(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^]]*\]""", "*", message)
    return re.sub(r"tensor \S+", "tensor *", re.sub(r"\b(0x[0-9a-f]+|\d+)\b", "N", message))


def too_slow(*_: object) -> None:
    raise TooSlow
