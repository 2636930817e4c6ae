"""Device ops of GPT-OSS in Triton, one a file. Each works on values or pointers that a kernel hands it."""

from common.arch import clock_ns, drain_stores
from common.argmax import NOT_FINITE, expose_doubt, keep_finite, keep_larger, reduce_argmax
from common.attention import (
    attend_cache,
    attend_cache_by_head,
    keep_state_if,
    load_cache_block,
    merge_splits,
    start_state,
)
from common.attention_rows import attend_rows
from common.barrier import (
    ABORT,
    ARRIVALS,
    SYNC_WORDS,
    arrive,
    arrive_last,
    count_arrival,
    grid_barrier,
    leave_grid,
    wait,
    wait_for,
)
from common.fp4 import e2m1_to_float32
from common.fp4_fragments import gemv_fp4_fragments, load_fragment_vector
from common.gemm_dense import gemm_dense
from common.gemm_fp4 import gemm_fp4, gemm_fp4_fp8
from common.gemv_bf16 import gemv_bf16, load_bf16_rows, load_vector
from common.gemv_fp4 import gemv_fp4, gemv_fp4_fp8
from common.grouping import cut_blocks, group_pairs, load_block
from common.quant import GROUP, dequantize_mxfp8, e8m0_to_float32, load_mxfp8, quantize_mxfp8
from common.rmsnorm import add_blocks, multiply_blocks, rms_rstd
from common.rope import load_rotated
from common.router import pick, top_k_softmax, top_k_softmax_rows
from common.swiglu import swiglu
from common.trace import mark

__all__ = [
    "ABORT",
    "ARRIVALS",
    "GROUP",
    "NOT_FINITE",
    "SYNC_WORDS",
    "add_blocks",
    "arrive",
    "arrive_last",
    "attend_cache",
    "attend_cache_by_head",
    "attend_rows",
    "clock_ns",
    "count_arrival",
    "cut_blocks",
    "dequantize_mxfp8",
    "drain_stores",
    "e2m1_to_float32",
    "e8m0_to_float32",
    "expose_doubt",
    "gemm_dense",
    "gemm_fp4",
    "gemm_fp4_fp8",
    "gemv_bf16",
    "gemv_fp4",
    "gemv_fp4_fp8",
    "gemv_fp4_fragments",
    "grid_barrier",
    "group_pairs",
    "keep_finite",
    "keep_larger",
    "keep_state_if",
    "leave_grid",
    "load_bf16_rows",
    "load_block",
    "load_cache_block",
    "load_fragment_vector",
    "load_mxfp8",
    "load_rotated",
    "load_vector",
    "mark",
    "merge_splits",
    "multiply_blocks",
    "pick",
    "quantize_mxfp8",
    "reduce_argmax",
    "rms_rstd",
    "start_state",
    "swiglu",
    "top_k_softmax",
    "top_k_softmax_rows",
    "wait",
    "wait_for",
]
