/* Number formats, and the functions that the expressions of instructions.py use. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef __int128 i128;
typedef unsigned __int128 u128;

static inline float float_of(u32 x) { float y; memcpy(&y, &x, 4); return y; }
static inline u32 word(float x) { u32 y; memcpy(&y, &x, 4); return y; }
static inline double double_of(u64 x) { double y; memcpy(&y, &x, 8); return y; }

/* ---- words ---- */
static inline u64 pair(u32 low, u32 high) { return low | (u64)high << 32; }
static inline u32 low_ones(u32 n) { return n >= 32 ? ~0u : (1u << n) - 1; }
static inline u32 smallest(u32 x, u32 y) { return (i32)x < (i32)y ? x : y; }
static inline u32 largest(u32 x, u32 y) { return (i32)x > (i32)y ? x : y; }
static inline u32 signed24(u32 x) { return (u32)((i32)(x << 8) >> 8); }
static inline u32 reversed(u32 x) {
  u32 r = 0;
  for (int k = 0; k < 32; k++) r |= (x >> k & 1) << (31 - k);
  return r;
}
static inline u32 sign_extended(u32 x, u32 n) { return n ? (u32)((i32)(x << (32 - n)) >> (32 - n)) : 0; }
static inline u64 field(u64 x, int first, int n) { return n < 64 ? x >> first & ((1ull << n) - 1) : x >> first; }
static inline u64 signed_field(u64 x, int first, int n) {
  if (!n) return 0;
  if (n > 64 - first) n = 64 - first;
  return (u64)((i64)(x << (64 - first - n)) >> (64 - n));
}
static inline u32 permuted_bytes(u64 x, u32 selectors) {
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    u32 s = selectors >> 8 * k & 255, byte;
    if (s < 8) byte = x >> 8 * s & 255;
    else if (s < 12) byte = x >> (16 * (s - 8) + 15) & 1 ? 255 : 0; /* the sign of a half */
    else byte = s == 12 ? 0 : 255;
    r |= byte << 8 * k;
  }
  return r;
}
static inline u32 truth_table(u32 x, u32 y, u32 z, u32 table) {
  u32 r = 0;
  for (int k = 0; k < 8; k++)
    if (table >> k & 1) r |= (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
  return r;
}
static inline u32 into_half(u32 old, u32 half, int is_high) {
  return is_high ? (old & 0xffff) | half << 16 : (old & 0xffff0000) | (half & 0xffff);
}

/* ---- float32 ---- */
static inline int exponent_bits(float x) { return word(x) >> 23 & 255; }
static inline int is_denormal(float x) { return exponent_bits(x) == 0 && word(x) & 0x7fffff; }
static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
static inline float scaled(float x, i32 exponent) {
  return ldexpf(x, exponent > 1000 ? 1000 : exponent < -1000 ? -1000 : exponent);
}
static inline u32 exponent_of(float x) { int e; frexpf(x, &e); return x == 0 ? 0 : (u32)e; }
static inline float mantissa_of(float x) { int e; return frexpf(x, &e); }
static inline int is_signalling(float x) { return isnan(x) && !(word(x) & 0x400000); }
static inline float quieted(float x) { return float_of(word(x) | 0x400000); }
/* In IEEE mode, which Triton sets: a number before a quiet NaN, and a signalling one before both. */
static inline float before_nan(float x, float y) {
  if (is_signalling(x) || is_signalling(y)) return quieted(is_signalling(x) ? x : y);
  return isnan(x) ? y : x;
}
static inline float larger(float x, float y) {
  return isnan(x) || isnan(y) ? before_nan(x, y) : x == y ? (signbit(x) ? y : x) : x > y ? x : y;
}
static inline float smaller(float x, float y) {
  return isnan(x) || isnan(y) ? before_nan(x, y) : x == y ? (signbit(x) ? x : y) : x < y ? x : y;
}
static inline float middle(float x, float y, float z) {
  if (isnan(x) || isnan(y) || isnan(z)) return smaller(smaller(x, y), z);
  return larger(smaller(x, y), smaller(z, larger(x, y)));
}

/* Division of numerator by denominator: v_div_scale_f32 brings one of them into range (is it that of the quotient, a
 * later v_div_fmas_f32 scales back), v_div_fixup_f32 puts special values in place of the quotient. */
static float div_scale(float x, float denominator, float numerator, int *scales_back) {
  *scales_back = 0;
  if (denominator == 0 || numerator == 0) return NAN;
  double quotient = (double)numerator / denominator, reciprocal = 1 / (double)denominator;
  int small_quotient = fabs(quotient) < 0x1p-126, small_reciprocal = fabs(reciprocal) < 0x1p-126;
  int is_denominator = word(x) == word(denominator), is_numerator = word(x) == word(numerator);
  if (exponent_bits(numerator) - exponent_bits(denominator) >= 96) {
    *scales_back = 1;
    return is_denominator ? ldexpf(x, 64) : x;
  }
  if (is_denormal(denominator)) return ldexpf(x, 64);
  if (small_reciprocal && small_quotient) {
    *scales_back = 1;
    return is_denominator ? ldexpf(x, -64) : x;
  }
  if (small_reciprocal) return ldexpf(x, -64);
  if (small_quotient) {
    *scales_back = 1;
    return is_numerator ? ldexpf(x, 64) : x;
  }
  return exponent_bits(numerator) <= 23 ? ldexpf(x, 64) : x;
}
/* Rounded once, which a correctly rounded denormal quotient needs; the ISA document is silent. */
static float scaled_fma(float x, float y, float z, int exponent) {
  float r = scaled(fmaf(x, y, z), exponent);
  return fabsf(r) <= 0x1p-126f ? (float)ldexp(fma(x, y, z), exponent) : r;
}
static float fixed_quotient(float quotient, float denominator, float numerator) {
  float r;
  if (isnan(numerator)) return numerator;
  if (isnan(denominator)) return denominator;
  if ((numerator == 0 && denominator == 0) || (isinf(numerator) && isinf(denominator))) return -NAN;
  if (denominator == 0 || isinf(numerator)) r = INFINITY;
  else if (isinf(denominator) || numerator == 0) r = 0;
  else if (exponent_bits(numerator) - exponent_bits(denominator) < -150) r = 0;
  else r = isnan(quotient) ? INFINITY : fabsf(quotient); /* too large; chips do it, the ISA document is silent */
  return signbit(denominator) ^ signbit(numerator) ? -r : r;
}

/* ---- smaller formats ---- */
static float of_half(u32 x) {
  u32 sign = (x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  float r = exponent ? ldexpf(1024 + mantissa, (int)exponent - 25) : ldexpf(mantissa, -24);
  return sign ? -r : r;
}
static u32 to_half(double x, int saturates) { /* rounded once; MODE.FP16_OVFL keeps infinity, and finite numbers finite */
  _Float16 half = (_Float16)x;
  u16 y;
  memcpy(&y, &half, 2);
  return saturates && (y & 0x7fff) == 0x7c00 && isfinite(x) ? y - 1u : y;
}
static u32 half_pair(double low, double high, int saturates) {
  return to_half(low, saturates) | to_half(high, saturates) << 16;
}
static float of_bf16(u32 x) { return float_of(x << 16); }
static u32 to_bf16(float x) {
  u32 bits = word(x);
  if (isnan(x)) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
/* A format of the OCP's 8-bit and MX specifications without infinities. */
static float of_small(u32 x, int exponent_size, int mantissa_size, int bias) {
  u32 exponent = x >> mantissa_size & low_ones(exponent_size), mantissa = x & low_ones(mantissa_size);
  float r = exponent ? ldexpf((1u << mantissa_size) + mantissa, (int)exponent - bias - mantissa_size)
                     : ldexpf(mantissa, 1 - bias - mantissa_size);
  return x >> (exponent_size + mantissa_size) & 1 ? -r : r;
}
static float of_e4m3(u32 x) { return (x & 127) == 127 ? NAN : of_small(x & 255, 4, 3, 7); }
static float of_e5m2(u32 x) { return of_half((x & 255) << 8); }
static float of_e2m3(u32 x) { return of_small(x & 63, 2, 3, 1); }
static float of_e3m2(u32 x) { return of_small(x & 63, 3, 2, 3); }
static float of_e2m1(u32 x) { return of_small(x & 15, 2, 1, 1); }

/* To nearest, even on ties. What is too large becomes NaN, or the largest if the wave saturates. */
static u32 to_e4m3(float x, int saturates) {
  u32 sign = word(x) >> 24 & 128, too_large = saturates ? 126 : 127;
  int exponent;
  if (isnan(x)) return sign | 127;
  if (isinf(x)) return sign | too_large;
  if (x == 0) return sign;
  frexpf(x, &exponent);
  exponent = exponent - 1 < -6 ? -6 : exponent - 1;
  double eighths = rint(ldexp(fabs((double)x), 3 - exponent));
  if (eighths >= 16) {
    eighths /= 2;
    exponent++;
  }
  if (eighths < 8) return sign | (u32)eighths;
  if (exponent > 8 || (exponent == 8 && eighths > 14)) return sign | too_large;
  return sign | (u32)(exponent + 7) << 3 | ((u32)eighths & 7);
}
/* By the power of two that a float32 scale has. */
static float rescaled(float x, u32 scale) { return ldexpf(x, exponent_bits(float_of(scale)) - 127); }
static float unscaled(float x, u32 scale) { return ldexpf(x, 127 - exponent_bits(float_of(scale))); }
