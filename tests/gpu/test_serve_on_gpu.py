"""The endpoint's times on a GPU, beside the benchmarks' of the same model in the same process."""

import contextlib
import http.client
import importlib.util
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("starlette") is None, reason="Starlette is not installed")

ROOT = Path(__file__).parents[2]
N_LAYERS = 36
OUTPUT_TOKENS = 65
REPEATS = 7
MAX_TPOT_RATIO = 1.03
MAX_TTFT_DIFFERENCE_MS = 3


@pytest.fixture(scope="module")
def served():
    """Serve random weights in another process; return the benchmarks' figures, and a client's connection."""
    command = [sys.executable, "tests/gpu/serve_worker.py", str(N_LAYERS)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            figures, address = json.loads(process.stdout.readline()), process.stdout.readline().strip()
            with contextlib.closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)) as connection:
                yield figures, connection
        finally:
            process.terminate()


def marks(connection: http.client.HTTPConnection, prompt: list[int]) -> Iterator[float]:
    """Yield the time of a request in seconds, and of each piece of its streamed text."""
    body = {"model": "random", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "stream": True}
    yield time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["text"]:
            yield time.perf_counter()


@pytest.mark.parametrize("n_input", [96, 1024])
def test_times_are_those_of_the_benchmarks(n_input, served):
    figures, connection = served
    generator, ttft_ms, tpot_ms = random.Random(n_input), [], []
    for repeat in range(1 + REPEATS):  # the first warms up
        start, *tokens = marks(connection, [repeat + 1, *generator.choices(range(2000, 200_000), k=n_input - 1)])
        assert len(tokens) == OUTPUT_TOKENS
        ttft_ms.append((tokens[0] - start) * 1e3)
        tpot_ms.append((tokens[-1] - tokens[0]) / (len(tokens) - 1) * 1e3)
    ttft, tpot = median(ttft_ms[1:]), median(tpot_ms[1:])
    expected = figures[str(n_input)]
    print(f"{n_input} tokens: first {ttft:.2f} ms, each {tpot:.3f} ms; the benchmarks: {expected}")
    assert tpot <= MAX_TPOT_RATIO * expected["tpot_ms"]
    assert ttft <= expected["ttft_ms"] + MAX_TTFT_DIFFERENCE_MS
