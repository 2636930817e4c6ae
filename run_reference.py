"""Generate text with the reference implementation, which is slow and right by definition."""

import host.start

import sys

import torch

from command_line.run import run_main
from command_line.scripts import arguments
from host import cli, generation
from host.devices import torch_device
from host.limits import check_memory, context_length
from load_model import files_of, open_checkpoint, open_tokenizer
from reference import Reference


def main() -> None:
    """Generate the text that the command line asks for."""
    args = arguments("run_reference.py")
    generation.check_outputs(args)
    device = torch_device(args.device)
    checkpoint = open_checkpoint(args.model, args.layers, args.verify, show_progress=sys.stderr.isatty())
    tokenizer = open_tokenizer(checkpoint)
    config, kv_dtype = checkpoint.config, torch.bfloat16
    prompt_ids = generation.prompt_ids_from(args, tokenizer, config)
    max_context = context_length(config, args.max_context)
    # The files stay mapped; the LM head in float32 is the largest of the converted tensors.
    check_memory(config, max_context, kv_dtype, device, weights=4 * config.vocab_size * config.hidden_size)
    dense = cli.dense_formats(args, checkpoint)
    model = Reference(checkpoint, args.quant, kv_dtype, max_context, device, dense=dense)
    path = cli.path_of("reference", args.quant, dense)
    with generation.logits_writer(args.logits_out, config.vocab_size, files_of(checkpoint)) as on_logits:
        generation.print_answer(args, model, path, prompt_ids, tokenizer, on_logits)


if __name__ == "__main__":
    sys.exit(run_main(main))
