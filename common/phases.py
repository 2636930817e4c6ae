"""The phases of a token, from which the megakernel and the separate launches are built.

`w` is host.weights.Weights, `s` host.state.State, both of pointers here; CONFIG a ModelConfig, TUNING a Tuning. A phase
is executed by n_programs programs of which this one is number pid, and what it reads of others must have been ordered
before it: the megakernel does so by a grid barrier, separate launches by their order.
"""

from common.attention_phase import attention_phase, prefetch_small
from common.dense_phases import (
    argmax_phase,
    embed_token,
    first_o_tile,
    first_qkv_tile,
    head_phase,
    o_phase,
    prefetch_qkv,
    qkv_phase,
)
from common.expert_phases import choose_experts, down_phase, gate_up_phase, router_phase

__all__ = [
    "argmax_phase",
    "attention_phase",
    "choose_experts",
    "down_phase",
    "embed_token",
    "first_o_tile",
    "first_qkv_tile",
    "gate_up_phase",
    "head_phase",
    "o_phase",
    "prefetch_qkv",
    "prefetch_small",
    "qkv_phase",
    "router_phase",
]
