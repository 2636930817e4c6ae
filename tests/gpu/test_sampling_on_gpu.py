"""Sampled answers on a GPU: for any number of programs, and on the CPU interpreter too."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gumbel import expected_noise
from test_megakernel_on_gpu import CUDA, endless

from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import GPT_OSS_120B
from gpt_oss_megakernel import MegaModel
from host.sampling import Sampling

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint():
    return RandomCheckpoint(endless(GPT_OSS_120B.cut(1)), device=CUDA)


@pytest.fixture(scope="module")
def model(checkpoint):
    return MegaModel(checkpoint, max_context=512)


def test_the_number_of_programs_does_not_change_an_answer(model, checkpoint):
    sampling = Sampling(1.0, 12)
    expected = list(model.generate([1, 2, 3], 40, sampling=sampling))
    assert expected != list(model.generate([1, 2, 3], 40))
    for num_programs in (1, 61, 131):
        other = MegaModel(checkpoint, max_context=64, num_programs=num_programs, weights=model.weights)
        assert list(other.generate([1, 2, 3], 40, sampling=sampling)) == expected


def test_tokens_are_those_that_the_logits_give(model):
    """Each drawn token has the largest of logits / temperature + noise, to float32's precision."""
    rows: list[torch.Tensor] = []
    tokens = list(model.generate([1, 2, 3], 4, rows.append, Sampling(0.7, 5)))
    for position, token in enumerate(tokens, 2):
        candidates = (rows[position] / 0.7).topk(50).indices.tolist()
        candidates += torch.randint(0, model.config.vocab_size, (3000,)).tolist() + [token]
        scores = {row: float(rows[position][row]) / 0.7 + expected_noise(5, position, row) for row in candidates}
        assert scores[token] >= max(scores.values()) - 1e-4


def test_draws_follow_the_probabilities(model):
    """The first token of 500 answers with a seed each: logits of the tokens drawn are as likely as they should be."""
    rows: list[torch.Tensor] = []
    list(model.generate([1, 2, 3], 1, rows.append))
    log_probabilities = torch.log_softmax(rows[2].double(), 0)
    first = [next(iter(model.generate([1, 2, 3], 1, sampling=Sampling(1.0, seed)))) for seed in range(500)]
    found = log_probabilities[first]
    mean = float((log_probabilities.exp() * log_probabilities).sum())
    variance = float((log_probabilities.exp() * (log_probabilities - mean) ** 2).sum())
    assert abs(float(found.mean()) - mean) < 4 * math.sqrt(variance / 500)


def test_the_interpreter_says_the_same():
    words = ["gpt_oss_megakernel.py", "--temperature", "2", "--seed", "3", "--max-new-tokens", "40", "--json"]
    answers = []
    for interpreted in ("0", "1"):
        environment = os.environ | {
            "TRITON_INTERPRET": interpreted,
            "CUDA_VISIBLE_DEVICES": "" if interpreted == "1" else "0",
        }
        command = [sys.executable, *words]
        output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300).stdout
        answers.append(json.loads(output))
    assert answers[0]["device"] != answers[1]["device"] == "cpu"
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
