"""What the command lines of the kernel and of the reference share: the prompt, the output, the exit codes."""

import argparse
import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from host.arguments import instance
from host.checkpoint import Checkpoint
from host.config import FP8_GROUPS, FP8_ROWS, PRESETS, DenseFormats, ModelConfig, check_token, held_formats
from host.devices import check_supported
from host.errors import EXIT_INPUT_ERROR, InputError, MegakernelAborted, RunsDiffer, printable
from host.limits import DEFAULT_CONTEXT, context_length, is_out_of_memory
from host.output_file import check_output, output_path, replacing
from host.program import signal_exit_code, signals_as_interrupts, standard_streams

DEMO_CHAT = "Recite sonnet 18."
RANDOM_WEIGHTS_PROMPT = (0,)  # where there is no tokenizer any token will do
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "models" / "sonnets"

FP8_SCALES = {"row": FP8_ROWS, "32": FP8_GROUPS}  # what --fp8-scale says
FP8_COMPONENTS = ("qkv", "o", "router", "head")

CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline

EXIT_FAILURE = 1
NO_THREAD = "can't start new thread"  # what Python's RuntimeError says
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class ArgumentParser(argparse.ArgumentParser):
    """One whose complaints are InputErrors, hence one line."""

    def error(self, message: str) -> None:
        raise InputError(message)


def run_main(main: Callable[[], None]) -> int:
    """Calls `main` and returns the process's exit code; see host.program for what signals and streams do meanwhile.

    0; 2 after an InputError, without enough memory, or where a file or stdout could not be written; 1 if the kernel
    gave up or runs that must agree differ; 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP; 141 if the reader of stdout
    is gone. Errors are one line on stderr; where that is lost, the exit code still tells.
    """
    with signals_as_interrupts() as came, standard_streams() as check_stdout:
        code = _exit_code(check_stdout, came)  # it may be closed
        if code:
            return code
        try:
            code = _exit_code(main, came)
        except SystemExit:  # of --help, for example
            code = _exit_code(check_stdout, came)
            if code:
                return code
            raise
        return code or _exit_code(check_stdout, came)


def _exit_code(call: Callable[[], None], came: list[int]) -> int:
    """Of a call, after which an error is printed; `came` are the signals so far."""
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
        return signal_exit_code(came)
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return EXIT_INPUT_ERROR
    except Exception as error:  # a library may have made another one of KeyboardInterrupt
        if came:
            return signal_exit_code(came)
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
    """An argparse type."""
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def token_id_list(text: str) -> list[int]:
    """An argparse type: ids separated by commas or spaces."""
    words = text.replace(",", " ").split()
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 12,34,56")
    return [int(word) for word in words]


def torch_device(device: torch.device | str | None, for_kernels: bool = False) -> torch.device:
    """The device asked for, or the GPU if there is one. InputError unless it can hold numbers and give them back.

    for_kernels: a GPU must also be one that the kernels can be compiled for.
    """
    instance(device, torch.device | str, "device")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if for_kernels and torch.device(device).type == "cuda":
            check_supported(torch.device(device))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: {str(error).splitlines()[0]}") from None
    return torch.device(device)


def device_name(device: torch.device) -> str:
    """What a person calls it: the GPU's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def add_model_arguments(parser: argparse.ArgumentParser, random_weights: bool = True) -> None:
    """--model, --random-weights, --layers, --verify."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=".iris archive, checkpoint folder or hub id; default: the shipped one",
    )
    if random_weights:
        source.add_argument("--random-weights", choices=PRESETS, help="full-size weights made on the device")
    parser.add_argument("--layers", metavar="N", type=positive_int, help="use the first N layers only")
    parser.add_argument("--verify", action="store_true", help="compare an archive with its checksums first")


def add_fp8_arguments(parser: argparse.ArgumentParser) -> None:
    """--fp8-attn, --fp8-head, --fp8-components, --fp8-scale; see dense_formats."""
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
    """An argparse type: fields of DenseFormats, separated by commas."""
    names = tuple(text.replace(",", " ").split())
    if not names or not set(names) <= set(FP8_COMPONENTS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(FP8_COMPONENTS)}")
    return names


