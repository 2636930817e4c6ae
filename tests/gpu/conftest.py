"""Run several processes on one GPU: `make test-gpu` has one for most cores, because compiling takes the longest.

Tests of a group run in one process, one after another, so that they share what they load and compile. All groups with
weights of 120b's width together fit a card of 141 GB; a smaller one needs fewer processes, for example PYTEST_ARGS="-n
2". A test that times something, or wants most of the memory, runs while no other test does.
"""

import fcntl
import gc
import os
import re

import pytest
import torch

ALONE = r"test_bench_\w+_on_gpu|test_ranks_on_gpu|test_all_layers_decode|test_not_enough_memory"
GROUPS = {
    "memcheck": r"test_memcheck",
    "float32 cache": r"test_layers_and|test_attention_over|test_200_steps|test_the_number_of|test_float32_cache",
    "bfloat16 cache": r"test_prefill_on_gpu.*test_(logits|a_prompt|the_same|all_of)|test_the_driver_refuses",
    "shipped model": r"test_the_shipped_model_(recites|says_the_same_from_an_archive\[)|test_demo_prompt",
    **{name: rf"test_(full_width|dense_matrices_in_fp8)\[(.*\W)?{name}\b" for name in ("fp8-row", "fp8-32", "mixed")},
}


def is_alone(test_id: str) -> bool:
    return re.search(ALONE, test_id) is not None


def group_of(test_id: str) -> str | None:
    """Return the group of tests that a test shares things with: equal path, default or quantized, and equal kernels."""
    if is_alone(test_id):
        return "alone"
    path = "quant" if re.search(r"\bquant\b", test_id) else "default"
    return next((f"{name}, {path}" for name, pattern in GROUPS.items() if re.search(pattern, test_id)), None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Return the number of processes for -n auto: one for each core, except some for the host's work."""
    return max(1, min(12, (os.cpu_count() or 1) - 2))


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        """A schedule by group. --dist loadgroup would need marks, and xdist 3.8 ignores it under pytest 9.2."""

        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid) or nodeid

    config.option.loadscopereorder = False  # in the order of pytest_collection_modifyitems
    return ByGroup(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Run groups first, because each takes longer than a single test. Tests that need the GPU alone come last."""
    items.sort(key=lambda item: (is_alone(item.nodeid), group_of(item.nodeid) is None))


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several processes, which take all cores together
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Hold the GPU, shared or alone, for a test with its fixtures of any scope."""
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if is_alone(item.nodeid) else fcntl.LOCK_SH)
        return (yield)


@pytest.fixture(autouse=True)
def free_memory():
    """Free the GPU memory that this process no longer uses: other processes want it."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
