"""Known mistakes of a grid barrier, planted in the Triton source: the emulator notices them."""

import json
import os
import subprocess
import sys

from emulated import ROOT, SECONDS

# On one GPU the last program to leave a launch only zeroes counters: it reads nothing that others have stored.
WITHOUT_EFFECT = {"whoever comes last acquires nothing"}


def test_planted_mistakes_are_noticed():
    command = [sys.executable, "tests/emulator/traps.py"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == 9
    assert {name for name, outcome in outcomes.items() if outcome == "unnoticed"} == WITHOUT_EFFECT
