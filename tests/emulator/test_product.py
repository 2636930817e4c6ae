"""The product's gfx950 code, executed by the emulator, against the CPU interpreter: what make test-gfx950 runs."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from emulated import PATHS, ROOT, answer_of_command
from made_up_models import ODD_SIZES, random_token_ids, small_config
from shipped import FOLDER, SONNET_18_START
from worker import Case, answer_of

from checkpoints.config import FP8_GROUPS, FP8_ROWS
from checkpoints.harmony import chat_ids
from gpt_oss_megakernel import MegaModel
from tokenizer_util import Tokenizer

SECONDS = 3600
# Relative to the norm of logits, or of a position's keys in a layer. Sums of float32 are added in another order, so
# that here and there a key or a value of the cache is rounded to the other bfloat16, and with --quant an activation to
# the other E4M3. Where two experts are nearly equal for the router, one position's later layers differ by more.
TOLERANCE, QUANT_TOLERANCE = 2e-3, 5e-2
KEY_TOLERANCE, WORST_KEY_TOLERANCE = 2**-8, 0.4  # a last place of bfloat16; for a position whose expert is another
KEY_SHARE, QUANT_KEY_SHARE = 0.9, 0.6  # of layers and positions that are within the first
CHAT = tuple(chat_ids(Tokenizer.from_folder(FOLDER), "Recite sonnet 18."))
FORMATS = {"bfloat16": None, "FP8 rows": FP8_ROWS, "FP8 groups": FP8_GROUPS}


def emulated(case: Case, folder) -> dict:
    """Return the emulated answer. The emulator must report nothing."""
    (folder / "case").write_text(json.dumps(dataclasses.asdict(case)))
    command = [sys.executable, "tests/emulator/worker.py", str(folder / "case"), str(folder / "answer")]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    answer = torch.load(folder / "answer")
    assert not answer["findings"], answer["findings"]
    print(f"\n{case}: {answer['launches']} launches, {answer['executed']:,} instructions")
    return answer


def check(case: Case, folder) -> None:
    """Compare the emulator's answer with the interpreter's."""
    found = emulated(case, folder)
    options = case.options() | {"num_programs": min(case.n_programs, 8)}
    expected = answer_of(MegaModel(case.checkpoint(), device="cpu", **options), case)
    assert found["tokens"] == expected["tokens"]
    error = (found["logits"] - expected["logits"]).norm() / expected["logits"].norm()
    print(f"logits: {error:.1e}")
    assert error <= (QUANT_TOLERANCE if case.quant else TOLERANCE)
    if case.n_tokens:
        keys, expected_keys = found["keys"].float(), expected["keys"].float()
        errors = (keys - expected_keys).norm(dim=(1, 3)) / expected_keys.norm(dim=(1, 3))  # [layers, positions]
        print(f"keys: median {errors.median():.1e}, worst {errors.max():.1e}")
        assert (errors <= KEY_TOLERANCE).float().mean() >= (QUANT_KEY_SHARE if case.quant else KEY_SHARE)
        assert errors.max() <= WORST_KEY_TOLERANCE


@pytest.mark.parametrize("path", ["default", "quant"])
def test_the_whole_sonnet(path, tmp_path):
    """Prompt in blocks, then 170 tokens and more, each from what the emulated code has left."""
    options = ["--chat", "Recite sonnet 18.", "--max-context", "512", *PATHS[path]]
    found = answer_of_command("tools/run_gfx950.py", [*options, "--plain"], interprets=False)
    expected = answer_of_command("gpt_oss_megakernel.py", options, interprets=True)
    assert found["token_ids"] == expected["token_ids"]
    assert SONNET_18_START in found["text"]
    assert found["finish"] == "stop"


@pytest.mark.parametrize("n_programs", [1, 3, 8])
@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("quant", [False, True])
def test_paths_and_programs(quant, fp8, n_programs, tmp_path):
    check(Case("shipped", CHAT, 4, quant, FORMATS[fp8], n_programs=n_programs), tmp_path)


@pytest.mark.parametrize("name", ODD_SIZES)
@pytest.mark.parametrize("quant", [False, True])
def test_odd_sizes(quant, name, tmp_path):
    prompt = tuple(random_token_ids(12, small_config(**ODD_SIZES[name])))
    check(Case(name, prompt, 3, quant, n_programs=3, context=64), tmp_path)


@pytest.mark.parametrize("n_tokens", [16, 77, 300])
@pytest.mark.parametrize("quant", [False, True])
def test_prompts_in_blocks(quant, n_tokens, tmp_path):
    """300 tokens take more than one tile of every kernel."""
    prompt = tuple(CHAT[n % len(CHAT)] for n in range(n_tokens))
    check(Case("shipped", prompt, 2, quant, context=512, is_plain=n_tokens == 300), tmp_path)


@pytest.mark.parametrize("n_cached", [1000, 5000])
def test_long_contexts(n_cached, tmp_path):
    """Attention splits the cache over programs, which merge their parts."""
    check(Case("shipped", CHAT[:4], 0, n_programs=8, context=8192, n_cached=n_cached), tmp_path)


@pytest.mark.parametrize("quant", [False, True])
def test_the_published_width(quant, tmp_path):
    """Two layers of 120b's width with random weights: sizes as published, all tiles of a matrix."""
    prompt = tuple(range(5, 8))
    check(Case("120b", prompt, 1, quant, n_layers=2, n_programs=64, context=64, is_plain=True), tmp_path)


@pytest.mark.parametrize("wave_seed", range(2, 6))
def test_other_orders_of_waves(wave_seed, tmp_path):
    """The order in which waves run changes no bit."""
    case = Case("shipped", CHAT[:6], 2, quant=True)
    first = emulated(case, tmp_path)
    other = emulated(dataclasses.replace(case, wave_seed=wave_seed), tmp_path)
    assert other["tokens"] == first["tokens"]
    assert torch.equal(other["logits"], first["logits"])


@pytest.mark.parametrize("quant", [False, True])
def test_a_program_that_never_arrives_ends_the_launch(quant, tmp_path):
    """The others give up within their bound of polls, and after a reset the model answers again."""
    answer = emulated(Case("shipped", CHAT, quant=quant, n_programs=4, n_absent=1), tmp_path)
    assert answer["error"].startswith("a program did not arrive at the barrier after the embedding")
    assert answer["after"] == answer["before"]
