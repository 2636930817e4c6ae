"""Serve a model over HTTP, as the OpenAI API.

python serve.py --model openai/gpt-oss-120b

One answer is generated at a time, and other requests wait for their turn. docs/using.md says what is supported. Needs
the packages of requirements-serve.txt.
"""

import host.start

import argparse
import os
import signal
import sys
from pathlib import Path

from checkpoints.harmony import REASONING_EFFORTS, Setting
from gpt_oss_megakernel import MegaModel
from host import cli
from load_model import open_model
from system.errors import InputError

REQUIREMENTS = "requirements-serve.txt"
KEY_VARIABLE = "SERVE_API_KEY"
MAX_PORT = 65535


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
    parser.add_argument("--max-context", metavar="N", type=cli.positive_int, help=cli.MAX_CONTEXT_HELP)
    parser.add_argument(
        "--max-queue",
        metavar="N",
        type=natural_number,
        default=32,
        help="requests that may wait while one is answered; default: %(default)s",
    )
    parser.add_argument(
        "--max-request-bytes", metavar="N", type=cli.positive_int, default=1 << 20, help="default: %(default)s"
    )
    parser.add_argument("--max-messages", metavar="N", type=cli.positive_int, default=1024, help="default: %(default)s")
    parser.add_argument(
        "--drain-seconds",
        metavar="N",
        type=natural_number,
        default=30,
        help="that the running answer may take after a signal; default: %(default)s",
    )


def natural_number(text: str) -> int:
    """Parse an argparse argument as an integer from 0 to 2^31 - 1."""
    return 0 if text == "0" else cli.positive_int(text)


def port_number(text: str) -> int:
    """Parse an argparse argument as a port; 0 is any free one."""
    port = natural_number(text)
    if port > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: at most {MAX_PORT}")
    return port


def api_key_of(args: argparse.Namespace) -> str | None:
    """Return the key that clients must send, None for none. Raise InputError for one that no header can hold."""
    source, key = "--api-key", args.api_key
    if key is None:
        source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key or not all("!" <= character <= "~" for character in key):
        raise InputError(f"{source}: expected printable ASCII characters without spaces, at least one")
    return key


def model_name_of(args: argparse.Namespace) -> str:
    """Return what clients call the model: a path's last part without .iris, or a hub's id."""
    path = Path(args.model)
    name = path.resolve().name.removesuffix(".iris") if path.exists() else str(args.model)
    return args.model_name or name


def import_endpoint():
    """Return the modules of endpoint/ that need packages of their own. Raise InputError if one is missing."""
    try:
        from endpoint import app, server, worker
    except ImportError as error:
        raise InputError(
            f"a package is missing ({str(error).splitlines()[0]}): "
            f"{os.path.relpath(sys.executable)} -m pip install -r {REQUIREMENTS}"
        ) from None
    return app, server, worker


def main() -> None:
    args = cli.parse_arguments(
        "Serve GPT-OSS over HTTP, as the OpenAI API.",
        cli.add_model_arguments,
        add_server_arguments,
        cli.add_kernel_arguments,
    )
    setting, api_key = Setting(args.reasoning, args.date), api_key_of(args)
    app, server, worker = import_endpoint()
    bound = server.bound_socket(args.host, args.port)
    with bound:
        checkpoint, tokenizer = open_model(args)
        if tokenizer is None:
            raise InputError(f"--model {args.model}: it has no tokenizer, and cannot be served")
        model = cli.load_model(MegaModel, args, checkpoint)
        settings = app.Settings(
            model_name_of(args), api_key, args.max_request_bytes, args.max_messages, setting=setting
        )
        line = worker.Worker(model, tokenizer, args.max_queue)
        address = server.address_of(bound)
        serving = server.Server(
            app.Endpoint(line, settings).app(),
            line,
            lambda: print(f"ready: {address}/v1 serves {settings.model_name}", flush=True),
            args.drain_seconds,
        )
        number = server.serve_until_signal(serving, bound)
    if number is not None:
        signal.raise_signal(number)  # so that the exit code says which


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
