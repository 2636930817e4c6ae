"""Generate text with a model on several GPUs.

torchrun --nproc-per-node 2 multi_gpu/run_multi_gpu.py --layout tp --quant
python multi_gpu/run_multi_gpu.py --layout tp --ranks 2      # in the CPU interpreter

docs/multi_gpu.md describes the layouts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import host.start

import argparse
import contextlib
import os

from checkpoints.config import held_formats
from command_line.run import run_main
from command_line.scripts import arguments
from host import cli, generation
from host.limits import context_length
from host.sampling import Sampling
from load_model import files_of, open_model
from multi_gpu.group import Group
from multi_gpu.protocol import check_ranks
from multi_gpu.ranks import RankModel
from system.errors import InputError


def facts_of(args: argparse.Namespace, checkpoint) -> dict:
    """Return what all ranks must agree on, by the name that an error gives it."""
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()}
    for name in ("--json", "--logits-out", "--seed"):  # those of rank 0 count
        del options[name]
    return {"the model": checkpoint.config} | options


def main() -> None:
    args = arguments("multi_gpu/run_multi_gpu.py")
    sampling = cli.sampling_of(args)
    if sampling.leaves_out and args.layout == "roles":
        raise InputError("--layout roles: a rank with experts has no logits to leave tokens out of; use --layout tp")
    group = Group(args.ranks)
    with contextlib.ExitStack() as stack:
        stack.callback(group.close)
        if group.rank > 0:  # rank 0 speaks for all
            args.logits_out = None if args.logits_out is None else Path(os.devnull)
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        checkpoint, tokenizer, prompt_ids = group.together(lambda: open_inputs(args, group))
        group.check_same(facts_of(args, checkpoint))
        run(args, group, checkpoint, tokenizer, prompt_ids, group.first(sampling))


def open_inputs(args: argparse.Namespace, group: Group):
    """Return the checkpoint, its tokenizer and the prompt, all checked."""
    check_ranks(args.layout, group.n_ranks)
    if group.rank == 0:
        generation.check_outputs(args)
    checkpoint, tokenizer = open_model(args)
    held_formats(checkpoint, cli.dense_formats(args, checkpoint))
    return checkpoint, tokenizer, generation.prompt_ids_from(args, tokenizer, checkpoint.config)


def run(
    args: argparse.Namespace, group: Group, checkpoint, tokenizer, prompt_ids: list[int], sampling: Sampling
) -> None:
    """Generate and print the answer, which all ranks compute."""
    max_context = context_length(checkpoint.config, args.max_context)
    wanted = args.logits_out is not None
    path = args.logits_out if group.rank == 0 else None
    with generation.logits_writer(path, checkpoint.config.vocab_size, files_of(checkpoint)) as on_logits:
        if wanted and on_logits is None:
            on_logits = lambda logits: None  # noqa: E731 - the launches must be rank 0's
        model = RankModel.of_group(
            group,
            checkpoint,
            args.layout,
            args.quant,
            max_context=max_context,
            num_programs=args.num_programs,
            dense=cli.dense_formats(args, checkpoint),
            show_progress=group.rank == 0 and sys.stderr.isatty(),
        )
        if args.load_rate and group.rank == 0:
            print(model.load_rate(), file=sys.stderr)
        name = f"{args.layout} {group.n_ranks}, {cli.path_name(args.quant, model.config.dense)}"
        name += ", shared GPU, no timing" if group.shares_gpu else ""
        with model.naming_lost_ranks():
            generation.print_answer(args, model, name, prompt_ids, tokenizer, on_logits, sampling)


if __name__ == "__main__":
    sys.exit(run_main(main))
