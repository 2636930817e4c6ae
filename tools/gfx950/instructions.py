"""What gfx950's instructions compute, one line each: a name without its encoding's suffix, and a C expression.

The meanings are those of AMD's "CDNA4 Instruction Set Architecture" reference, in the chapters that the tables below
name; where that leaves a question, LLVM's AMDGPU backend answers it. core.c is compiled with these expressions. What
moves data between lanes, to memory or through matrix cores is in core.c itself.

An expression may use the functions of core.c's part "number formats", and:

    A, B, C      a lane's sources, words; a, b, c: as float32
    D            what the destination held before
    lane         the lane's number
    PART         the half of A that op_sel chooses; HIGH: whether the result goes to the upper half of D
    BYTE         the byte of A that the two low bits of op_sel choose
    CLAMPED, SATURATE, TABLE    the instruction's clamp, MODE.FP16_OVFL, and bitop3
    vcc, mask    64-bit masks of lanes: VCC, and the third source
    x, y         scalar sources; scc: the condition code
    r            the scalar result, for the condition code behind `;`
"""


def table(text: str) -> dict[str, str]:
    """Return name -> expression of a table's lines."""
    return dict(line.split(None, 1) for line in text.strip().splitlines())


def scalar_table(text: str) -> dict[str, str]:
    """Return a table whose expressions all say what becomes of the condition code: what it was, if a line does not."""
    return {name: meaning if ";" in meaning else f"{meaning}; scc" for name, meaning in table(text).items()}


# VOP1, VOP2 and VOP3 with one 32-bit result: words.
LANE = table("""
v_mov_b32               A
v_not_b32               ~A
v_bfrev_b32             reversed(A)
v_add_u32               CLAMPED && A + B < A ? ~0u : A + B
v_sub_u32               CLAMPED && B > A ? 0 : A - B
v_subrev_u32            B - A
v_and_b32               A & B
v_or_b32                A | B
v_xor_b32               A ^ B
v_xnor_b32              ~(A ^ B)
v_lshlrev_b32           B << (A & 31)
v_lshrrev_b32           B >> (A & 31)
v_ashrrev_i32           (i32)B >> (A & 31)
v_min_i32               (i32)A < (i32)B ? A : B
v_max_i32               (i32)A > (i32)B ? A : B
v_min_u32               A < B ? A : B
v_max_u32               A > B ? A : B
v_min3_i32              smallest(A, smallest(B, C))
v_max3_i32              largest(A, largest(B, C))
v_med3_i32              largest(smallest(A, B), smallest(largest(A, B), C))
v_min3_u32              A < B ? (A < C ? A : C) : (B < C ? B : C)
v_max3_u32              A > B ? (A > C ? A : C) : (B > C ? B : C)
v_mul_lo_u32            A * B
v_mul_hi_u32            (u64)A * B >> 32
v_mul_hi_i32            (i64)(i32)A * (i32)B >> 32
v_mul_u32_u24           (A & 0xffffff) * (B & 0xffffff)
v_mul_i32_i24           signed24(A) * signed24(B)
v_mad_u32_u24           (A & 0xffffff) * (B & 0xffffff) + C
v_mad_i32_i24           signed24(A) * signed24(B) + C
v_add3_u32              A + B + C
v_xad_u32               (A ^ B) + C
v_lshl_add_u32          (A << (B & 31)) + C
v_add_lshl_u32          (A + B) << (C & 31)
v_lshl_or_b32           (A << (B & 31)) | C
v_and_or_b32            (A & B) | C
v_or3_b32               A | B | C
v_bfe_u32               A >> (B & 31) & low_ones(C & 31)
v_bfe_i32               sign_extended((i32)A >> (B & 31), C & 31)
v_bfi_b32               (A & B) | (~A & C)
v_bfm_b32               low_ones(A & 31) << (B & 31)
v_alignbit_b32          pair(B, A) >> (C & 31)
v_alignbyte_b32         pair(B, A) >> 8 * (C & 3)
v_perm_b32              permuted_bytes(pair(B, A), C)
v_bitop3_b32            truth_table(A, B, C, TABLE)
v_bitop3_b16            truth_table(A, B, C, TABLE) & 0xffff
v_bcnt_u32_b32          __builtin_popcount(A) + B
v_ffbh_u32              A ? __builtin_clz(A) : ~0u
v_ffbl_b32              A ? __builtin_ctz(A) : ~0u
v_mbcnt_lo_u32_b32      __builtin_popcount(A & (lane < 32 ? low_ones(lane) : ~0u)) + B
v_mbcnt_hi_u32_b32      __builtin_popcount(A & (lane < 32 ? 0 : low_ones(lane - 32))) + B
v_cndmask_b32           mask >> lane & 1 ? B : A
v_add_u16               (A + B) & 0xffff
v_sub_u16               (A - B) & 0xffff
v_mul_lo_u16            (A & 0xffff) * (B & 0xffff) & 0xffff
v_mad_u16               ((A & 0xffff) * (B & 0xffff) + C) & 0xffff
v_lshlrev_b16           B << (A & 15) & 0xffff
v_lshrrev_b16           (B & 0xffff) >> (A & 15)
v_ashrrev_i16           ((i16)B >> (A & 15)) & 0xffff
v_max_i16               (u16)((i16)A > (i16)B ? A : B)
v_min_i16               (u16)((i16)A < (i16)B ? A : B)
v_max_u16               (u16)A > (u16)B ? (u16)A : (u16)B
v_min_u16               (u16)A < (u16)B ? (u16)A : (u16)B
v_pack_b32_f16          (A & 0xffff) | B << 16
v_cvt_f32_ubyte0        word((float)(A & 255))
v_cvt_f32_ubyte1        word((float)(A >> 8 & 255))
v_cvt_f32_ubyte2        word((float)(A >> 16 & 255))
v_cvt_f32_ubyte3        word((float)(A >> 24))
v_cvt_f32_u32           word((float)A)
v_cvt_f32_i32           word((float)(i32)A)
v_cvt_f32_f16           word(of_half(A))
v_cvt_f32_fp8           word(of_e4m3(A))
v_cvt_f32_bf8           word(of_e5m2(A))
""")

