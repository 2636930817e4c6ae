"""Command-line options that scripts share, the choices they stand for, and exit codes."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from checkpoints.checkpoint import Checkpoint
from checkpoints.config import FP8_GROUPS, FP8_ROWS, PRESETS, DenseFormats, held_formats
from host.limits import DEFAULT_CONTEXT, is_out_of_memory
from host.sampling import GREEDY, Sampling, new_seed
from system.errors import EXIT_INPUT_ERROR, InputError, MegakernelAborted, RunsDiffer, printable
from system.output_file import output_path
from system.program import signal_exit_code, signals_as_interrupts, standard_streams

DEMO_CHAT = "Recite sonnet 18."
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "models" / "sonnets"

MAX_CONTEXT_HELP = f"positions in the KV cache; default: {DEFAULT_CONTEXT}, or all of a model with fewer"
FP8_SCALES = {"row": FP8_ROWS, "32": FP8_GROUPS}  # value of --fp8-scale -> dense format
FP8_COMPONENTS = ("qkv", "o", "router", "head")

EXIT_FAILURE = 1
NO_THREAD = "can't start new thread"  # the text of Python's RuntimeError
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises InputError for a wrong command line instead of printing its usage."""

    def error(self, message: str) -> None:
        raise InputError(message)


def parse_arguments(description: str, *groups: Callable[[argparse.ArgumentParser], None]) -> argparse.Namespace:
    """Parse the command line with the options that `groups` add. Raise InputError if it is wrong."""
    parser = ArgumentParser(description=description)
    for add_arguments in groups:
        add_arguments(parser)
    return parser.parse_args()


def run_main(main: Callable[[], None]) -> int:
    """Call `main` and return the process's exit code. system.program says how signals and streams behave meanwhile.

    The code is 0 on success; 2 after an InputError, without enough memory, or if a file or stdout could not be written;
    1 if the kernel gave up or runs that must agree differ; 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP; 141 if the
    reader of stdout is gone. An error is printed as one line on stderr. If stderr cannot be written, the exit code
    still tells the outcome.
    """
    with signals_as_interrupts() as signals, standard_streams() as check_stdout:
        code = _exit_code(check_stdout, signals)  # stdout may be closed from the start
        if code:
            return code
        try:
            code = _exit_code(main, signals)
        except SystemExit:  # --help raises it, for example
            code = _exit_code(check_stdout, signals)
            if code:
                return code
            raise
        return code or _exit_code(check_stdout, signals)


def _exit_code(call: Callable[[], None], signals: list[int]) -> int:
    """Make a call, print its error if it raises one, and return the exit code. `signals` lists those received."""
    try:
        call()
        return 0
    except InputError as error:
        _print_error(str(error))
        return EXIT_INPUT_ERROR
    except (MegakernelAborted, RunsDiffer) as error:
        _print_error(str(error))
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return signal_exit_code(signals)
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return EXIT_INPUT_ERROR
    except Exception as error:  # a library may have turned a KeyboardInterrupt into another exception
        if signals:
            return signal_exit_code(signals)
        if str(error) == NO_THREAD:
            _print_error(f"{error}: the limit on this user's processes, or memory, is reached")
            return EXIT_INPUT_ERROR
        if not is_out_of_memory(error):
            raise
        _print_error(f"not enough memory: {(str(error).splitlines() or ['the system gives no more'])[0]}")
        return EXIT_INPUT_ERROR


def _print_error(message: str) -> None:
    print(f"error: {printable(message)}", file=sys.stderr)


def positive_int(text: str) -> int:
    """Parse an argparse argument as an integer from 1 to 2^31 - 1."""
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def token_id_list(text: str) -> list[int]:
    """Parse an argparse argument as token ids separated by commas or spaces."""
    words = text.replace(",", " ").split()
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 12,34,56")
    return [int(word) for word in words]


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


def load_model(make: Callable, args: argparse.Namespace, checkpoint: Checkpoint, **options):
    """Return make(checkpoint, ...), a model with what the options of add_kernel_arguments and --max-context ask for.

    With --load-rate a line on stderr says how long it took.
    """
    model = make(
        checkpoint,
        args.quant,
        args.max_context,
        num_programs=args.num_programs,
        show_progress=sys.stderr.isatty(),
        dense=dense_formats(args, checkpoint),
        **options,
    )
    if args.load_rate:
        print(model.load_rate(), file=sys.stderr)
    return model


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


def dense_formats(args: argparse.Namespace, checkpoint: Checkpoint) -> DenseFormats:
    """Return the formats of the dense matrices after the options of add_fp8_arguments are applied; see held_formats.

    Raise InputError if a matrix that the checkpoint holds in FP8 is requested in another format, or if --fp8-scale is
    given without a matrix to apply it to.
    """
    flags = dict.fromkeys(args.fp8_components, "--fp8-components")
    if args.fp8_attn:
        flags |= dict.fromkeys(("qkv", "o"), "--fp8-attn")
    if args.fp8_head:
        flags["head"] = "--fp8-head"
    if args.fp8_scale and not flags:
        raise InputError("--fp8-scale: which matrices? see --fp8-attn, --fp8-head and --fp8-components")
    requested = DenseFormats(**dict.fromkeys(flags, FP8_SCALES[args.fp8_scale or "row"]))
    return held_formats(checkpoint, requested, flags)


def formats_text(dense: DenseFormats) -> str:
    """Return the dense matrices that are not bfloat16 and their formats, for example "qkv o fp8-row, head fp8-32"."""
    components = {fp8: [name for name in FP8_COMPONENTS if getattr(dense, name) == fp8] for fp8 in FP8_SCALES.values()}
    return ", ".join(f"{' '.join(names)} {fp8}" for fp8, names in components.items() if names)


def path_name(quant: bool, dense: DenseFormats) -> str:
    """Return a kernel path's name as users see it: "default", "quant" or, for example, "quant, qkv o fp8-row"."""
    return ", ".join(filter(None, ("quant" if quant else "default", formats_text(dense))))


def path_of(implementation: str, quant: bool, dense: DenseFormats) -> str:
    """Return the name of another implementation's path, for example "reference" or "reference-quant"."""
    return f"{implementation}-{path_name(quant, dense)}".replace("-default", "", 1)


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --quant and --both, which exclude each other and which paths_to_measure reads."""
    path = parser.add_mutually_exclusive_group()
    path.add_argument("--quant", action="store_true", help="measure the quantized path instead of the default one")
    path.add_argument("--both", action="store_true", help="measure both, the weights loaded once")


def paths_to_measure(args: argparse.Namespace) -> tuple[bool, ...]:
    """Return, for each path that the options of add_path_arguments select, whether it is the quantized one."""
    return (False, True) if args.both else (args.quant,)


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


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return what the options of add_sampling_arguments ask for. Raise InputError, naming one, if it is out of range.

    Without --temperature the others must be absent, as nothing is drawn. Without --seed, args.seed becomes a new one.
    """
    if args.temperature == 0:
        for name, default in (("seed", None), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if getattr(args, name) != default:
                raise InputError(f"--{name.replace('_', '-')}: nothing is drawn without --temperature")
        return GREEDY
    if args.seed is None:
        args.seed = new_seed()
    try:
        return Sampling(args.temperature, args.seed, args.top_k, args.top_p, args.min_p)
    except InputError as error:
        name, rest = str(error).split(" ", 1)
        raise InputError(f"--{name.replace('_', '-')} {rest}") from None


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
