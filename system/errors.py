"""Errors that a user's input or machine can cause, and how their text becomes one line."""

EXIT_INPUT_ERROR = 2  # exit code of a script that ends with an InputError
MAX_CHARACTERS = 500  # of an error's line: enough for a path and a reason
ELLIPSIS = " [...] "


def printable(text: str, max_characters: int = MAX_CHARACTERS) -> str:
    """Return a text as one line of at most max_characters; a longer one keeps its beginning and its end.

    Text from a file may hold sequences that command a terminal, so every unprintable character becomes an escape.
    """
    if len(text) > max_characters:
        text = _shorten(text, max_characters)  # before the rest, so that a text of any length costs little
    line = " ".join(text.splitlines())
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return escaped if len(escaped) <= max_characters else _shorten(escaped, max_characters)


def _shorten(text: str, max_characters: int) -> str:
    n_kept = max_characters - len(ELLIPSIS)
    return text[: n_kept - n_kept // 2] + ELLIPSIS + text[len(text) - n_kept // 2 :]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class InputError(Exception):
    """Bad input: one clear line that names the file, tensor or flag. Scripts print it and exit with code 2.

    The constructor makes the line `printable`, as it may quote names and values from a file.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class LogitsNotFinite(InputError):
    """A position's logits hold NaN or an infinity, so that no token can be chosen from them."""

    def __init__(self, position: int):
        super().__init__(
            f"logits are not finite at position {position}: "
            "the weights hold NaN or infinite values, or values too large for float32 arithmetic"
        )


class PositionsLost(InputError):
    """A token cannot be fed after positions whose feeding was interrupted."""


class GenerationOvertaken(RuntimeError):
    """A generator was resumed after its model had been used for something else."""


class ModelInUse(RuntimeError):
    """A thread used a model during a use of one, or launched a kernel during a launch."""


class RunsDiffer(RuntimeError):
    """Two runs on the same input gave different tokens, so that their times are not comparable."""


class MegakernelAborted(RuntimeError):
    """A grid barrier gave up waiting; the message names the phase and the layer."""