# VOP1, VOP2 and VOP3 with one 32-bit result: float32. Denormals are kept, except by the transcendental ones.
LANE |= table("""
v_add_f32               word(a + b)
v_sub_f32               word(a - b)
v_subrev_f32            word(b - a)
v_mul_f32               word(a * b)
v_mul_legacy_f32        a == 0 || b == 0 ? 0 : word(a * b)
v_fma_f32               word(fmaf(a, b, c))
v_fmamk_f32             word(fmaf(a, b, c))
v_fmaak_f32             word(fmaf(a, b, c))
v_fmac_f32              word(fmaf(a, b, float_of(D)))
v_max_f32               word(larger(a, b))
v_min_f32               word(smaller(a, b))
v_max3_f32              word(larger(larger(a, b), c))
v_min3_f32              word(smaller(smaller(a, b), c))
v_med3_f32              word(middle(a, b, c))
v_maximum3_f32          word(isnan(a) || isnan(b) || isnan(c) ? NAN : larger(larger(a, b), c))
v_minimum3_f32          word(isnan(a) || isnan(b) || isnan(c) ? NAN : smaller(smaller(a, b), c))
v_exp_f32               word(flushed(exp2f(flushed(a))))
v_log_f32               word(log2f(flushed(a)))
v_rcp_f32               word(flushed(1.f / flushed(a)))
v_rcp_iflag_f32         word(flushed(1.f / flushed(a)))
v_rsq_f32               word((float)(1 / sqrt((double)flushed(a))))
v_sqrt_f32              word(sqrtf(flushed(a)))
v_floor_f32             word(floorf(a))
v_ceil_f32              word(ceilf(a))
v_trunc_f32             word(truncf(a))
v_rndne_f32             word(rintf(a))
v_fract_f32             word(isfinite(a) ? fminf(a - floorf(a), 0x1.fffffep-1f) : NAN)
v_ldexp_f32             word(scaled(a, (i32)B))
v_frexp_exp_i32_f32     isfinite(a) ? exponent_of(a) : 0
v_frexp_mant_f32        isfinite(a) ? word(mantissa_of(a)) : A
v_cvt_u32_f32           isnan(a) || a <= 0 ? 0 : a >= 0x1p32f ? ~0u : (u32)a
v_cvt_i32_f32           isnan(a) ? 0 : a >= 0x1p31f ? 0x7fffffff : a <= -0x1p31f ? 0x80000000 : (u32)(i32)a
v_cvt_f16_f32           to_half(a, SATURATE)
v_cvt_pk_f16_f32        half_pair(a, b, SATURATE)
v_cvt_pk_bf16_f32       to_bf16(a) | to_bf16(b) << 16
v_cvt_pk_fp8_f32        into_half(D, to_e4m3(a, SATURATE) | to_e4m3(b, SATURATE) << 8, HIGH)
v_cvt_scalef32_pk_fp8_f32 into_half(D, to_e4m3(unscaled(a, C), SATURATE) | to_e4m3(unscaled(b, C), SATURATE) << 8, HIGH)
v_cvt_scalef32_pk_bf16_fp8 to_bf16(rescaled(of_e4m3(PART), B)) | to_bf16(rescaled(of_e4m3(PART >> 8), B)) << 16
v_cvt_scalef32_pk_f16_fp8 half_pair(rescaled(of_e4m3(PART), B), rescaled(of_e4m3(PART >> 8), B), SATURATE)
v_div_fmas_f32          word(vcc >> lane & 1 ? scaled_fma(a, b, c, exponent_bits(c) > 127 ? 64 : -64) : fmaf(a, b, c))
v_div_fixup_f32         word(fixed_quotient(a, b, c))
""")

