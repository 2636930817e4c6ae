"""The errors that a user's input or machine can cause."""

EXIT_INPUT_ERROR = 2  # of a script that ends by an InputError
MOST_CHARACTERS = 500  # of an error's line: enough for a path and a reason
CUT = " [...] "


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """One line of at most `most` characters, of which a long text keeps its beginning and its end.

    A stranger's words may hold what would move a terminal's cursor: all that is not printable comes out as an escape.
    """
    if len(text) > most:
        text = _cut(text, most)  # first, so that a text of any length costs little
    line = " ".join(text.splitlines())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return shown if len(shown) <= most else _cut(shown, most)


def _cut(text: str, most: int) -> str:
    kept = most - len(CUT)
    return text[: kept - kept // 2] + CUT + text[len(text) - kept // 2 :]


class InputError(Exception):
    """Bad input: one clear line that names the file, tensor or flag. Scripts print it and exit with code 2.

    The line is made `printable` here, whatever names and values of a file it holds.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class LogitsNotFinite(InputError):
    """A position's logits hold NaN or an infinity, so that no token follows from them."""

    def __init__(self, position: int):
        super().__init__(
            f"logits are not finite at position {position}: "
            "the weights hold NaN or infinite values, or values too large for float32 arithmetic"
        )


class PositionsLost(InputError):
    """A token cannot be fed behind positions that an interrupted call was feeding."""


class GenerationOvertaken(RuntimeError):
    """A generator's model has been put to another use since its last token."""


class ModelInUse(RuntimeError):
    """A thread uses a model while it is amid a use of one, or launches a kernel amid a launch."""


class RunsDiffer(RuntimeError):
    """The same input gave different tokens twice: what was timed is not what it seems."""


class MegakernelAborted(RuntimeError):
    """A grid barrier gave up waiting: the message names the phase and the layer."""
