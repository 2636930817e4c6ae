"""Compare the emulated gfx950 code with the CPU interpreter, both started as programs of the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PATHS = {
    "default": (),
    "quant": ("--quant",),
    "FP8 rows": ("--fp8-attn", "--fp8-head"),
    "quant, FP8 groups": ("--quant", "--fp8-attn", "--fp8-head", "--fp8-scale", "32"),
}
# Of logits up to 30: both add in float32, in another order. Without quantized activations nothing else differs.
TOLERANCE = 2e-5
SECONDS = 3600


def answer_of_command(script: str, options: list[str], interprets: bool) -> dict:
    """Return the JSON that a script prints."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interprets))}
    command = [sys.executable, script, "--json", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_agreement(options: list[str], folder: Path) -> None:
    """Check that the emulator reports nothing, and that tokens and logits are the interpreter's.

    All positions are fed one by one. The emulator's exit code says whether it reported something.
    """
    answers = {}
    for script, interprets in (("tools/run_gfx950.py", False), ("gpt_oss_megakernel.py", True)):
        path = folder / f"{Path(script).stem}.npy"
        answer = answer_of_command(script, [*options, "--logits-out", str(path)], interprets)
        answers[script] = answer["token_ids"], np.load(path)
    (tokens, logits), (expected, reference) = answers.values()
    assert tokens == expected
    assert np.abs(logits - reference).max() <= TOLERANCE
