"""Convert a checkpoint to an .iris archive, one file that is enough to run the model; verify or list archives."""

import host.start

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoints.checkpoint import Checkpoint, RandomCheckpoint
from checkpoints.config import PRESETS, held_formats
from checkpoints.fp8 import QuantizedCheckpoint
from checkpoints.iris_compare import first_difference
from checkpoints.iris_writer import write_archive
from command_line.options import FP8_COMPONENTS
from command_line.run import run_main
from command_line.scripts import arguments
from host import cli
from load_iris import IrisArchive, open_archive
from load_model import files_of, open_checkpoint
from system.errors import InputError
from system.output_file import check_output
from system.program import signals_deferred
from tokenizer_util import Tokenizer


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Raises InputError if options are wrong or do not go together."""
    args = arguments("convert_to_iris.py")
    if args.out and not (args.model or args.random_weights):
        raise InputError("--out: what to convert? --model or --random-weights says so")
    if not args.out and (args.random_weights or args.force):
        raise InputError("--random-weights and --force go with --out")
    if not args.out and (args.fp8_attn or args.fp8_head or args.fp8_components or args.fp8_scale):
        raise InputError("--fp8-attn, --fp8-head, --fp8-components and --fp8-scale go with --out")
    if args.layers and not (args.out or args.model):
        raise InputError("--layers: of which --model?")
    if args.info and args.model:
        raise InputError("--info takes no --model")
    return args


def convert(args: argparse.Namespace) -> None:
    """Write args.out, and print its size and the rate. An interrupted run says how to go on."""
    check_output(args.out, args.force)  # before a download
    try:
        source = open_source(args)
        Tokenizer.from_checkpoint(source)  # refuse now what could not be loaded later
        checkpoint = QuantizedCheckpoint(source, cli.dense_formats(args, source))
        start = time.perf_counter()
        with signals_deferred() as check:
            n_bytes = write_archive(
                checkpoint,
                args.out,
                args.force,
                show_progress=True,
                on_terminal=sys.stderr.isatty(),
                check=check,
                inputs=files_to_keep(source, rewritten=args.layers is None and checkpoint.config == source.config),
            )
    except KeyboardInterrupt:
        print(f"interrupted: {args.out} was not written; the same command starts again", file=sys.stderr)
        raise
    seconds = time.perf_counter() - start
    print(f"{args.out}: {n_bytes / 1e9:.3f} GB in {seconds:.1f} s, {n_bytes / 1e9 / seconds:.2f} GB/s")


def files_to_keep(source: Checkpoint, rewritten: bool) -> list[Path]:
    """Return the source's files that --force must not replace: all, but not an archive that is `rewritten` whole."""
    files = files_of(source)
    return files[1:] if rewritten and isinstance(source, IrisArchive) else files


def open_source(args: argparse.Namespace) -> Checkpoint:
    """Open the checkpoint to convert. Random weights have no stop ids and no tokenizer."""
    if args.model:
        return open_checkpoint(args.model, args.layers)
    config = PRESETS[args.random_weights]
    config = dataclasses.replace(config if args.layers is None else config.cut(args.layers), stop_ids=())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return RandomCheckpoint(config, device=device, name=f"random {args.random_weights}")


def verify(path: Path, model: str | None, n_layers: int | None) -> None:
    """Compare an archive with its checksums, and with a checkpoint's first layers if `model` names one.

    Matrices that are FP8 in the archive and bfloat16 in the checkpoint are quantized and compared bit by bit. Raises
    InputError if anything differs, if there is nothing to compare with, or if the archive's tokenizer cannot be loaded.
    """
    archive = open_archive(path)
    if archive.header.digests is None and model is None:
        raise InputError(f"{path}: version 1 holds no checksums; --model names a checkpoint to compare with")
    Tokenizer.from_checkpoint(archive)  # a bad tokenizer may be equal on both sides
    if archive.header.digests is not None:
        archive.verify(show_progress=sys.stderr.isatty())
        print(f"{path}: {len(archive.header.entries)} checksums match")
    if model is not None:
        checkpoint = open_checkpoint(model, n_layers)
        dense = held_formats(checkpoint, archive.config.dense, dict.fromkeys(FP8_COMPONENTS, str(path)))
        checkpoint = QuantizedCheckpoint(checkpoint, dense)
        difference = first_difference(archive, checkpoint, show_progress=sys.stderr.isatty())
        if difference:
            raise InputError(f"{path}: {difference} differs from that of {model}")
        print(f"{path}: the same as {model}")


def describe(archive: IrisArchive) -> Iterator[str]:
    """Yield the lines that describe an archive; equal tensors of several layers share a line."""
    header, config = archive.header, archive.config
    yield f"{archive.name}: version {header.version}, {header.file_bytes / 1e9:.3f} GB, values in published order"
    yield f"checksums: {'none' if header.digests is None else 'SHA-256 of each tensor and of the header'}"
    yield f"layers {config.n_layers}, hidden {config.hidden_size}, intermediate {config.intermediate_size}"
    yield f"heads {config.n_heads}, KV heads {config.n_kv_heads}, head_dim {config.head_dim}"
    yield f"experts {config.n_experts}, {config.experts_per_token} for each token"
    yield f"vocabulary {config.vocab_size}, stop ids {', '.join(map(str, config.stop_ids)) or 'none'}"
    yield f"positions {config.max_position_embeddings}"
    if formats := cli.formats_text(config.dense):
        yield f"dense matrices {formats}"
    alike = {}
    for entry in header.entries.values():
        layer, _, rest = entry.name.rpartition(".")
        is_layer = layer[:1] == "L" and layer[1:].isdecimal()
        alike.setdefault((f"L*.{rest}" if is_layer else entry.name, entry.dtype, entry.shape), []).append(entry)
    for (name, dtype, shape), entries in alike.items():
        size = sum(entry.n_bytes for entry in entries)
        kind = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        yield f"  {name:24} {len(entries):4} x {kind:32} {size / 1e6:12.3f} MB"


def main() -> None:
    """Convert, verify or list, as the command line says."""
    args = parse_arguments()
    if args.out:
        convert(args)
    elif args.verify:
        verify(args.verify, args.model, args.layers)
    else:
        print("\n".join(describe(open_archive(args.info))))


if __name__ == "__main__":
    sys.exit(run_main(main))
