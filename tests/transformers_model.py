"""transformers' GPT-OSS, the independent implementation that tests compare with."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from transformers import DynamicCache, GptOssForCausalLM, Mxfp4Config


def load(folder) -> GptOssForCausalLM:
    """Load a checkpoint folder in float32; transformers itself dequantizes MXFP4."""
    model = GptOssForCausalLM.from_pretrained(
        folder,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.bfloat16,
    )
    return model.float().eval()


@torch.no_grad()
def logits(model: GptOssForCausalLM, token_ids: list[int], position: int = 0) -> Tensor:
    """Return float32 [tokens, vocab_size]; the tokens stand at position.., after keys and values of zero."""
    cache = DynamicCache(config=model.config)
    if position:
        config = model.config
        zeros = torch.zeros(1, config.num_key_value_heads, position, config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(zeros, zeros, layer)
    positions = torch.arange(position, position + len(token_ids))[None]
    return model(input_ids=torch.tensor([token_ids]), position_ids=positions, past_key_values=cache).logits[0]
