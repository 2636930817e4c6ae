"""A small model in a folder with a byte-level tokenizer, and a way to run a script's command line on it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from made_up_models import MemoryCheckpoint, loud_checkpoint, small_config

from checkpoints.checkpoint import write_checkpoint
from command_line.run import run_main
from tokenizer_util import BYTE_OF_CHARACTER

SPECIALS = ("<|start|>", "<|message|>", "<|end|>")


REPORT_KEYS = [
    "prompt_ids",
    "token_ids",
    "text",
    "ttft_ms",
    "tpot_ms",
    "device",
    "path",
    "finish",
    "temperature",
    "seed",
    "top_k",
    "top_p",
    "min_p",
]  # --json


def small_checkpoint() -> MemoryCheckpoint:
    """Make a checkpoint whose vocabulary is the 256 bytes, the special tokens and unused ids.

    Its only stop id is 262.
    """
    return loud_checkpoint(small_config(n_layers=2, layer_is_sliding=(True, False), vocab_size=264, stop_ids=(262,)))


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Make a tokenizer of one token per byte, whose id is the byte, and the special tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(BYTE_OF_CHARACTER), merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIALS])
    return backend


def write_model(folder: Path, shards: int = 1) -> Path:
    write_checkpoint(small_checkpoint(), folder, shards)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def run_script(
    main: Callable[[], None], words: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str, str]:
    """Run a command line in this process; return (exit code, stdout, stderr)."""
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *map(str, words)])
        code = run_main(main)
    return code, *capsys.readouterr()


def assert_rejected(result: tuple[int, str, str], *culprits: str) -> None:
    """Assert exit code 2, nothing on stdout, and one line on stderr that names each culprit."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for culprit in culprits:
        assert culprit in err
