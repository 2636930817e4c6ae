"""Tests run kernels in Triton's CPU interpreter, which is bound when a module with kernels is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from host import cpu_interpreter  # noqa: E402

cpu_interpreter.install()
