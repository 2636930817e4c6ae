"""Turn the errors and the output of Triton's compilers into messages for a user."""

import contextlib
from collections.abc import Iterator

import torch
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

from system.errors import InputError

COMPILERS = ("PassManager", "LLD")  # words in the RuntimeErrors of MLIR and of AMD's linker


@contextlib.contextmanager
def compile_errors(device: torch.device) -> Iterator[None]:
    """Turn an error that a GPU's compilers raise in the body into an InputError of one line."""
    try:
        yield
    except InterpreterError:
        raise
    except (TritonError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in COMPILERS):
            raise
        lines = str(first_cause(error)).splitlines() or [type(error).__name__]
        line = next((line for line in lines if "; error" in line), lines[-1])
        raise InputError(f"device {device}: Triton cannot compile the kernels: {line.strip()}") from None


def first_cause(error: BaseException) -> BaseException:
    """Return the error that a chain of errors began with: Triton raises one for each function that calls another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def quiet_compilers() -> None:
    """Keep Triton from printing a kernel's whole PTX (18,000 lines) when NVIDIA's assembler rejects it."""

    def print_unless_reproducer(*values, **options) -> None:
        if not any("please share the reproducer" in str(value) for value in values):
            print(*values, **options)

    nvidia_compiler.print = print_unless_reproducer
