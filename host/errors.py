"""The errors that a user's input or machine can cause."""


class InputError(Exception):
    """Bad input: one clear line that names the file, tensor or flag. Scripts print it and exit with code 2."""


class MegakernelAborted(RuntimeError):
    """A grid barrier gave up waiting: the message names the phase and the layer."""
