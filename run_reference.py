"""Generates text with the reference implementation: slow, and right by definition."""

if __name__ == "__main__":
    import host.start  # noqa: F401 - first, so that no end of the other imports is a traceback

import sys

import torch

from host.cli import (
    ArgumentParser,
    add_fp8_arguments,
    add_model_arguments,
    add_prompt_arguments,
    check_outputs,
    dense_formats,
    device_name,
    logits_writer,
    path_name,
    prompt_ids_from,
    run_main,
    stream_generation,
    torch_device,
)
from host.limits import check_memory, context_length
from load_model import files_of, open_checkpoint, open_tokenizer
from reference import Reference


def parse_arguments():
    """The command line; InputError where it is wrong."""
    parser = ArgumentParser(description=__doc__)
    add_model_arguments(parser, random_weights=False)
    add_prompt_arguments(parser)
    parser.add_argument("--quant", action="store_true", help="round the experts' inputs to MXFP8")
    add_fp8_arguments(parser)
    parser.add_argument("--device", help="torch device of the arithmetic; default: the GPU if there is one")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    check_outputs(args)
    device = torch_device(args.device)
    checkpoint = open_checkpoint(args.model, args.layers, args.verify, show_progress=sys.stderr.isatty())
    tokenizer = open_tokenizer(checkpoint)
    config, kv_dtype = checkpoint.config, torch.bfloat16
    prompt_ids = prompt_ids_from(args, tokenizer, config)
    max_context = context_length(config, args.max_context)
    # The files stay mapped; of what is converted, the LM head in float32 is the largest.
    check_memory(config, max_context, kv_dtype, device, weights=4 * config.vocab_size * config.hidden_size)
    dense = dense_formats(args, checkpoint)
    model = Reference(checkpoint, args.quant, kv_dtype, max_context, device, dense=dense)
    with logits_writer(args.logits_out, config.vocab_size, files_of(checkpoint)) as on_logits:
        stream_generation(
            model.generate(prompt_ids, args.max_new_tokens, on_logits),
            prompt_ids,
            tokenizer,
            config,
            args.max_new_tokens,
            device=device_name(device),
            path=f"reference-{path_name(args.quant, dense)}".replace("reference-default", "reference"),
            as_json=args.json,
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
