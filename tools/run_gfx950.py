"""Run the megakernel's gfx950 machine code on this CPU, instruction by instruction, and print what it answers.

python tools/run_gfx950.py --chat "Recite sonnet 18." [--quant] [--max-new-tokens N] [--num-programs N] [--plain]

Takes the options of gpt_oss_megakernel.py. Without --plain, memory is read and written as late as the code's waits
allow, caches keep what the code does not write back or invalidate, and waves run in a random order. Reports what the
emulator objects to on stderr; the exit code is then 1. docs/gfx950.md says what this can and cannot show.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")  # kernels are compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import host.start

import argparse
import dataclasses
import json
import time

import torch

from command_line.run import EXIT_FAILURE, run_main
from command_line.scripts import arguments
from host import cli, generation
from load_model import files_of, open_model
from measure.report import write_file
from tools.gfx950.emulator import STRICT, Conditions
from tools.gfx950.model import TARGET, EmulatedModel, Log

N_PROGRAMS = 4
N_NAMES = 12  # of instructions in the report


def conditions_of(args: argparse.Namespace) -> Conditions:
    """Return the conditions that the command line asks for."""
    if args.plain:
        return Conditions()
    return dataclasses.replace(STRICT, seed=args.wave_seed, quantum=args.quantum)


def report(log: Log, seconds: float) -> str:
    """Return lines that say what was executed."""
    names = ", ".join(f"{name} {count:,}" for name, count in log.mnemonics.most_common(N_NAMES))
    lines = [
        f"gfx950: {log.launches} launches, {log.executed:,} instructions of waves in {seconds:.1f} s: {names}, ...",
        *(f"gfx950: {finding}" for finding in log.findings),
    ]
    return "\n".join(lines)


def log_text(log: Log, seconds: float) -> str:
    """Return the log as JSON."""
    content = {
        "launches": log.launches,
        "executed": log.executed,
        "seconds": seconds,
        "mnemonics": dict(log.mnemonics.most_common()),
        "findings": [str(finding) for finding in log.findings],
    }
    return json.dumps(content, indent=2) + "\n"


def main() -> None:
    args = arguments("tools/run_gfx950.py")
    sampling = cli.sampling_of(args)
    generation.check_outputs(args)
    checkpoint, tokenizer = open_model(args, torch.device("cpu"))
    prompt_ids = generation.prompt_ids_from(args, tokenizer, checkpoint.config)
    with generation.logits_writer(args.logits_out, checkpoint.config.vocab_size, files_of(checkpoint)) as on_logits:
        args.num_programs = args.num_programs or N_PROGRAMS
        model = cli.load_model(EmulatedModel, args, checkpoint, conditions=conditions_of(args))
        name = f"{TARGET} emulated, {cli.path_name(args.quant, model.config.dense)}"
        start = time.perf_counter()
        generation.print_answer(args, model, name, prompt_ids, tokenizer, on_logits, sampling)
    log, seconds = model.emulator.log, time.perf_counter() - start
    print(report(log, seconds), file=sys.stderr)
    if args.log:
        write_file("--log", args.log, log_text(log, seconds).encode(), files_of(checkpoint))
    if log.findings:
        raise SystemExit(EXIT_FAILURE)


if __name__ == "__main__":
    sys.exit(run_main(main))
