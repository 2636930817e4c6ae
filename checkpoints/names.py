"""Map each field of host.weights.Weights to the published tensors that it holds, one set per model or per layer."""

from checkpoints.config import scale_name

MODEL_TENSORS = {
    "embed": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "lm_head": ("lm_head.weight",),
}
LAYER_TENSORS = {
    "attn_norm": ("input_layernorm.weight",),
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "sinks": ("self_attn.sinks",),
    "o": ("self_attn.o_proj.weight",),
    "o_bias": ("self_attn.o_proj.bias",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "router": ("mlp.router.weight",),
    "router_bias": ("mlp.router.bias",),
    "gate_up": ("mlp.experts.gate_up_proj_blocks",),
    "gate_up_scales": ("mlp.experts.gate_up_proj_scales",),
    "gate_up_bias": ("mlp.experts.gate_up_proj_bias",),
    "down": ("mlp.experts.down_proj_blocks",),
    "down_scales": ("mlp.experts.down_proj_scales",),
    "down_bias": ("mlp.experts.down_proj_bias",),
}
PUBLISHED = MODEL_TENSORS | LAYER_TENSORS


def published_names(field: str, n_layers: int) -> list[str]:
    """Return the names of a field's published tensors, in the order in which it holds their values."""
    if field in MODEL_TENSORS:
        return list(MODEL_TENSORS[field])
    return [f"model.layers.{n}.{name}" for n in range(n_layers) for name in LAYER_TENSORS[field]]


def tensor_names(field: str, n_layers: int) -> list[str]:
    """Return the names of a field's tensors in order; the field may also hold the scales of a dense matrix."""
    if field in PUBLISHED:
        return published_names(field, n_layers)
    return [scale_name(name) for name in published_names(field.removesuffix("_scales"), n_layers)]
