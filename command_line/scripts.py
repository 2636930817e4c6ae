"""The command line of each script: the table SCRIPTS, and the options that one script alone has."""

import argparse
from pathlib import Path

from checkpoints.config import PRESETS
from checkpoints.harmony import REASONING_EFFORTS
from command_line.benchmarks import add_context_arguments, add_request_arguments
from command_line.comparison import add_comparison_arguments, add_output_arguments
from command_line.options import (
    LAYOUTS,
    MAX_CONTEXT_HELP,
    add_checkpoint_arguments,
    add_fp8_arguments,
    add_kernel_arguments,
    add_model_arguments,
    add_path_arguments,
    add_prompt_arguments,
    add_sampling_arguments,
    add_trace_arguments,
)
from command_line.parser import ArgumentParser, natural_number, port_number, positive_int
from system.output_file import output_path

KEY_VARIABLE = "SERVE_API_KEY"
EXCHANGE_SIZES = (4, 1 << 10, 5760, 11520, 46080, 1 << 17, 1 << 20)  # bytes; 11,520: a float32 vector of 2,880


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the first message's setting is, how reasoning is shown, and limits."""
    parser.add_argument("--reasoning", choices=REASONING_EFFORTS, default="medium", help="default: %(default)s")
    parser.add_argument("--system", metavar="TEXT", help="who the model is; default: as it was trained")
    parser.add_argument("--developer", metavar="TEXT", help="instructions")
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="today's date, if the model is to know it")
    parser.add_argument(
        "--show-reasoning",
        choices=("dim", "hide", "raw"),
        default="dim",
        help="reasoning in dim letters, not at all, or like the answer; on a terminal. Default: %(default)s",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=positive_int, help="of an answer; default: no limit")
    parser.add_argument("--max-context", metavar="N", type=positive_int, help=MAX_CONTEXT_HELP)
    parser.add_argument("--time", action="store_true", help="show each answer's times on stderr")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where to listen, whom to answer, and limits."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: %(default)s, this machine")
    parser.add_argument(
        "--port", metavar="N", type=port_number, default=8000, help="default: %(default)s; 0: a free one"
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"that clients must send; default: ${KEY_VARIABLE}, or none")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model; default: from --model")
    parser.add_argument("--reasoning", choices=REASONING_EFFORTS, default="medium", help="default: %(default)s")
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="today's date, if the model is to know it")
    parser.add_argument("--max-context", metavar="N", type=positive_int, help=MAX_CONTEXT_HELP)
    parser.add_argument(
        "--max-queue",
        metavar="N",
        type=natural_number,
        default=32,
        help="requests that may wait while one is answered; default: %(default)s",
    )
    parser.add_argument(
        "--max-request-bytes", metavar="N", type=positive_int, default=1 << 20, help="default: %(default)s"
    )
    parser.add_argument("--max-messages", metavar="N", type=positive_int, default=1024, help="default: %(default)s")
    parser.add_argument(
        "--drain-seconds",
        metavar="N",
        type=natural_number,
        default=30,
        help="that the running answer may take after a signal; default: %(default)s",
    )


def add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source, the task, --layers and --force."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="MODEL", help="folder, hub id or archive to convert or compare with")
    source.add_argument("--random-weights", choices=PRESETS, help="full-size weights of random values, for timing")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", metavar="FILE.iris", type=output_path, help="the archive to write")
    task.add_argument(
        "--verify",
        metavar="FILE.iris",
        type=Path,
        help="compare an archive's checksums, and all it holds with --model if that is given",
    )
    task.add_argument("--info", metavar="FILE.iris", type=Path, help="list what is in an archive")
    parser.add_argument(
        "--layers",
        metavar="N",
        type=positive_int,
        help="convert, or compare with, the first N layers of --model only",
    )
    parser.add_argument("--force", action="store_true", help="replace what is there already, but no file of --model")


