"""The megakernel's gfx950 code in the emulator, for a few tokens of the shipped model, against the interpreter.

tests/emulator has the other formats and more, which takes longer: make test-gfx950.
"""

import pytest
from emulated import PATHS, check_agreement

PROMPT = (1020, 440, 1022, 389)
N_TOKENS = 2


@pytest.mark.parametrize("path", ["default", "quant, FP8 groups"])
def test_a_few_tokens(path, tmp_path):
    prompt = ["--prompt-ids", ",".join(map(str, PROMPT)), "--max-new-tokens", str(N_TOKENS), "--max-context", "64"]
    check_agreement([*prompt, *PATHS[path], "--num-programs", "3"], tmp_path)
