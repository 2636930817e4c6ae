"""Read a prompt from the command line, then print and collect the text that a model generates."""

import argparse
import contextlib
import io
import json
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoints.config import ModelConfig, check_token
from checkpoints.harmony import chat_ids
from command_line.options import DEMO_CHAT
from host.devices import device_name
from host.limits import context_length
from host.sampling import GREEDY, Sampling
from system.errors import InputError
from system.output_file import check_output, replacing

RANDOM_WEIGHTS_PROMPT = (0,)  # any token will do for a model without a tokenizer
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def prompt_ids_from(args: argparse.Namespace, tokenizer, config: ModelConfig) -> list[int]:
    """Return the token ids of the prompt that the options of `add_prompt_arguments` give, or of the demo's prompt.

    Without a `tokenizer` (tokenizer_util.Tokenizer) the default is RANDOM_WEIGHTS_PROMPT, and text is refused.
    Raise InputError if the prompt is empty, does not fit --max-context, or has an id outside the vocabulary.
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
        return "--prompt", _require_tokenizer(tokenizer, "--prompt").encode(_text_of(args.prompt))
    if args.chat is None and tokenizer is None:
        return "--prompt-ids", list(RANDOM_WEIGHTS_PROMPT)
    text = _piped_text() or DEMO_CHAT if args.chat is None else _text_of(args.chat)
    return "--chat", chat_ids(_require_tokenizer(tokenizer, "--chat"), text) if text.strip() else []


def _text_of(text: str) -> str:
    """Return a flag's text, or what stdin holds if it is "-"."""
    return _stdin_text() if text == "-" else text


def _stdin_text() -> str:
    """Return what stdin holds, nothing if it is closed. Raise InputError if that is no UTF-8."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n") if sys.stdin else ""
    except UnicodeDecodeError:
        raise InputError("stdin is not valid UTF-8") from None


def _piped_text() -> str:
    """Return what is piped into stdin; nothing if it is no pipe, or one that nobody has written to so far."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no stdin, a closed one, or one without a file
        return ""
    is_filled = stat.S_ISFIFO(mode) and select.select([sys.stdin], [], [], 0)[0]
    return _stdin_text() if is_filled else ""


def _require_tokenizer(tokenizer, flag: str):
    if tokenizer is None:
        raise InputError(f"{flag}: this model has no tokenizer; use --prompt-ids")
    return tokenizer


def check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError, before anything is downloaded, if the file of --logits-out or --trace could not be written."""
    for flag, path in (("--logits-out", args.logits_out), ("--trace", getattr(args, "trace", None))):
        if path is not None:
            check_output(path, True, flag=flag)


@contextlib.contextmanager
def logits_writer(
    path: Path | None, vocab_size: int, inputs: Sequence[Path] = ()
) -> Iterator[Callable[[torch.Tensor], None] | None]:
    """Give a function that appends logits [vocab_size] to an .npy file as float32, or None without a path.

    Raise InputError if the file cannot be written, is one of `inputs`, or the disk is full; see system.output_file.
    """
    if path is None:
        yield None
        return
    n_rows = 0
    # NumPy pads the header so that the number of rows can grow in place.
    start = len(_npy_header(0, vocab_size))
    with replacing(path, start, True, inputs=inputs, flag="--logits-out", exclusive=False) as file:

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
    """The output of one run and its times, in milliseconds of wall clock."""

    prompt_ids: list[int]
    token_ids: list[int]  # including the stop id, if one ended the text
    text: str | None  # without the stop token; None without a tokenizer
    ttft_ms: float | None  # time to the first token, the prompt's work included; None if there was none
    tpot_ms: float | None  # mean time per output token after the first; None if there was none
    device: str
    path: str  # which implementation ran
    finish: str  # "stop" behind a stop token, "length" at --max-new-tokens or the context's end
    temperature: float = 0.0
    seed: int | None = None  # with which the answer can be drawn again
    top_k: int | None = None  # this and the next two: what was left out, as in host.sampling; None: nothing
    top_p: float | None = None
    min_p: float | None = None


def print_answer(
    args: argparse.Namespace,
    model,
    path: str,
    prompt_ids: list[int],
    tokenizer,
    on_logits: Callable[[torch.Tensor], None] | None,
    sampling: Sampling = GREEDY,
) -> Generation:
    """Generate the answer that the command line requests, and print it; see stream_generation."""
    room = context_length(model.config, args.max_context) - len(prompt_ids) + 1
    limit = args.max_new_tokens or room
    options = {} if sampling == GREEDY else {"sampling": sampling}  # of which the reference knows nothing
    return stream_generation(
        model.generate(prompt_ids, limit, on_logits, **options),
        prompt_ids,
        tokenizer,
        model.config,
        limit_name="the context is full" if limit > room or not args.max_new_tokens else f"--max-new-tokens {limit}",
        device=device_name(model.device),
        path=path,
        as_json=args.json,
        sampling=sampling,
    )


def stream_generation(
    tokens: Iterable[int],
    prompt_ids: list[int],
    tokenizer,
    config: ModelConfig,
    limit_name: str,
    device: str,
    path: str,
    as_json: bool,
    sampling: Sampling = GREEDY,
) -> Generation:
    """Consume the tokens and print them to stdout: text as it appears, or one JSON object.

    Without a tokenizer the ids are printed. Control characters in the text are escaped if stdout is a terminal. Unless
    as_json, lines on stderr sum up the run and say what cut the answer if no stop id ended it: limit_name.
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
        finish="stop" if stopped else "length",
        temperature=sampling.temperature,
        seed=sampling.seed if sampling.temperature else None,
        top_k=sampling.top_k or None,
        top_p=sampling.top_p if sampling.top_p < 1 else None,
        min_p=sampling.min_p or None,
    )
    print(json.dumps(generation.__dict__) if as_json else "", flush=True)
    if not as_json:
        print(summary(generation), file=sys.stderr)
    if not as_json and not stopped:
        n_tokens = "1 token" if len(token_ids) == 1 else f"{len(token_ids)} tokens"
        print(f"the answer was cut after {n_tokens}: {limit_name}", file=sys.stderr)
    return generation


def summary(generation: Generation) -> str:
    """Return one line: token counts, time to the first token, time per further token, device and path."""

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} ms"

    return (
        f"[{len(generation.prompt_ids)} prompt + {len(generation.token_ids)} new tokens, "
        f"TTFT {ms(generation.ttft_ms)}, {ms(generation.tpot_ms)} per token, {generation.device}, {generation.path}"
        f"{'' if generation.seed is None else f', temperature {generation.temperature:g}, seed {generation.seed}'}]"
    )


def _print_piece(piece: str, as_json: bool) -> None:
    if piece and not as_json:
        print(for_terminal(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def for_terminal(text: str) -> str:
    """Return a model's text with its control characters escaped, so that it cannot command the terminal."""
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
