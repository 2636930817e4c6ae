"""Every launch whose machine code tools/compare_code.py compares: decoding, and prompts in blocks.

A launch's name says what it is for, by path, target, sizes, formats and step, and stays when its kernel is renamed or
moved:

    decode/sm_90/120b/quant/fp8-row
    prompt/gfx950/20b/default/bf16/gate-up/300-tokens
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from triton.compiler import CompiledKernel

from checkpoints.config import BF16, FP8_GROUPS, FP8_ROWS, PRESETS, DenseFormats
from host.launch import LAUNCH_TABLE
from host.tuning import Tuning
from tools.compile_prefill import compile_launch, launches_of_block
from tools.compile_report import PATHS, TARGETS, compile_megakernel

Launch = tuple[str, Callable[[], CompiledKernel]]

FORMATS = (BF16, FP8_ROWS, FP8_GROUPS)
FLOAT32_CACHE_STAGES = 1  # stages of the ring that a float32 cache displaces in shared memory, at the sizes of PRESETS
# Together these use each tile of host/launch.py.
BLOCK_TOKENS = (5, 300, 500, 700, 2048, 4000)
BLOCK_STEPS = (
    "embed",
    "attention-norm",
    "qkv",
    "append",
    "attention",
    "o",
    "expert-norm",
    "router",
    "grouping",
    "blocks",
    "gate-up",
    "down",
)
LAST_LAYER_STEPS = ("attention-norm", "qkv", "append")


def launches() -> Iterator[Launch]:
    """Return name -> function that compiles it, for each launch."""
    for target, size in itertools.product(TARGETS, PRESETS):
        yield from _decoding_launches(target, size)
    for target, size in itertools.product(TARGETS, PRESETS):
        yield from _prompt_launches(target, size)


def _decoding_launches(target: str, size: str) -> Iterator[Launch]:
    for path, dense in itertools.product(PATHS, FORMATS):
        config = replace(PRESETS[size], dense=DenseFormats(qkv=dense, o=dense, head=dense))
        compiler = functools.partial(compile_megakernel, target, PATHS[path], config)
        name = f"decode/{target}/{size}/{path}/{dense}"
        yield name, compiler
        if path == "default" and dense == BF16:
            tuning = _float32_cache_tuning(target, size)
            yield f"{name}/float32-cache", functools.partial(compiler, tuning, torch.float32)
            yield f"{name}/traced", functools.partial(compiler, trace=True)


def _float32_cache_tuning(target: str, size: str) -> Tuning:
    """Return the tuning with the ring as short as MegaModel makes it beside a float32 cache."""
    tuning = LAUNCH_TABLE[target].tuning(PRESETS[size])
    if not tuning.ring:
        return tuning
    return replace(tuning, ring=replace(tuning.ring, stages=tuning.ring.stages - FLOAT32_CACHE_STAGES))


def _prompt_launches(target: str, size: str) -> Iterator[Launch]:
    cases = [(*case, torch.bfloat16) for case in itertools.product(PATHS, FORMATS)]
    for path, dense, kv_dtype in [*cases, ("default", BF16, torch.float32)]:
        config = replace(PRESETS[size], dense=DenseFormats(qkv=dense, o=dense, router=dense))
        prefix = f"prompt/{target}/{size}/{path}/{dense}{'/float32-cache' if kv_dtype == torch.float32 else ''}"
        seen = set()
        for n_tokens in BLOCK_TOKENS:
            launched = launches_of_block(target, PATHS[path], n_tokens, config, kv_dtype)
            steps = BLOCK_STEPS + LAST_LAYER_STEPS
            for step, (kernel, _, arguments, options) in zip(steps, launched, strict=True):
                if (step, str(options)) not in seen:
                    seen.add((step, str(options)))
                    compiler = functools.partial(compile_launch, target, kernel, arguments, options)
                    yield f"{prefix}/{step}/{n_tokens}-tokens", compiler
