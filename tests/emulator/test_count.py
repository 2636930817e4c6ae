"""What tools/count_gfx950.py counts for 120b's experts, against arithmetic on their sizes."""

import json
import os
import subprocess
import sys

from emulated import ROOT, SECONDS

from checkpoints.config import GPT_OSS_120B
from host.launch import GFX950

PADDED_K = 3072  # a row of 2,880 in blocks of 1,024
BYTES = 0.5 + 1 / 32  # of an element, with its scale


def test_experts_cost_what_their_sizes_say(tmp_path):
    command = [sys.executable, "tools/count_gfx950.py", "--quant", "--layers", "1", "--programs", "8"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command += ["--json", str(tmp_path / "costs.json")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=SECONDS)
    costs = {cost["phase"]: cost for cost in json.loads((tmp_path / "costs.json").read_text())}
    n_chosen = GPT_OSS_120B.experts_per_token
    rows = {"gate_up_phase": 2 * GPT_OSS_120B.intermediate_size, "down_phase": GPT_OSS_120B.hidden_size}
    assert GFX950.experts.gate_up_k == GFX950.experts.down_k == 1024
    for phase, n_rows in rows.items():
        elements = n_chosen * n_rows * PADDED_K
        assert costs[phase]["instructions"]["matrix"] == elements // (16 * 128)  # each once, by one wave
        assert elements * BYTES <= costs[phase]["weight_bytes"] <= 1.1 * elements * BYTES
    head = GPT_OSS_120B.vocab_size * GPT_OSS_120B.hidden_size * 2
    assert head <= costs["head_phase"]["weight_bytes"] <= 1.01 * head
    assert costs["head_phase"]["instructions"]["vector"] > GPT_OSS_120B.vocab_size * GPT_OSS_120B.hidden_size // 64