# VOP1 and VOP3 with a 64-bit result; A, B and C are register pairs. Bit 64 of the expression is the carry.
LANE_64 = table("""
v_mov_b64               A
v_lshl_add_u64          (u64)((A << (B & 7)) + C)
v_lshlrev_b64           B << (A & 63)
v_lshrrev_b64           B >> (A & 63)
v_ashrrev_i64           (i64)B >> (A & 63)
v_mad_u64_u32           (u128)(u32)A * (u32)B + C
v_mad_i64_i32           (i128)((i64)(i32)A * (i32)B) + (i64)C
v_cvt_scalef32_pk_f32_fp4 pair(word(rescaled(of_e2m1(BYTE), (u32)B)), word(rescaled(of_e2m1(BYTE >> 4), (u32)B)))
""")

# VOP2 and VOP3 with a carry: bit 32 of the expression.
LANE_CARRY = table("""
v_add_co_u32            (u64)A + B
v_addc_co_u32           (u64)A + B + (mask >> lane & 1)
v_sub_co_u32            (u64)A - B
v_subb_co_u32           (u64)A - B - (mask >> lane & 1)
v_subrev_co_u32         (u64)B - A
v_subbrev_co_u32        (u64)B - A - (mask >> lane & 1)
""")

# VOP3P: float32 pairs, and float16 pairs in a word, which are rounded from double precision; p, q and s are floats.
LANE_PAIR_F32 = table("""
v_pk_add_f32            p + q
v_pk_mul_f32            p * q
v_pk_fma_f32            fmaf(p, q, s)
""")
LANE_PAIR_F16 = table("""
v_pk_add_f16            (double)p + q
v_pk_mul_f16            (double)p * q
v_pk_fma_f16            (double)p * q + s
v_pk_max_f16            larger(p, q)
v_pk_min_f16            smaller(p, q)
""")

