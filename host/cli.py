"""What the command lines of the kernel and of the reference share: the prompt, the output, the exit codes."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from host.config import ModelConfig, check_token
from host.errors import InputError

DEMO_CHAT = "Recite sonnet 18."
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "models" / "sonnets"

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class ArgumentParser(argparse.ArgumentParser):
    """One whose complaints are InputErrors, hence one line."""

    def error(self, message: str) -> None:
        raise InputError(message)


def run_main(main: Callable[[], None]) -> int:
    """Calls `main` and returns the process's exit code: 0, 2 after an InputError, 130 after Ctrl-C, 141 if stdout closed."""
    try:
        main()
        sys.stdout.flush()
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


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


def torch_device(name: str | None) -> torch.device:
    """The named device, checked; without a name the GPU if there is one. Raises InputError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def device_name(device: torch.device) -> str:
    """What a person calls it: the GPU's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """--prompt, --chat or --prompt-ids, --max-new-tokens, --max-context, --json, --logits-out."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--chat", metavar="TEXT", help=f"message to answer, in harmony's chat format; default: {DEMO_CHAT!r}")
    prompt.add_argument("--prompt-ids", metavar="IDS", type=token_id_list, help="the prompt as token ids: 12,34,56")
    parser.add_argument("--max-new-tokens", metavar="N", type=positive_int, default=256, help="default: %(default)s")
    parser.add_argument(
        "--max-context", metavar="N", type=positive_int, default=4096, help="positions of the KV cache; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text as it appears")
    parser.add_argument(
        "--logits-out",
        metavar="FILE.npy",
        type=Path,
        help="write float32 logits [steps, vocabulary], a row for each position fed, the prompt's included",
    )


def prompt_ids_from(args: argparse.Namespace, tokenizer, config: ModelConfig) -> list[int]:
    """The prompt that `add_prompt_arguments` describes, the demo's if there is none.

    `tokenizer` (tokenizer_util.Tokenizer) may be None for --prompt-ids. InputError if the prompt is empty, does not
    fit --max-context, or has an id outside the vocabulary.
    """
    flag, ids = _encode_prompt(args, tokenizer)
    if not ids:
        raise InputError(f"{flag}: the prompt is empty")
    for token_id in ids:
        check_token(token_id, config)
    if len(ids) > args.max_context:
        raise InputError(f"{flag}: {len(ids)} tokens do not fit in a context of {args.max_context}; see --max-context")
    return ids


def _encode_prompt(args: argparse.Namespace, tokenizer) -> tuple[str, list[int]]:
    if args.prompt_ids is not None:
        return "--prompt-ids", args.prompt_ids
    flag = "--chat" if args.prompt is None else "--prompt"
    if tokenizer is None:
        raise InputError(f"{flag}: this model has no tokenizer; use --prompt-ids")
    if args.prompt is not None:
        return flag, tokenizer.encode(args.prompt)
    text = DEMO_CHAT if args.chat is None else args.chat
    return flag, tokenizer.encode_chat(text) if text.strip() else []


@contextlib.contextmanager
def logits_writer(path: Path | None, vocab_size: int) -> Iterator[Callable[[torch.Tensor], None] | None]:
    """A function that appends logits [vocab_size] to an .npy file; without a path it is None.

    The rows go to a file beside `path`, which takes its place at the end: an interrupted run leaves nothing behind.
    InputError if the file cannot be written, or the disk is full.
    """
    if path is None:
        yield None
        return
    part = path.with_name(path.name + ".part")
    n_rows = 0
    try:
        with open(part, "wb") as file:
            # NumPy pads the header so that the number of rows can grow in place.
            _write_npy_header(file, 0, vocab_size)

            def append(logits: torch.Tensor) -> None:
                nonlocal n_rows
                file.write(logits.float().cpu().numpy().tobytes())
                n_rows += 1

            yield append
            file.seek(0)
            _write_npy_header(file, n_rows, vocab_size)
        part.replace(path)
    except OSError as error:
        raise InputError(f"--logits-out {path}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _write_npy_header(file: BinaryIO, n_rows: int, n_columns: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, n_columns)}
    np.lib.format.write_array_header_1_0(file, header)


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

    Without a tokenizer the ids are printed. A sequence that ends before max_new_tokens without a stop id has filled
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
    if len(token_ids) < max_new_tokens and not stopped:
        print(f"context full: stopped after {len(prompt_ids) + len(token_ids)} tokens", file=sys.stderr)
    generation = Generation(
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        text=text if tokenizer else None,
        ttft_ms=(arrivals[0] - start) * 1e3 if arrivals else None,
        tpot_ms=(arrivals[-1] - arrivals[0]) * 1e3 / (len(arrivals) - 1) if len(arrivals) > 1 else None,
        device=device,
        path=path,
    )
    print(json.dumps(generation.__dict__) if as_json else f"\n{summary(generation)}")
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
        print(piece, end="", flush=True)
