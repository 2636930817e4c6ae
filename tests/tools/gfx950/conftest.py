"""Small kernels, compiled once for all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def kernels(once) -> dict[str, dict]:
    """Return name -> a case's assembly and LDS, compiled in another process, because this one interprets kernels."""

    def compiled() -> dict:
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        command = [sys.executable, "tests/tools/gfx950/small_kernels.py"]
        return json.loads(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True).stdout)

    return once("gfx950 small kernels", compiled)
