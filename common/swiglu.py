"""GPT-OSS's clamped SwiGLU."""

import triton
import triton.language as tl


@triton.jit
def swiglu(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """gate * sigmoid(ALPHA * gate) * (up + 1), gate clamped to at most LIMIT, up to [-LIMIT, LIMIT]; float32."""
    gate = tl.minimum(gate, LIMIT)
    up = tl.clamp(up, -LIMIT, LIMIT)
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
