"""The errors that a user's input or machine can cause."""

EXIT_INPUT_ERROR = 2  # of a script that ends by an InputError


class InputError(Exception):
    """Bad input: one clear line that names the file, tensor or flag. Scripts print it and exit with code 2."""


class RunsDiffer(RuntimeError):
    """The same input gave different tokens twice: what was timed is not what it seems."""


class MegakernelAborted(RuntimeError):
    """A grid barrier gave up waiting: the message names the phase and the layer."""
