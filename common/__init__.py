"""Device ops of GPT-OSS in Triton, one a file. Each works on values or pointers that a kernel hands it."""

from common.arch import drain_stores
from common.argmax import keep_larger, reduce_argmax
from common.attention import attend_cache, attend_one, finish_with_sink, merge_states
from common.barrier import ABORT, ARRIVALS, SYNC_WORDS, arrive_last, grid_barrier, leave_grid
from common.fp4 import e2m1_to_float32
from common.gemv_bf16 import gemv_bf16
from common.gemv_fp4 import gemv_fp4, gemv_fp4_fp8
from common.quant import GROUP, e8m0_to_float32, load_mxfp8, quantize_mxfp8
from common.rmsnorm import load_normed, rms_rstd
from common.rope import load_rotated
from common.router import pick, top_k_softmax
from common.swiglu import swiglu

__all__ = [
    "ABORT",
    "ARRIVALS",
    "GROUP",
    "SYNC_WORDS",
    "arrive_last",
    "attend_cache",
    "attend_one",
    "drain_stores",
    "e2m1_to_float32",
    "e8m0_to_float32",
    "finish_with_sink",
    "gemv_bf16",
    "gemv_fp4",
    "gemv_fp4_fp8",
    "grid_barrier",
    "keep_larger",
    "leave_grid",
    "load_mxfp8",
    "load_normed",
    "load_rotated",
    "merge_states",
    "pick",
    "quantize_mxfp8",
    "reduce_argmax",
    "rms_rstd",
    "swiglu",
    "top_k_softmax",
]
