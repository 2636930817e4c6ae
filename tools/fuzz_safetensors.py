"""Damage a shard of a checkpoint in random ways; each must be refused in one line, or hold what its header says.

    python -m tools.fuzz_safetensors --cases 100000 --seed 1
Run from the repository's root. A case is a small shard after one to three mutations of its header, its header's length
or its bytes. A case that raises anything but an InputError, takes longer than 2 s, or gives a tensor other values than
those its header points to, read here without safetensors, is printed, and the exit code is 1. A case depends only on
the seed and its number, so that `--first NUMBER --cases 1` repeats it.
"""

import json
import random
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is run as a file
import host.start

import torch

from checkpoints.checkpoint import WEIGHTS_NAME, RandomCheckpoint, write_checkpoint
from checkpoints.config import ModelConfig, expected_tensors
from command_line.run import run_main
from load_hf import open_checkpoint
from tools.fuzzing import JSON_VALUES, MOST_SECONDS, count, outcome, parse_arguments

CONFIG = ModelConfig(
    n_layers=1,
    n_experts=2,
    experts_per_token=1,
    hidden_size=32,
    intermediate_size=32,
    n_heads=2,
    n_kv_heads=1,
    head_dim=16,
    vocab_size=24,
    layer_is_sliding=(True,),
    stop_ids=(),
)
LENGTH = struct.Struct("<Q")
DTYPES = ("BF16", "U8", "F16", "F32", "I8", "F8_E4M3", "F4", "BOOL", "C64", "Q7", "bf16", "")
NAMES = ("", "__metadata__", "x", "lm_head.weight", "model.layers.1.self_attn.sinks", "a\nb", "\ud800", "\0", "\u202e")
NUMBERS = (-1, 0, 1, 2, 8, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1.5, 1e400)


@dataclass
class Shard:
    """The parts of a file: 8 bytes of length, the header, the tensors' bytes."""

    header: bytes
    data: bytes
    length: int | None = None  # a wrong length of the header

    @classmethod
    def of(cls, file: bytes) -> "Shard":
        end = LENGTH.size + LENGTH.unpack_from(file)[0]
        return cls(file[LENGTH.size : end], file[end:])

    def encode(self) -> bytes:
        return LENGTH.pack(len(self.header) if self.length is None else self.length) + self.header + self.data


# Mutations: each changes a shard in place. The first three work on any header, the others leave one that is no JSON.

Mutation = Callable[[random.Random, Shard], None]


def edit_bytes(rng: random.Random, shard: Shard) -> None:
    """Replace some bytes by others, perhaps by more or fewer."""
    header = bytearray(shard.header)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(header) + 1)
        new = rng.choice((rng.randbytes(rng.randint(0, 4)), bytes(rng.choices(b'{}[]",:0123456789 \\', k=2))))
        header[at : at + rng.randint(0, 4)] = new
    shard.header = bytes(header)


def replace_value(rng: random.Random, shard: Shard) -> None:
    """Replace one JSON value by another, perhaps of another type."""
    text = shard.header.decode("utf-8", "replace")
    values = [match.span(1) for match in re.finditer(r'[:\[,]\s*("[^"]*"|[\d.e+-]+|\[[\d, ]*\]|\{[^{}]*\})', text)]
    if values:
        start, end = rng.choice(values)
        new = rng.choice((*JSON_VALUES, json.dumps(rng.choice(NUMBERS)), json.dumps(rng.choice(DTYPES))))
        shard.header = (text[:start] + new + text[end:]).encode()


def change_length(rng: random.Random, shard: Shard) -> None:
    """Change the stated length of the header, or the length of the file."""
    n = len(shard.header)
    if rng.random() < 0.5:
        shard.length = rng.choice((0, 1, n - 1, n + 1, rng.randrange(n + 1), n + len(shard.data), *NUMBERS[1:11]))
    elif rng.random() < 0.5:
        shard.data = shard.data[: rng.choice((0, len(shard.data) - 1, rng.randrange(len(shard.data) + 1)))]
    else:
        shard.data += bytes(rng.choice((1, 2, 8, 4096)))


def change_entry(rng: random.Random, shard: Shard) -> None:
    """Change a field of a tensor's entry."""

    def change(names: list[str], entries: dict) -> None:
        entry = entries[rng.choice(names)]
        key = rng.choice(("dtype", "shape", "data_offsets", "other"))
        if key == "dtype":
            entry[key] = rng.choice(DTYPES)
        elif key == "other" or not isinstance(entry.get(key), list):
            entry[key] = rng.choice((None, 0, [], "x"))
        elif rng.random() < 0.3:
            entry[key] = rng.choice((entry[key][::-1], entry[key][:-1], [*entry[key], 1], [1, *entry[key]], []))
        else:
            at = rng.randrange(len(entry[key]) or 1)
            near = [entry[key][at] + by for by in (-16, -2, -1, 1, 2, 16)] if entry[key] else []
            entry[key][at : at + 1] = [rng.choice((*NUMBERS, *near))]

    _change_json(shard, change)