# SOP1, SOP2 and SOPK with a 32-bit result, and what becomes of the condition code.
SCALAR = scalar_table("""
s_mov_b32               x
s_movk_i32              x
s_cmov_b32              scc ? x : D
s_add_u32               x + y                   ; r < x
s_addc_u32              x + y + scc             ; (u64)x + y + scc > 0xffffffff
s_sub_u32               x - y                   ; y > x
s_subb_u32              x - y - scc             ; (u64)y + scc > x
s_add_i32               x + y                   ; (i64)(i32)x + (i32)y != (i32)r
s_sub_i32               x - y                   ; (i64)(i32)x - (i32)y != (i32)r
s_addk_i32              D + x                   ; (i64)(i32)D + (i32)x != (i32)r
s_mulk_i32              D * x
s_mul_i32               x * y
s_mul_hi_u32            (u64)x * y >> 32
s_mul_hi_i32            (i64)(i32)x * (i32)y >> 32
s_and_b32               x & y                   ; r != 0
s_or_b32                x | y                   ; r != 0
s_xor_b32               x ^ y                   ; r != 0
s_andn2_b32             x & ~y                  ; r != 0
s_orn2_b32              x | ~y                  ; r != 0
s_not_b32               ~x                      ; r != 0
s_lshl_b32              x << (y & 31)           ; r != 0
s_lshr_b32              x >> (y & 31)           ; r != 0
s_ashr_i32              (i32)x >> (y & 31)      ; r != 0
s_lshl1_add_u32         (x << 1) + y ; ((u64)x << 1) + y > 0xffffffff
s_lshl2_add_u32         (x << 2) + y ; ((u64)x << 2) + y > 0xffffffff
s_lshl3_add_u32         (x << 3) + y ; ((u64)x << 3) + y > 0xffffffff
s_lshl4_add_u32         (x << 4) + y ; ((u64)x << 4) + y > 0xffffffff
s_bfm_b32               low_ones(x & 31) << (y & 31)
s_bfe_u32               field(x, y & 31, y >> 16 & 127); r != 0
s_bfe_i32               signed_field((u64)x << 32, 32 + (y & 31), y >> 16 & 127); r != 0
s_abs_i32               (i32)x < 0 ? 0 - x : x  ; r != 0
s_min_i32               (i32)x < (i32)y ? x : y ; (i32)x < (i32)y
s_max_i32               (i32)x > (i32)y ? x : y ; (i32)x > (i32)y
s_min_u32               x < y ? x : y           ; x < y
s_max_u32               x > y ? x : y           ; x > y
s_brev_b32              reversed(x)
s_bcnt1_i32_b32         __builtin_popcount(x)   ; r != 0
s_ff1_i32_b32           x ? __builtin_ctz(x) : ~0u
s_flbit_i32_b32         x ? __builtin_clz(x) : ~0u
s_sext_i32_i8           (i32)(i8)x
s_sext_i32_i16          (i32)(i16)x
s_bitset0_b32           D & ~(1u << (x & 31))
s_bitset1_b32           D | 1u << (x & 31)
s_pack_ll_b32_b16       (x & 0xffff) | y << 16
s_pack_lh_b32_b16       (x & 0xffff) | (y & 0xffff0000)
s_pack_hh_b32_b16       x >> 16 | (y & 0xffff0000)
s_cselect_b32           scc ? x : y
""")

