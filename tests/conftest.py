"""Run kernels in Triton's CPU interpreter, except in tests/gpu, which is collected only when asked for alone.

Triton binds either the interpreter or the compiler when a module with kernels is imported, so that one process cannot
have both.
"""

import gc
import os
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"
GPU_ONLY = pytest.StashKey[bool]()


def pytest_configure(config):
    asked_for = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    config.stash[GPU_ONLY] = all(path.is_relative_to(GPU_TESTS) for path in asked_for)
    if config.stash[GPU_ONLY]:
        os.environ.pop("TRITON_INTERPRET", None)
        return
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the blocks are too small for threads
    if hasattr(config, "workerinput"):  # one of several processes, which take all cores together
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import interpreter

    interpreter.install()
    # A twentieth of a test's time: the interpreter makes many objects, few of them in cycles.
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.is_relative_to(GPU_TESTS) and not config.stash[GPU_ONLY] else None


def pytest_collection_modifyitems(items, config):
    if not config.stash[GPU_ONLY]:
        return
    import torch

    for item in items:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