def dense_formats(args: argparse.Namespace, checkpoint: Checkpoint) -> DenseFormats:
    """What add_fp8_arguments asks for beyond what the checkpoint has, see held_formats.

    InputError if that is another format than the checkpoint's, or a scale is given to nothing.
    """
    flags = dict.fromkeys(args.fp8_components, "--fp8-components")
    if args.fp8_attn:
        flags |= dict.fromkeys(("qkv", "o"), "--fp8-attn")
    if args.fp8_head:
        flags["head"] = "--fp8-head"
    if args.fp8_scale and not flags:
        raise InputError("--fp8-scale: which matrices? see --fp8-attn, --fp8-head and --fp8-components")
    asked = DenseFormats(**dict.fromkeys(flags, FP8_SCALES[args.fp8_scale or "row"]))
    return held_formats(checkpoint, asked, flags)


def formats_text(dense: DenseFormats) -> str:
    """What is not in bfloat16: "qkv o fp8-row, head fp8-32" for example."""
    names = {kind: [name for name in FP8_COMPONENTS if getattr(dense, name) == kind] for kind in FP8_SCALES.values()}
    return ", ".join(f"{' '.join(found)} {kind}" for kind, found in names.items() if found)


def path_name(quant: bool, dense: DenseFormats) -> str:
    """What a user calls a path through the kernel: "default", "quant" or, for example, "quant, qkv o fp8-row"."""
    return ", ".join(filter(None, ("quant" if quant else "default", formats_text(dense))))


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    """--quant or --both; see paths_to_measure."""
    path = parser.add_mutually_exclusive_group()
    path.add_argument("--quant", action="store_true", help="measure the quantized path instead of the default one")
    path.add_argument("--both", action="store_true", help="measure both, the weights loaded once")


def paths_to_measure(args: argparse.Namespace) -> tuple[bool, ...]:
    """What add_path_arguments asks for: of each path whether it is the quantized one."""
    return (False, True) if args.both else (args.quant,)


