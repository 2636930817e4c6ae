"""Count the bytes that decoding a token has to read from memory, from which its bandwidth limit follows."""

import math

from checkpoints.config import ITEM_BYTES, SCALE_ENDING, ModelConfig, expected_tensors
from host.phases import Phase, phases_of_token

KV_ITEM_BYTES = 2  # bfloat16
PHASE_OF_TENSOR = {  # published name without the layer and the last part -> the phase that reads the tensor
    "model.embed_tokens": "embedding",
    "input_layernorm": "QKV",
    "self_attn.q_proj": "QKV",
    "self_attn.k_proj": "QKV",
    "self_attn.v_proj": "QKV",
    "self_attn": "attention",  # the sinks
    "self_attn.o_proj": "O projection",
    "post_attention_layernorm": "router",
    "mlp.router": "router",
    "mlp.experts.gate_up_proj": "gate-up",
    "mlp.experts.down_proj": "down",
    "model.norm": "LM head",
    "lm_head": "LM head",
}


def weight_bytes_per_token(config: ModelConfig) -> int:
    """Return the bytes of the weights that one token uses, each read once, in the formats of `config`.

    They are all dense matrices, norms, biases and sinks, the router, the LM head, one embedding row, and the blocks,
    scales and biases of the experts chosen in each layer.
    """
    return sum(_tensor_bytes(config).values())


def kv_bytes_per_token(config: ModelConfig, context: int) -> int:
    """Return the bytes of the KV cache that a token reads when `context` tokens were fed before it.

    A sliding layer reads one position less than its window, which counts the token itself.
    """
    return sum(_kv_bytes(config, layer, context) for layer in range(config.n_layers))


def bytes_per_token(config: ModelConfig, context: int) -> int:
    """Return the bytes of weights and KV cache that a token reads when `context` tokens were fed before it."""
    return weight_bytes_per_token(config) + kv_bytes_per_token(config, context)


def bytes_by_phase(config: ModelConfig, context: int) -> list[int]:
    """Return the bytes that each of phases_of_token(n_layers) reads, in order; their sum is bytes_per_token."""
    n_bytes = dict.fromkeys(phases_of_token(config.n_layers), 0)
    for name, tensor_bytes in _tensor_bytes(config).items():
        n_bytes[_phase_of(name)] += tensor_bytes
    for layer in range(config.n_layers):
        n_bytes[Phase("attention", layer)] += _kv_bytes(config, layer, context)
    return list(n_bytes.values())


def _tensor_bytes(config: ModelConfig) -> dict[str, int]:
    """Return published name -> the bytes of that tensor that a token uses."""
    sizes = {}
    for name, (shape, dtype) in expected_tensors(config).items():
        n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        if ".experts." in name:
            n_bytes = n_bytes // config.n_experts * config.experts_per_token
        elif name == "model.embed_tokens.weight":
            n_bytes //= config.vocab_size
        sizes[name] = n_bytes
    return sizes


def _phase_of(name: str) -> Phase:
    """Return the phase that reads the tensor of this published name."""
    layer = None
    if name.startswith("model.layers."):
        number, name = name.removeprefix("model.layers.").split(".", 1)
        layer = int(number)
    for suffix in (SCALE_ENDING, "_blocks", "_scales", "_bias", ".weight", ".bias", ".sinks"):
        name = name.removesuffix(suffix)
    return Phase(PHASE_OF_TENSOR[name], layer)


def _kv_bytes(config: ModelConfig, layer: int, context: int) -> int:
    window = config.window(layer)
    positions = min(context, window - 1) if window else context
    return positions * 2 * config.kv_size * KV_ITEM_BYTES
