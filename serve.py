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

from checkpoints.harmony import Setting
from command_line.run import run_main
from command_line.scripts import KEY_VARIABLE, arguments
from gpt_oss_megakernel import MegaModel
from host import cli
from load_model import open_model
from system.errors import InputError

REQUIREMENTS = "requirements-serve.txt"


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
    args = arguments("serve.py")
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
    sys.exit(run_main(main))
