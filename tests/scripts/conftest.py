"""The small model that the tests of most scripts run on.

tests/conftest.py installs the interpreter after this file is imported, so that kernels are imported by the fixtures.
"""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The small model in a folder. Tests must not change it."""
    from small_model import write_model

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint():
    """The small model in memory."""
    from small_model import small_checkpoint

    return small_checkpoint()