# SOP1 and SOP2 with 64-bit sources and a 64-bit result, and those with a 32-bit result.
SCALAR_64 = scalar_table("""
s_mov_b64               x
s_and_b64               x & y                   ; r != 0
s_or_b64                x | y                   ; r != 0
s_xor_b64               x ^ y                   ; r != 0
s_andn2_b64             x & ~y                  ; r != 0
s_orn2_b64              x | ~y                  ; r != 0
s_nand_b64              ~(x & y)                ; r != 0
s_nor_b64               ~(x | y)                ; r != 0
s_xnor_b64              ~(x ^ y)                ; r != 0
s_not_b64               ~x                      ; r != 0
s_lshl_b64              x << (y & 63)           ; r != 0
s_lshr_b64              x >> (y & 63)           ; r != 0
s_ashr_i64              (i64)x >> (y & 63)      ; r != 0
s_bfe_u64               field(x, y & 63, y >> 16 & 127); r != 0
s_bfe_i64               signed_field(x, y & 63, y >> 16 & 127); r != 0
s_cselect_b64           scc ? x : y
""")
SCALAR_OF_64 = scalar_table("""
s_bcnt1_i32_b64         __builtin_popcountll(x) ; r != 0
s_ff1_i32_b64           x ? __builtin_ctzll(x) : ~0u
s_flbit_i32_b64         x ? __builtin_clzll(x) : ~0u
""")

# SOPC and SOPK: the condition code alone. x and y are 64-bit, of which the names say how many bits count.
SCALAR_CONDITION = table("""
s_cmp_eq_i32            (u32)x == (u32)y
s_cmp_eq_u32            (u32)x == (u32)y
s_cmp_eq_u64            x == y
s_cmp_lg_i32            (u32)x != (u32)y
s_cmp_lg_u32            (u32)x != (u32)y
s_cmp_lg_u64            x != y
s_cmp_lt_i32            (i32)x < (i32)y
s_cmp_le_i32            (i32)x <= (i32)y
s_cmp_gt_i32            (i32)x > (i32)y
s_cmp_ge_i32            (i32)x >= (i32)y
s_cmp_lt_u32            (u32)x < (u32)y
s_cmp_le_u32            (u32)x <= (u32)y
s_cmp_gt_u32            (u32)x > (u32)y
s_cmp_ge_u32            (u32)x >= (u32)y
s_bitcmp0_b32           !(x >> (y & 31) & 1)
s_bitcmp1_b32           x >> (y & 31) & 1
s_bitcmp0_b64           !(x >> (y & 63) & 1)
s_bitcmp1_b64           x >> (y & 63) & 1
""")
SCALAR_CONDITION |= {
    name.replace("s_cmp_", "s_cmpk_"): meaning for name, meaning in SCALAR_CONDITION.items() if name.endswith("32")
}

# SOP1: the destination gets EXEC, and EXEC the expression of x and of what it was, y.
SAVE_EXEC = table("""
s_and_saveexec_b64      x & y
s_or_saveexec_b64       x | y
s_xor_saveexec_b64      x ^ y
s_andn2_saveexec_b64    x & ~y
s_orn2_saveexec_b64     x | ~y
""")

# SOPP: jumps, and what has no effect on values.
BRANCH = table("""
s_branch                1
s_cbranch_scc0          !scc
s_cbranch_scc1          scc
s_cbranch_vccz          !vcc
s_cbranch_vccnz         vcc != 0
s_cbranch_execz         !exec
s_cbranch_execnz        exec != 0
""")
WITHOUT_EFFECT = ("s_nop", "s_sleep", "s_setprio", "s_icache_inv", "s_dcache_wb", "v_nop")

# Moved by core.c: data between lanes and registers, and the state of a wave.
MOVE = (
    "v_readlane_b32",
    "v_readfirstlane_b32",
    "v_writelane_b32",
    "v_accvgpr_read_b32",
    "v_accvgpr_write_b32",
    "v_accvgpr_mov_b32",
    "v_permlane16_swap_b32",
    "v_permlane32_swap_b32",
    "v_swap_b32",
    "v_pk_mov_b32",
    "v_div_scale_f32",
    "s_memtime",
    "s_memrealtime",
    "s_setreg_imm32_b32",
    "s_waitcnt",
    "s_barrier",
    "s_endpgm",
    "buffer_wbl2",
    "buffer_inv",
)
