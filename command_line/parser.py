"""The parser of command lines, and the values that several options take."""

import argparse

from system.errors import InputError

MAX_PORT = 65535


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises InputError, with a hint at --help, instead of printing its usage."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")


def positive_int(text: str) -> int:
    """Parse an argparse argument as an integer from 1 to 2^31 - 1."""
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def natural_number(text: str) -> int:
    """Parse an argparse argument as an integer from 0 to 2^31 - 1."""
    return 0 if text == "0" else positive_int(text)


def port_number(text: str) -> int:
    """Parse an argparse argument as a port; 0 is any free one."""
    port = natural_number(text)
    if port > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: at most {MAX_PORT}")
    return port


def token_id_list(text: str) -> list[int]:
    """Parse an argparse argument as token ids separated by commas or spaces."""
    words = text.replace(",", " ").split()
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 12,34,56")
    return [int(word) for word in words]
