"""Mutate the reference's code: mistakes that no mutated checkpoint stands for, or only approximately."""

import torch

from reference import combine_experts, rms_norm


def softmax_before_top_k(router_logits, experts_per_token):
    weights, chosen = router_logits.softmax(-1).topk(experts_per_token)
    return chosen, weights


def interleaved_rope_in_code(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def swiglu_without_gate_clamp(gate, up, limit, alpha):
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


def swiglu_without_up_clamp(gate, up, limit, alpha):
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def swiglu_with_up_clamped_above_only(gate, up, limit, alpha):
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(max=limit) + 1)


def swiglu_without_one(gate, up, limit, alpha):
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * up.clamp(-limit, limit)


def expert_biases_not_weighted(act, chosen, weights, down, bias):
    unweighted = combine_experts(act, chosen, weights, down, torch.zeros_like(bias))
    return unweighted + bias[chosen].sum(1)


def norm_weight_before_the_mean(x, weight, eps):
    return rms_norm(x * weight, torch.ones_like(weight), eps)


# Name -> (function of reference.py, replacement).
REFERENCE_MUTATIONS = {
    "softmax before top-k": ("route", softmax_before_top_k),
    "interleaved RoPE, in code": ("apply_rope", interleaved_rope_in_code),
    "gate not clamped": ("swiglu", swiglu_without_gate_clamp),
    "up not clamped": ("swiglu", swiglu_without_up_clamp),
    "up clamped above only": ("swiglu", swiglu_with_up_clamped_above_only),
    "up without one, in code": ("swiglu", swiglu_without_one),
    "expert biases not weighted": ("combine_experts", expert_biases_not_weighted),
    "norm weight before the mean": ("rms_norm", norm_weight_before_the_mean),
}