def change_places(rng: random.Random, shard: Shard) -> None:
    """Let tensors take the places of others, overlap, or leave a gap."""

    def change(names: list[str], entries: dict) -> None:
        a, b = (entries[rng.choice(names)] for _ in range(2))
        how = rng.randrange(4)
        if how == 0:
            a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
        elif how == 1:
            a["data_offsets"] = list(b["data_offsets"])
        else:
            by = rng.choice((-64, -2, 2, 64))
            for entry in [entries[name] for name in names] if how == 2 else [a]:
                entry["data_offsets"] = [at + by for at in entry["data_offsets"]]

    _change_json(shard, change)


def change_names(rng: random.Random, shard: Shard) -> None:
    """Remove, rename, reorder or repeat tensors."""

    def change(names: list[str], entries: dict) -> None:
        name, how = rng.choice(names), rng.randrange(4)
        entry = entries.pop(name)
        if how == 1:
            entries[rng.choice(NAMES)] = entry
        elif how == 2:
            entries[name] = entry
        elif how == 3:
            entries[rng.choice(NAMES)] = dict(entry, shape=[0], data_offsets=[0, 0])

    _change_json(shard, change)


def repeat_entry(rng: random.Random, shard: Shard) -> None:
    """Repeat a tensor's entry, with another dtype or place in the first or the last one."""

    def change(names: list[str], entries: dict) -> None:
        name = rng.choice(names)
        other = rng.choice((entries[name], dict(entries[name], dtype="F16"), entries[rng.choice(names)]))
        double = f"{json.dumps(name)}: {json.dumps(other)}"
        text = json.dumps(entries)[1:-1]
        entries.clear()
        entries[None] = "{" + ", ".join(rng.choice(((double, text), (text, double)))) + "}"

    _change_json(shard, change)


def swap_bytes(rng: random.Random, shard: Shard) -> None:
    """Change bytes of values, which any reader must accept."""
    at = rng.randrange(len(shard.data) or 1)
    shard.data = shard.data[:at] + rng.randbytes(8) + shard.data[at + 8 :]


MUTATIONS: tuple[Mutation, ...] = (
    edit_bytes,
    replace_value,
    change_length,
    change_entry,
    change_entry,
    change_places,
    change_names,
    repeat_entry,
    swap_bytes,
)


def _change_json(shard: Shard, change: Callable[[list[str], dict], None]) -> None:
    """Call `change` with the tensors' names and the whole header; {None: text} in it stands for any other text."""
    try:
        entries = json.loads(shard.header)
        names = [name for name, entry in entries.items() if {"dtype", "shape", "data_offsets"} <= entry.keys()]
        if not names:
            return
        change(names, entries)
        shard.header = (entries[None] if None in entries else json.dumps(entries)).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return  # an earlier mutation has left no such header


def mutated(rng: random.Random, file: bytes) -> bytes:
    """Return a shard after one to three mutations."""
    shard = Shard.of(file)
    for mutation in rng.choices(MUTATIONS, k=rng.choice((1, 1, 2, 3))):
        mutation(rng, shard)
    return shard.encode()


# Outcomes


def problem_or_message(folder: Path) -> tuple[str | None, str | None]:
    """Return tools.fuzzing.outcome of reading the checkpoint, both None if it can be read."""
    return outcome(lambda: read_all(folder), f"{folder / WEIGHTS_NAME}: ", MOST_SECONDS)


def read_all(folder: Path) -> None:
    """Open a checkpoint and read all of it. Raises AssertionError unless it gives exactly what the header states."""
    tensors = dict(open_checkpoint(folder).tensors())
    shard = Shard.of((folder / WEIGHTS_NAME).read_bytes())
    pairs = json.loads(shard.header, object_pairs_hook=lambda pairs: pairs)
    stored = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
    assert sorted(name for name, _ in stored) == sorted(tensors) == sorted(expected_tensors(CONFIG))
    end = 0
    for name, entry in sorted(stored, key=lambda item: item[1]["data_offsets"]):
        (shape, dtype), (start, stop) = expected_tensors(CONFIG)[name], entry["data_offsets"]
        assert (tuple(entry["shape"]), entry["dtype"], start) == (shape, dtype, end), f"{name} is {entry}"
        raw, end = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes(), stop
        assert raw == shard.data[start:stop], f"{name} has other values"
    assert end == len(shard.data)


def main() -> None:
    args = parse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(RandomCheckpoint(CONFIG), name)
        shard = folder / WEIGHTS_NAME
        whole = shard.read_bytes()

        def outcomes() -> Iterator[tuple[int, str | None, str | None]]:
            for number in range(args.first, args.first + args.cases):
                shard.write_bytes(mutated(random.Random(f"{args.seed} {number}"), whole))
                yield number, *problem_or_message(folder)

        count(outcomes(), args, f"{shard}: ")


if __name__ == "__main__":
    sys.exit(run_main(main))
