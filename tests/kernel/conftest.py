"""Fixtures of the kernel's tests.

tests/conftest.py installs the interpreter after this file is imported, so that kernels are imported by the fixtures.
"""

import pytest


@pytest.fixture(scope="module")
def checkpoint():
    """A small random checkpoint under which small mistakes show."""
    from made_up_models import loud_checkpoint, small_config

    return loud_checkpoint(small_config())


@pytest.fixture(scope="module", params=[False, True], ids=["default", "quant"])
def quant(request):
    """Whether the quantized path is tested, or the default one."""
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread: the reference's matrices are too small for more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
