"""Options that several scripts share, with their choices and defaults.

host/cli.py, host/generation.py, measure/ and multi_gpu/ carry out what they ask for.
"""

import argparse
from pathlib import Path

from checkpoints.config import FP8_GROUPS, FP8_ROWS, PRESETS
from command_line.parser import positive_int, token_id_list
from system.output_file import output_path

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "models" / "sonnets"
DEMO_CHAT = "Recite sonnet 18."
DEFAULT_CONTEXT = 4096  # positions
MAX_CONTEXT_HELP = f"positions in the KV cache; default: {DEFAULT_CONTEXT}, or all of a model with fewer"
FP8_SCALES = {"row": FP8_ROWS, "32": FP8_GROUPS}  # value of --fp8-scale -> dense format
FP8_COMPONENTS = ("qkv", "o", "router", "head")  # fields of DenseFormats
DEFAULT_TRACE_TOKEN = 16  # by then the caches are warm
LAYOUTS = ("roles", "tp")  # see multi_gpu/protocol.py


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add --model, --layers and --verify. Return the group of the options that exclude --model."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=".iris archive, checkpoint folder or hub id; default: the shipped one",
    )
    parser.add_argument("--layers", metavar="N", type=positive_int, help="use the first N layers only")
    parser.add_argument("--verify", action="store_true", help="compare an archive with its checksums first")
    return source


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --random-weights and the options of add_checkpoint_arguments."""
    source = add_checkpoint_arguments(parser)
    source.add_argument("--random-weights", choices=PRESETS, help="full-size weights made on the device")


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --quant, --num-programs, --load-rate and the options of add_fp8_arguments."""
    parser.add_argument("--quant", action="store_true", help="experts as FP4 x FP8, activations quantized on the way")
    add_fp8_arguments(parser)
    parser.add_argument("--num-programs", metavar="N", type=positive_int, help="default: all that are resident at once")
    parser.add_argument("--load-rate", action="store_true", help="say how long loading took, and at what rate")


def add_fp8_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --fp8-attn, --fp8-head, --fp8-components and --fp8-scale, which dense_formats reads."""
    parser.add_argument("--fp8-attn", action="store_true", help="QKV and O projection in FP8 (E4M3)")
    parser.add_argument("--fp8-head", action="store_true", help="LM head in FP8")
    parser.add_argument(
        "--fp8-components", metavar="LIST", type=component_list, default=(), help="single ones: qkv,o,router,head"
    )
    parser.add_argument(
        "--fp8-scale",
        choices=FP8_SCALES,
        help="FP8 weights share a float32 scale by row (default), or an E8M0 one by 32 along a row",
    )


def component_list(text: str) -> tuple[str, ...]:
    """Parse an argparse argument as fields of DenseFormats, separated by commas or spaces."""
    names = tuple(text.replace(",", " ").split())
    if not names or not set(names) <= set(FP8_COMPONENTS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(FP8_COMPONENTS)}")
    return names


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --quant and --both, which exclude each other and which paths_to_measure reads."""
    path = parser.add_mutually_exclusive_group()
    path.add_argument("--quant", action="store_true", help="measure the quantized path instead of the default one")
    path.add_argument("--both", action="store_true", help="measure both, the weights loaded once")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --temperature, --seed, --top-k, --top-p and --min-p, which sampling_of reads."""
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="default: 0, the likeliest token")
    parser.add_argument("--seed", metavar="N", type=int, help="equal seeds give equal answers; default: a new one")
    parser.add_argument("--top-k", metavar="N", type=int, default=0, help="draw among the N likeliest tokens")
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="draw among the likeliest tokens that add up to P"
    )
    parser.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        default=0.0,
        help="draw among tokens at least P times as likely as the likeliest",
    )


def add_report_arguments(parser: argparse.ArgumentParser, drawing: str) -> None:
    """Add --json and --plot; `drawing` says what the plot shows. measure.report checks and writes the files."""
    parser.add_argument("--json", metavar="FILE", type=output_path, help="write everything measured as JSON")
    parser.add_argument("--plot", metavar="FILE.png", type=output_path, help=f"draw {drawing}; needs matplotlib")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one of --prompt, --chat or --prompt-ids, and --max-new-tokens, --max-context, --json and --logits-out."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help='text to continue; "-": what stdin holds')
    prompt.add_argument(
        "--chat",
        metavar="TEXT",
        help=f'message to answer, in the harmony format; "-": what stdin holds; default: that, or {DEMO_CHAT!r}',
    )
    prompt.add_argument("--prompt-ids", metavar="IDS", type=token_id_list, help="the prompt as token ids: 12,34,56")
    parser.add_argument("--max-new-tokens", metavar="N", type=positive_int, help="default: as the context has room for")
    parser.add_argument(
        "--max-context",
        metavar="N",
        type=positive_int,
        help=MAX_CONTEXT_HELP,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text as it appears")
    parser.add_argument(
        "--logits-out",
        metavar="FILE.npy",
        type=output_path,
        help="write float32 logits [steps, vocabulary], a row for each position fed, the prompt's included",
    )


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --trace and --trace-token, which token_to_trace reads."""
    parser.add_argument(
        "--trace",
        metavar="FILE.json",
        type=output_path,
        help="time the phases of one token, as a Chrome trace and a table",
    )
    parser.add_argument(
        "--trace-token",
        metavar="N",
        type=positive_int,
        help=f"time the Nth generated token; default: {DEFAULT_TRACE_TOKEN}, or the last one",
    )


def add_gpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --gpus and --layout, which open_group reads."""
    parser.add_argument("--gpus", metavar="N", type=positive_int, help="split the model over N GPUs of this machine")
    parser.add_argument("--layout", choices=LAYOUTS, default="tp", help="how several GPUs share the model; default: tp")