def add_report_arguments(parser: argparse.ArgumentParser, drawing: str) -> None:
    """--json and --plot, which shows a `drawing`; see host.report."""
    parser.add_argument("--json", metavar="FILE", type=output_path, help="write everything measured as JSON")
    parser.add_argument("--plot", metavar="FILE.png", type=output_path, help=f"draw {drawing}; needs matplotlib")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """--prompt, --chat or --prompt-ids, --max-new-tokens, --max-context, --json, --logits-out."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument(
        "--chat", metavar="TEXT", help=f"message to answer, in the harmony format; default: {DEMO_CHAT!r}"
    )
    prompt.add_argument("--prompt-ids", metavar="IDS", type=token_id_list, help="the prompt as token ids: 12,34,56")
    parser.add_argument("--max-new-tokens", metavar="N", type=positive_int, default=256, help="default: %(default)s")
    parser.add_argument(
        "--max-context",
        metavar="N",
        type=positive_int,
        help=f"positions in the KV cache; default: {DEFAULT_CONTEXT}, or all of a model with fewer",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text as it appears")
    parser.add_argument(
        "--logits-out",
        metavar="FILE.npy",
        type=output_path,
        help="write float32 logits [steps, vocabulary], a row for each position fed, the prompt's included",
    )


def prompt_ids_from(args: argparse.Namespace, tokenizer, config: ModelConfig) -> list[int]:
    """The prompt that `add_prompt_arguments` describes, the demo's if there is none.

    Without a `tokenizer` (tokenizer_util.Tokenizer) the default is RANDOM_WEIGHTS_PROMPT, and text is refused.
    InputError if the prompt is empty, does not fit --max-context, or has an id outside the vocabulary.
    """
    max_context = context_length(config, args.max_context)
    flag, ids = _encode_prompt(args, tokenizer)
    if not ids:
        raise InputError(f"{flag}: the prompt is empty")
    for token_id in ids:
        check_token(token_id, config)
    if len(ids) > max_context:
        raise InputError(f"{flag}: {len(ids)} tokens do not fit in a context of {max_context}; see --max-context")
    return ids


def _encode_prompt(args: argparse.Namespace, tokenizer) -> tuple[str, list[int]]:
    if args.prompt_ids is not None:
        return "--prompt-ids", args.prompt_ids
    if args.prompt is not None:
        return "--prompt", _needed(tokenizer, "--prompt").encode(args.prompt)
    if args.chat is None and tokenizer is None:
        return "--prompt-ids", list(RANDOM_WEIGHTS_PROMPT)
    text = DEMO_CHAT if args.chat is None else args.chat
    return "--chat", _needed(tokenizer, "--chat").encode_chat(text) if text.strip() else []


def _needed(tokenizer, flag: str):
    if tokenizer is None:
        raise InputError(f"{flag}: this model has no tokenizer; use --prompt-ids")
    return tokenizer


def check_outputs(args: argparse.Namespace) -> None:
    """InputError if --logits-out, or --trace where there is one, could not be written: known before a download."""
    for flag, path in (("--logits-out", args.logits_out), ("--trace", getattr(args, "trace", None))):
        if path is not None:
            check_output(path, True, flag=flag)


@contextlib.contextmanager
def logits_writer(
    path: Path | None, vocab_size: int, inputs: Sequence[Path] = ()
) -> Iterator[Callable[[torch.Tensor], None] | None]:
    """A function that appends logits [vocab_size] to an .npy file; without a path it is None.

    InputError if the file cannot be written, is one of `inputs`, or the disk is full. See host.output_file.
    """
    if path is None:
        yield None
        return
    n_rows = 0
    # NumPy pads the header so that the number of rows can grow in place.
    start = len(_npy_header(0, vocab_size))
    with replacing(path, start, True, inputs=inputs, flag="--logits-out", alone=False) as file:

        def append(logits: torch.Tensor) -> None:
            nonlocal n_rows
            file.write(logits.float().cpu().numpy().tobytes(), start + n_rows * vocab_size * 4)
            n_rows += 1

        file.write(_npy_header(0, vocab_size), 0)
        yield append
        file.write(_npy_header(n_rows, vocab_size), 0)


def _npy_header(n_rows: int, n_columns: int) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (n_rows, n_columns)})
    return header.getvalue()


@dataclass
class Generation:
    """What one run produced, and how fast. Times are in milliseconds of wall clock."""

    prompt_ids: list[int]
    token_ids: list[int]  # a stop id, if one came, is the last
    text: str | None  # without the stop token; None without a tokenizer
    ttft_ms: float | None  # time to the first token, the prompt's work included; None if there was none
    tpot_ms: float | None  # mean time of each further token; None if there was none
    device: str
    path: str  # which implementation ran


def stream_generation(
    tokens: Iterable[int],
    prompt_ids: list[int],
    tokenizer,
    config: ModelConfig,
    max_new_tokens: int,
    device: str,
    path: str,
    as_json: bool,
) -> Generation:
    """Draws the tokens and prints them to stdout: text as it appears and a summary line, or one JSON object.

    Without a tokenizer the ids are printed. Control characters of the text are escaped on a terminal, and only there. A
    sequence that ends before max_new_tokens without a stop id has filled
    the context; stderr says so.
    """
    text, token_ids, arrivals = "", [], []
    stream = tokenizer.stream() if tokenizer else None
    start = time.perf_counter()
    for token in tokens:
        arrivals.append(time.perf_counter())
        token_ids.append(token)
        if stream is None:
            piece = f"{token} "
        else:
            piece = "" if token in config.stop_ids else stream.push(token)
        text += piece
        _print_piece(piece, as_json)
    if stream is not None:
        tail = stream.flush()
        text += tail
        _print_piece(tail, as_json)
    stopped = bool(token_ids) and token_ids[-1] in config.stop_ids
    generation = Generation(
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        text=text if tokenizer else None,
        ttft_ms=(arrivals[0] - start) * 1e3 if arrivals else None,
        tpot_ms=(arrivals[-1] - arrivals[0]) * 1e3 / (len(arrivals) - 1) if len(arrivals) > 1 else None,
        device=device,
        path=path,
    )
    print(json.dumps(generation.__dict__) if as_json else f"\n{summary(generation)}", flush=True)
    if len(token_ids) < max_new_tokens and not stopped:
        held = len(prompt_ids) + len(token_ids) - 1  # the last one is not fed
        print(f"context full: stopped after {held} tokens", file=sys.stderr)
    return generation


def summary(generation: Generation) -> str:
    """One line: tokens, time to the first, time per further token, device and path."""

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} ms"

    return (
        f"[{len(generation.prompt_ids)} prompt + {len(generation.token_ids)} new tokens, "
        f"TTFT {ms(generation.ttft_ms)}, {ms(generation.tpot_ms)} per token, {generation.device}, {generation.path}]"
    )


def _print_piece(piece: str, as_json: bool) -> None:
    if piece and not as_json:
        print(_for_terminal(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def _for_terminal(text: str) -> str:
    """A model's text without what a terminal would take as a command; lines and tabs stay."""
    return CONTROL_CHARACTERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
