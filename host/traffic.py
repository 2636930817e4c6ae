"""What decoding a token has to read from memory: the bytes that the bandwidth limit is made of."""

import math

from host.config import ModelConfig, expected_tensors

ITEM_BYTES = {"BF16": 2, "U8": 1}
KV_ITEM_BYTES = 2  # bfloat16


def weight_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of the weights that one token uses, each read once as published.

    All dense matrices, norms, biases and sinks, the router, the LM head, one embedding row, and of each layer's
    experts the chosen ones: their blocks, scales and biases.
    """
    total = 0
    for name, (shape, dtype) in expected_tensors(config).items():
        n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        if ".experts." in name:
            n_bytes = n_bytes // config.n_experts * config.experts_per_token
        elif name == "model.embed_tokens.weight":
            n_bytes //= config.vocab_size
        total += n_bytes
    return total


def kv_bytes_per_token(config: ModelConfig, context: int) -> int:
    """Bytes of the KV cache that a token reads when `context` tokens were fed before it.

    A sliding layer reads one position less than its window, which counts the token itself.
    """
    windows = (config.window(layer) for layer in range(config.n_layers))
    positions = sum(min(context, window - 1) if window else context for window in windows)
    return positions * 2 * config.kv_size * KV_ITEM_BYTES


def bytes_per_token(config: ModelConfig, context: int) -> int:
    """Bytes that decoding one token reads when `context` tokens were fed before it: weights and KV cache."""
    return weight_bytes_per_token(config) + kv_bytes_per_token(config, context)