def add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --quant and --device."""
    parser.add_argument("--quant", action="store_true", help="round the experts' inputs to MXFP8")
    parser.add_argument("--device", help="torch device of the arithmetic; default: the GPU if there is one")


def add_phased_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --times."""
    parser.add_argument(
        "--times",
        action="store_true",
        help="then time each phase, and the megakernel on the same weights; with --json a second JSON object",
    )


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --layout and --ranks."""
    parser.add_argument("--layout", choices=LAYOUTS, default="tp", help="how ranks share the model; default: tp")
    parser.add_argument(
        "--ranks", metavar="N", type=positive_int, help="run N ranks in the CPU interpreter, without torchrun"
    )


def add_exchange_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --ranks and --bytes."""
    parser.add_argument("--ranks", metavar="N", type=positive_int, help="run N ranks in the CPU interpreter")
    parser.add_argument(
        "--bytes", metavar="N", type=positive_int, nargs="+", default=EXCHANGE_SIZES, help="multiples of 4"
    )


def add_emulator_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --plain, --wave-seed, --quantum and --log."""
    parser.add_argument("--plain", action="store_true", help="memory without delays and caches, waves in turn: faster")
    parser.add_argument("--wave-seed", metavar="N", type=natural_number, default=1, help="order of waves; 0: in turn")
    parser.add_argument(
        "--quantum",
        metavar="N",
        type=positive_int,
        default=100,
        help="instructions that a wave runs at a time, at most; default: %(default)s",
    )
    parser.add_argument("--log", metavar="FILE", type=output_path, help="write what was executed as JSON")


# Path below the root -> what the script does, and the functions that add its options, in the order of --help.
SCRIPTS = {
    "gpt_oss_megakernel.py": (
        "GPT-OSS decoded by one persistent kernel launch per token.",
        [add_model_arguments, add_prompt_arguments, add_kernel_arguments, add_sampling_arguments, add_trace_arguments],
    ),
    "chat.py": (
        "Chat with GPT-OSS.",
        [add_model_arguments, add_chat_arguments, add_kernel_arguments, add_sampling_arguments],
    ),
    "serve.py": (
        "Serve GPT-OSS over HTTP, as the OpenAI API.",
        [add_model_arguments, add_server_arguments, add_kernel_arguments],
    ),
    "bench_tpot.py": (
        "Time per output token at several contexts, and the fraction of the floor.",
        [add_model_arguments, add_fp8_arguments, add_path_arguments, add_context_arguments],
    ),
    "bench_islosl.py": (
        "Time to first token, time per token and throughput of whole requests.",
        [add_model_arguments, add_fp8_arguments, add_path_arguments, add_request_arguments],
    ),
    "acc_eval.py": (
        "Compares the logits of two configurations on the same tokens.",
        [add_model_arguments, add_comparison_arguments, add_output_arguments],
    ),
    "convert_to_iris.py": (
        "Convert a checkpoint to an .iris archive, one file that is enough to run the model; verify or list archives.",
        [add_conversion_arguments, add_fp8_arguments],
    ),
    "run_reference.py": (
        "Generate text with the reference implementation, which is slow and right by definition.",
        [add_checkpoint_arguments, add_prompt_arguments, add_reference_arguments, add_fp8_arguments],
    ),
    "run_triton_phased.py": (
        "GPT-OSS decoded by a launch for each phase: the megakernel's tokens, slower.",
        [add_model_arguments, add_prompt_arguments, add_kernel_arguments, add_phased_arguments],
    ),
    "multi_gpu/run_multi_gpu.py": (
        "GPT-OSS decoded by one persistent kernel launch per token and GPU.",
        [add_model_arguments, add_prompt_arguments, add_kernel_arguments, add_sampling_arguments, add_rank_arguments],
    ),
    "multi_gpu/bench_exchange.py": (
        "Time an exchange between GPUs.",
        [add_exchange_arguments],
    ),
    "tools/run_gfx950.py": (
        "The megakernel's gfx950 machine code, executed on a CPU.",
        [
            add_model_arguments,
            add_prompt_arguments,
            add_kernel_arguments,
            add_sampling_arguments,
            add_emulator_arguments,
        ],
    ),
}


def arguments(script: str) -> argparse.Namespace:
    """Parse the command line of a script of SCRIPTS. Raise InputError if it is wrong, SystemExit after --help."""
    description, groups = SCRIPTS[script]
    parser = ArgumentParser(f"python {script}", description=description)
    for add_arguments in groups:
        add_arguments(parser)
    return parser.parse_args()
