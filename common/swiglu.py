"""GPT-OSS's clamped SwiGLU."""

import triton
import triton.language as tl


@triton.jit
def swiglu(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """Return gate * sigmoid(ALPHA * gate) * (up + 1), float32, of gate clamped from above and up to [-LIMIT, LIMIT].

    NaN stays NaN: a broken weight must not become a number.
    """
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
