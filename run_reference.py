"""Generates text with the reference implementation: slow, and right by definition."""

import sys

from host.cli import (
    DEFAULT_MODEL,
    ArgumentParser,
    add_prompt_arguments,
    device_name,
    logits_writer,
    positive_int,
    prompt_ids_from,
    run_main,
    stream_generation,
    torch_device,
)
from host.limits import check_context
from load_hf import open_checkpoint
from reference import Reference
from tokenizer_util import Tokenizer


def parse_arguments():
    """The command line; InputError where it is wrong."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="checkpoint folder or hub id; default: the shipped one")
    add_prompt_arguments(parser)
    parser.add_argument("--quant", action="store_true", help="round the experts' inputs to MXFP8")
    parser.add_argument("--layers", metavar="N", type=positive_int, help="use the first N layers only")
    parser.add_argument("--device", help="torch device of the arithmetic; default: the GPU if there is one")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = torch_device(args.device)
    checkpoint = open_checkpoint(args.model, args.layers)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    prompt_ids = prompt_ids_from(args, tokenizer, checkpoint.config)
    check_context(checkpoint.config, args.max_context)
    model = Reference(checkpoint, args.quant, max_context=args.max_context, device=device)
    with logits_writer(args.logits_out, checkpoint.config.vocab_size) as on_logits:
        stream_generation(
            model.generate(prompt_ids, args.max_new_tokens, on_logits),
            prompt_ids,
            tokenizer,
            checkpoint.config,
            args.max_new_tokens,
            device=device_name(device),
            path="reference-quant" if args.quant else "reference",
            as_json=args.json,
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
