/* Matrix products: D = A B + C of M x K, K x M and M x M elements, spread over the lanes of a wave.
 *
 *     A, B of 16 bits or of f8f6f4 with fewer than 8    lane l has row (column) l % M, elements l / M * K M / 64 on
 *     A, B of f8f6f4 with 8 bits                        the same lanes, but 16 elements of each half of K
 *     C, D with M = 16                                  register i of lane l: row 4 (l / 16) + i, column l % 16
 *     C, D with M = 32                                  register i: row 8 (i / 4) + 4 (l / 32) + i % 4, column l % 32
 *     scales                                            a byte for each 32 elements along K, in the lane of their row
 *
 * Products are summed in double precision and rounded once, except of float32, which are added in order.
 */
static float element_values[FORMAT_E2M1 + 1][256];

static void fill_element_values(void) {
  for (u32 x = 0; x < 256; x++) {
    element_values[FORMAT_E4M3][x] = of_e4m3(x);
    element_values[FORMAT_E5M2][x] = of_e5m2(x);
    element_values[FORMAT_E2M3][x] = of_e2m3(x);
    element_values[FORMAT_E3M2][x] = of_e3m2(x);
    element_values[FORMAT_E2M1][x] = of_e2m1(x);
  }
}
static const int element_bits[] = {
    [FORMAT_E4M3] = 8, [FORMAT_E5M2] = 8, [FORMAT_E2M3] = 6, [FORMAT_E3M2] = 6,
    [FORMAT_E2M1] = 4, [FORMAT_F16] = 16, [FORMAT_BF16] = 16, [FORMAT_F32] = 32,
};
static inline float element(const u32 (*r)[LANES], int lane, int format, int i) { /* the i-th of a lane's */
  int bits = element_bits[format], first = bits * i, at = first / 32;
  u64 words = r[at][lane];
  if (first % 32 + bits > 32) words = pair(r[at][lane], r[at + 1][lane]);
  u32 x = (u32)field(words, first % 32, bits);
  switch (format) {
    case FORMAT_F16: return of_half(x);
    case FORMAT_BF16: return of_bf16(x);
    case FORMAT_F32: return float_of(x);
  }
  return element_values[format][x];
}
enum { MAX_ROWS = 32, MAX_DEPTH = 128, SCALED_ELEMENTS = 32 };

/* Spread the registers of A or B to [row][k], B's columns as rows. */
static void gather(const u32 (*r)[LANES], int format, int rows, int depth, double (*to)[MAX_DEPTH]) {
  int n = depth * rows / LANES, is_halved = n == 32 && element_bits[format] == 8;
#define GATHER(FORMAT)                                                              \
  case FORMAT:                                                                      \
    for (int lane = 0; lane < LANES; lane++)                                        \
      for (int i = 0; i < n; i++) {                                                 \
        int group = lane / rows, k = group * n + i;                                 \
        if (is_halved) k = i < 16 ? 16 * group + i : depth / 2 + 16 * group + i - 16; \
        to[lane % rows][k] = element(r, lane, FORMAT, i);                           \
      }                                                                             \
    break;
  switch (format) { /* a loop for each, which the compiler makes quick */
    GATHER(FORMAT_E4M3) GATHER(FORMAT_E5M2) GATHER(FORMAT_E2M3) GATHER(FORMAT_E3M2)
    GATHER(FORMAT_E2M1) GATHER(FORMAT_F16) GATHER(FORMAT_BF16) GATHER(FORMAT_F32)
  }
}
static double scale_of(u32 a, u32 b) { /* E8M0; the product's exponent is always one of a normal double */
  return a == 255 || b == 255 ? NAN : double_of((u64)(a + b - 254 + 1023) << 52);
}
/* a, b: registers of the factors; c: of the summand; scale_a, scale_b: of the scales, if there are any. */
static void multiply(const Instruction *ins, const u32 (*a)[LANES], const u32 (*b)[LANES], const u32 (*c)[LANES],
                     const u32 *scale_a, const u32 *scale_b, u32 (*out)[LANES]) {
  static _Thread_local double A[MAX_ROWS][MAX_DEPTH], B[MAX_ROWS][MAX_DEPTH], row[MAX_DEPTH][MAX_ROWS];
  int rows = ins->rows, depth = ins->depth, is_scaled = ins->scale_byte_a >= 0;
  int step = depth < SCALED_ELEMENTS ? depth : SCALED_ELEMENTS;
  gather(a, ins->format_a, rows, depth, A);
  gather(b, ins->format_b, rows, depth, B);
  for (int k = 0; k < depth; k++)
    for (int j = 0; j < rows; j++) row[k][j] = B[j][k];
  for (int i = 0; i < rows; i++) {
    int reg = rows == 32 ? i / 8 * 4 + i % 4 : i % 4, lane = i / 4 % (LANES / rows) * rows; /* of column 0 */
    double sum[MAX_ROWS] = {0};
    float chain[MAX_ROWS];
    for (int j = 0; j < rows; j++) chain[j] = float_of(c[reg][lane + j]);
    for (int k = 0; k < depth; k += step) {
      double part[MAX_ROWS] = {0};
      for (int q = k; q < k + step; q++)
        if (ins->format_a == FORMAT_F32)
          for (int j = 0; j < rows; j++) chain[j] = fmaf((float)A[i][q], (float)row[q][j], chain[j]);
        else
          for (int j = 0; j < rows; j++) part[j] += A[i][q] * row[q][j];
      for (int j = 0; j < rows; j++) {
        int group = rows * (k / SCALED_ELEMENTS);
        double scale = !is_scaled ? 1
                                  : scale_of(scale_a[i + group] >> 8 * ins->scale_byte_a & 255,
                                             scale_b[j + group] >> 8 * ins->scale_byte_b & 255);
        sum[j] += part[j] * scale;
      }
    }
    for (int j = 0; j < rows; j++)
      out[reg][lane + j] = word(ins->format_a == FORMAT_F32 ? chain[j] : (float)(sum[j] + chain[j]));
  }
}
