"""Time random weights of 120b's sizes with the benchmarks' functions, then serve them until a signal comes.

python tests/gpu/serve_worker.py LAYERS

Prints two lines: {INPUT TOKENS: {"ttft_ms": ..., "tpot_ms": ...}}, and where it listens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import host.start

import json

import bench_islosl
import bench_tpot
from checkpoints.checkpoint import TOKENIZER_NAME, RandomCheckpoint, WithoutStopIds
from checkpoints.config import GPT_OSS_120B, ModelConfig
from command_line.options import DEFAULT_MODEL
from command_line.run import run_main
from endpoint import app, server, worker
from gpt_oss_megakernel import MegaModel
from host.backend import usable_device
from tokenizer_util import Tokenizer

OUTPUT_TOKENS = 65
INPUT_TOKENS = (96, 1024)
REPEATS = 5
CONTEXT = 2048


def tokenizer_of(config: ModelConfig) -> Tokenizer:
    """Return the shipped model's tokenizer with a word for each id that it lacks."""
    content = json.loads((Path(DEFAULT_MODEL) / TOKENIZER_NAME).read_text())
    vocab = content["model"]["vocab"]
    known = {*vocab.values(), *(token["id"] for token in content["added_tokens"])}
    vocab |= {f"Ġword{n}": n for n in range(config.vocab_size) if n not in known}
    return Tokenizer.from_json(json.dumps(content).encode(), "made-up tokenizer")


def figures(model: MegaModel) -> dict:
    """Return the medians of what bench_islosl.py and bench_tpot.py measure at the requests' lengths."""
    found = {}
    for n in INPUT_TOKENS:
        shape, steps = bench_islosl.Shape(n, OUTPUT_TOKENS), OUTPUT_TOKENS - 1
        prompts = bench_islosl.make_prompts(shape, REPEATS, model.config.vocab_size, model.config.stop_ids)
        request = bench_islosl.measure(model, shape, prompts)
        context = n + steps // 2
        decoding = bench_tpot.measure(model, bench_tpot.Plan((context,), steps, REPEATS, CONTEXT), context, None)
        found[n] = {"ttft_ms": request.ttft_ms.median, "tpot_ms": decoding.device_ms.median}
    return found


def main() -> None:
    device = usable_device(None)
    checkpoint = WithoutStopIds(RandomCheckpoint(GPT_OSS_120B.cut(int(sys.argv[1])), device=device))
    model = MegaModel(checkpoint, max_context=CONTEXT, device=device)
    print(json.dumps(figures(model)), flush=True)
    line = worker.Worker(model, tokenizer_of(model.config), 1)
    with server.bound_socket("127.0.0.1", 0) as bound:
        endpoint = app.Endpoint(line, app.Settings("random"))
        ready = server.address_of(bound)
        server.serve_until_signal(server.Server(endpoint.app(), line, lambda: print(ready, flush=True), 1), bound)


if __name__ == "__main__":
    sys.exit(run_main(main))
