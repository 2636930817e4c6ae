/* Executes decoded gfx950 instructions: waves of 64 lanes, all workgroups side by side. emulator.py builds and calls it.
 *
 * What an instruction computes stands in instructions.py; layout.h and the cases of the switch
 * statements are made from it and from layout.py.
 */
#include <stdlib.h>
#include "numbers.h"
#include "layout.h"
#include "memory.h"
#include "hazards.h"
#include "matrix.h"

/* ---- operands ---- */
static inline u32 scalar_word(const Wave *w, const Operand *o) {
  return o->kind == KIND_SCALAR ? w->scalar[o->value] : o->kind == KIND_CONDITION ? (u32)w->scc : o->value;
}
static inline u64 scalar_words(const Wave *w, const Operand *o) { /* 64 bits */
  return o->kind == KIND_SCALAR && o->words > 1 ? scalar_pair(w, o->value) : pair(scalar_word(w, o), o->high);
}
static inline u32 (*registers(const Wave *w, const Operand *o))[LANES] {
  return (o->kind == KIND_ACCUMULATOR ? w->accumulator : w->vector) + o->value;
}
static void fetch(const Wave *w, const Operand *o, int k, u32 *out) { /* the k-th word of each lane */
  if (o->kind == KIND_VECTOR || o->kind == KIND_ACCUMULATOR) {
    memcpy(out, registers(w, o)[k], 4 * LANES);
    return;
  }
  u32 x = o->kind == KIND_SCALAR ? w->scalar[o->value + k] : k ? o->high : scalar_word(w, o);
  for (int lane = 0; lane < LANES; lane++) out[lane] = x;
}
static void check_arrived(Machine *m, const Wave *w, const Instruction *ins, const Operand *o) {
  int is_scalar = o->kind == KIND_SCALAR;
  if (o->kind != KIND_VECTOR && !is_scalar) return;
  const u8 *pending = is_scalar ? w->scalar_pending : w->vector_pending;
  for (int k = 0; k < o->words; k++)
    if (pending[o->value + k]) report(m, w, ins, PROBLEM_PENDING, o->value + k + 1000 * is_scalar, 0);
}
static void store_lanes(u32 *to, const u32 *from, u64 lanes) {
  if (lanes == ~0ull) memcpy(to, from, 4 * LANES);
  else
    for (int lane = 0; lane < LANES; lane++)
      if (lanes >> lane & 1) to[lane] = from[lane];
}
static void change_sign(const Instruction *ins, int k, u32 *x) { /* as the k-th source's modifiers say */
  int modifiers = ins->src[k].modifiers;
  u32 sign = 1u << ins->sign_bit;
  if (!(modifiers & (MODIFIER_NEGATIVE | MODIFIER_ABSOLUTE))) return;
  for (int lane = 0; lane < LANES; lane++) {
    if (modifiers & MODIFIER_ABSOLUTE) x[lane] &= ~sign;
    if (modifiers & MODIFIER_NEGATIVE) x[lane] ^= sign;
  }
}

/* ---- SDWA: a part of a word ---- */
static int first_bit(int select) {
  return select >= SELECT_WORD_0 ? 16 * (select - SELECT_WORD_0) : 8 * (select - SELECT_BYTE_0);
}
static int n_bits(int select) { return select == SELECT_DWORD ? 32 : select >= SELECT_WORD_0 ? 16 : 8; }
static void select_part(u32 *x, const Operand *o) {
  if (o->select == SELECT_DWORD) return;
  for (int lane = 0; lane < LANES; lane++) {
    u32 part = x[lane] >> first_bit(o->select);
    int n = n_bits(o->select);
    x[lane] = o->modifiers & MODIFIER_SIGN_EXTENDED ? sign_extended(part, n) : part & low_ones(n);
  }
}
static void place_part(const Instruction *ins, u32 *r, const u32 *old) { /* dst_unused: 0 zeros, 1 sign, 2 kept */
  if (ins->dst_select == SELECT_DWORD) return;
  int shift = first_bit(ins->dst_select), n = n_bits(ins->dst_select);
  u32 bits = low_ones(n) << shift;
  for (int lane = 0; lane < LANES; lane++) {
    u32 part = r[lane] << shift & bits;
    if (ins->dst_unused == 1) r[lane] = sign_extended(r[lane], n) << shift;
    else r[lane] = ins->dst_unused == 2 ? (old[lane] & ~bits) | part : part;
  }
}

/* ---- DPP: the first source from another lane ---- */
static int dpp_source(const Instruction *ins, int lane) { /* -1: none */
  int i = lane & 15, row = lane - i, n = ins->dpp_argument;
  switch (ins->dpp) {
    case DPP_QUAD_PERM: return (lane & ~3) | (n >> 2 * (lane & 3) & 3);
    case DPP_ROW_SHL: return i + n < 16 ? lane + n : -1;
    case DPP_ROW_SHR: return i - n >= 0 ? lane - n : -1;
    case DPP_ROW_ROR: return row + ((i - n) & 15);
    case DPP_ROW_MIRROR: return row + 15 - i;
    case DPP_ROW_HALF_MIRROR: return (lane & ~7) | (7 - (lane & 7));
    case DPP_ROW_BCAST: return n == 15 ? row - 1 : lane >= 32 ? 31 : -1;
    case DPP_WAVE_SHL: return lane + 1 < LANES ? lane + 1 : -1;
    case DPP_WAVE_SHR: return lane - 1;
    case DPP_WAVE_ROL: return (lane + 1) % LANES;
    case DPP_WAVE_ROR: return (lane + LANES - 1) % LANES;
    case DPP_ROW_NEWBCAST: return row + n;
  }
  return lane;
}
static u64 move_lanes(const Instruction *ins, u32 *x, u64 exec) { /* return the lanes that get a result */
  u32 old[LANES];
  u64 written = 0;
  memcpy(old, x, sizeof old);
  for (int lane = 0; lane < LANES; lane++) {
    if (!(ins->row_mask >> lane / 16 & 1) || !(ins->bank_mask >> lane / 4 % 4 & 1)) continue;
    int from = dpp_source(ins, lane), has_source = from >= 0 && exec >> from & 1;
    if (!has_source && !ins->bound_control) continue;
    x[lane] = has_source ? old[from] : 0;
    written |= 1ull << lane;
  }
  return written & exec;
}

/* ---- a 32-bit result for each lane ---- */
static int lanes(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u32 source[3][LANES], old[LANES], result[LANES];
  u64 exec = scalar_pair(w, REGISTER_EXEC), written = exec, vcc = scalar_pair(w, REGISTER_VCC), mask = 0;
  memset(source, 0, sizeof source);
  for (int k = 0; k < 3; k++)
    if (ins->src[k].kind) fetch(w, &ins->src[k], 0, source[k]);
  if (ins->src[2].kind == KIND_SCALAR) mask = scalar_words(w, &ins->src[2]);
  fetch(w, &ins->dst, 0, old);
  if (ins->is_sdwa)
    for (int k = 0; k < 2; k++) select_part(source[k], &ins->src[k]);
  if (ins->dpp) written = move_lanes(ins, source[0], exec);
  for (int k = 0; k < 3; k++) change_sign(ins, k, source[k]);
  const int CLAMPED = ins->saturate_integer, SATURATE = w->saturates, HIGH = ins->op_sel >> 3 & 1;
  const u32 TABLE = ins->truth_table, part_shift = 16 * (ins->op_sel & 1);
#define DO_LANE(VALUE)                                                               \
  for (int lane = 0; lane < LANES; lane++) {                                         \
    u32 A = source[0][lane], B = source[1][lane], C = source[2][lane], D = old[lane]; \
    float a = float_of(A), b = float_of(B), c = float_of(C);                          \
    const u32 PART = A >> part_shift;                                                \
    (void)a, (void)b, (void)c, (void)C, (void)D, (void)PART;                         \
    result[lane] = (u32)VALUE;                                                       \
  }                                                                                  \
  break;
  switch (ins->opcode) {
#include "cases_lane.h"
  }
  if (ins->clamp)
    for (int lane = 0; lane < LANES; lane++) result[lane] = word(smaller(larger(float_of(result[lane]), 0), 1));
  if (ins->is_sdwa) place_part(ins, result, old);
  store_lanes(registers(w, &ins->dst)[0], result, written);
  return 1;
}

/* ---- results of 64 bits, with carries, and pairs ---- */
static void fetch_pairs(const Wave *w, const Instruction *ins, u64 (*source)[LANES]) {
  u32 low[LANES], high[LANES];
  for (int k = 0; k < 3; k++) {
    const Operand *o = &ins->src[k];
    if (!o->kind) continue;
    fetch(w, o, 0, low);
    memset(high, 0, sizeof high);
    if (o->words > 1 || o->kind == KIND_CONSTANT) fetch(w, o, 1, high);
    for (int lane = 0; lane < LANES; lane++) source[k][lane] = pair(low[lane], high[lane]);
  }
}
static void store_pairs(Wave *w, const Instruction *ins, const u64 *result) {
  u32 half[LANES];
  for (int k = 0; k < 2; k++) {
    for (int lane = 0; lane < LANES; lane++) half[lane] = (u32)(result[lane] >> 32 * k);
    store_lanes(registers(w, &ins->dst)[k], half, scalar_pair(w, REGISTER_EXEC));
  }
}
static int lanes_64(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u64 source[3][LANES] = {{0}}, result[LANES], exec = scalar_pair(w, REGISTER_EXEC), carries = 0;
  const u32 byte_shift = 8 * (ins->op_sel & 3);
  fetch_pairs(w, ins, source);
#define DO_LANE_64(VALUE)                                                       \
  for (int lane = 0; lane < LANES; lane++) {                                    \
    u64 A = source[0][lane], B = source[1][lane], C = source[2][lane];          \
    const u32 BYTE = A >> byte_shift & 255;                                     \
    (void)B, (void)C, (void)BYTE;                                               \
    u128 r = (u128)VALUE;                                                       \
    result[lane] = (u64)r;                                                      \
    if (r >> 64 & 1 && exec >> lane & 1) carries |= 1ull << lane;               \
  }                                                                             \
  break;
  switch (ins->opcode) {
#include "cases_lane_64.h"
  }
  store_pairs(w, ins, result);
  if (ins->dst2.kind) set_pair(w, ins->dst2.value, carries);
  return 1;
}
static int lanes_carry(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u32 source[2][LANES], result[LANES];
  u64 exec = scalar_pair(w, REGISTER_EXEC), carries = 0, mask = ins->src[2].kind ? scalar_words(w, &ins->src[2]) : 0;
  for (int k = 0; k < 2; k++) fetch(w, &ins->src[k], 0, source[k]);
#define DO_LANE_CARRY(VALUE)                                 \
  for (int lane = 0; lane < LANES; lane++) {                 \
    u32 A = source[0][lane], B = source[1][lane];            \
    u64 r = VALUE;                                           \
    result[lane] = (u32)r;                                   \
    if (r >> 32 && exec >> lane & 1) carries |= 1ull << lane; \
  }                                                          \
  break;
  switch (ins->opcode) {
#include "cases_lane_carry.h"
  }
  store_lanes(registers(w, &ins->dst)[0], result, exec);
  set_pair(w, ins->dst2.value, carries);
  return 1;
}
/* op_sel and op_sel_hi say which part of each source the low and the high result are made from. */
static int part_of(const Instruction *ins, int half, int k) { return (half ? ins->op_sel_hi : ins->op_sel) >> k & 1; }
static int is_negated(const Instruction *ins, int half, int k) { return (half ? ins->neg_hi : ins->neg_lo) >> k & 1; }
static int lanes_pair_f32(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u64 source[3][LANES] = {{0}}, result[LANES] = {0};
  fetch_pairs(w, ins, source);
  for (int half = 0; half < 2; half++)
    for (int lane = 0; lane < LANES; lane++) {
      float value[3], r = 0;
      for (int k = 0; k < 3; k++) {
        value[k] = float_of((u32)(source[k][lane] >> 32 * part_of(ins, half, k)));
        if (is_negated(ins, half, k)) value[k] = -value[k];
      }
      float p = value[0], q = value[1], s = value[2];
      (void)s;
#define DO_LANE_PAIR_F32(VALUE) r = VALUE; break;
      switch (ins->opcode) {
#include "cases_lane_pair_f32.h"
  }
      result[lane] |= (u64)word(r) << 32 * half;
    }
  store_pairs(w, ins, result);
  return 1;
}
static int lanes_pair_f16(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u32 source[3][LANES] = {{0}}, result[LANES] = {0};
  for (int k = 0; k < 3; k++)
    if (ins->src[k].kind) fetch(w, &ins->src[k], 0, source[k]);
  for (int half = 0; half < 2; half++)
    for (int lane = 0; lane < LANES; lane++) {
      float value[3];
      double r = 0;
      for (int k = 0; k < 3; k++) {
        value[k] = of_half(source[k][lane] >> 16 * part_of(ins, half, k) & 0xffff);
        if (is_negated(ins, half, k)) value[k] = -value[k];
      }
      float p = value[0], q = value[1], s = value[2];
      (void)s;
#define DO_LANE_PAIR_F16(VALUE) r = VALUE; break;
      switch (ins->opcode) {
#include "cases_lane_pair_f16.h"
  }
      result[lane] |= to_half(r, w->saturates) << 16 * half;
    }
  store_lanes(registers(w, &ins->dst)[0], result, scalar_pair(w, REGISTER_EXEC));
  return 1;
}

/* VOPC. condition: 1 less, 2 equal, 4 greater, 8 unordered, added up. */
#define ORDER(x, y) ((x) < (y) ? 1 : (x) == (y) ? 2 : (x) > (y) ? 4 : 8)
static int order(int type, u64 x, u64 y) {
  switch (type) {
    case NUMBER_F32: return ORDER(float_of((u32)x), float_of((u32)y));
    case NUMBER_I32: return ORDER((i32)x, (i32)y);
    case NUMBER_U32: return ORDER((u32)x, (u32)y);
    case NUMBER_I64: return ORDER((i64)x, (i64)y);
    case NUMBER_U64: return ORDER(x, y);
    case NUMBER_I16: return ORDER((i16)x, (i16)y);
    case NUMBER_U16: return ORDER((u16)x, (u16)y);
  }
  return ORDER(of_half(x & 0xffff), of_half(y & 0xffff));
}
static int lanes_compare(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u32 low[2][LANES], high[2][LANES];
  u64 exec = scalar_pair(w, REGISTER_EXEC), result = 0;
  int is_wide = ins->number_type == NUMBER_I64 || ins->number_type == NUMBER_U64;
  for (int k = 0; k < 2; k++) {
    const Operand *o = &ins->src[k];
    fetch(w, o, 0, low[k]);
    if (is_wide) fetch(w, o, 1, high[k]);
    if (ins->is_sdwa) select_part(low[k], o);
    change_sign(ins, k, low[k]);
  }
  for (int lane = 0; lane < LANES; lane++) {
    u64 x = pair(low[0][lane], is_wide ? high[0][lane] : 0), y = pair(low[1][lane], is_wide ? high[1][lane] : 0);
    if (exec >> lane & 1 && order(ins->number_type, x, y) & ins->condition) result |= 1ull << lane;
  }
  set_pair(w, ins->dst.value, result);
  if (ins->to_exec) set_pair(w, REGISTER_EXEC, result);
  return 1;
}

/* ---- scalars ---- */
static int scalars(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u32 x = scalar_word(w, &ins->src[0]), y = scalar_word(w, &ins->src[1]), *D_ = &w->scalar[ins->dst.value], D = *D_;
  u32 scc = w->scc;
#define DO_SCALAR(VALUE, CONDITION) { u32 r = (u32)VALUE; w->scc = CONDITION; *D_ = r; return 1; }
  switch (ins->opcode) {
#include "cases_scalar.h"
  }
  return 0;
}
static int scalars_64(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u64 x = scalar_words(w, &ins->src[0]), y = scalar_words(w, &ins->src[1]);
  u32 scc = w->scc;
#define DO_SCALAR_64(VALUE, CONDITION) { u64 r = (u64)VALUE; w->scc = CONDITION; set_pair(w, ins->dst.value, r); return 1; }
  switch (ins->opcode) {
#include "cases_scalar_64.h"
  }
  return 0;
}
static int scalars_of_64(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u64 x = scalar_words(w, &ins->src[0]);
  u32 scc = w->scc;
#define DO_SCALAR_OF_64(VALUE, CONDITION) { u32 r = (u32)VALUE; w->scc = CONDITION; w->scalar[ins->dst.value] = r; return 1; }
  switch (ins->opcode) {
#include "cases_scalar_of_64.h"
  }
  return 0;
}
static int scalar_condition(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u64 x = scalar_words(w, &ins->src[0]), y = scalar_words(w, &ins->src[1]);
#define DO_SCALAR_CONDITION(VALUE) w->scc = VALUE; return 1;
  switch (ins->opcode) {
#include "cases_scalar_condition.h"
  }
  return 0;
}
static int save_exec(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u64 x = scalar_words(w, &ins->src[0]), y = scalar_pair(w, REGISTER_EXEC);
#define DO_SAVE_EXEC(VALUE) { u64 r = VALUE; set_pair(w, ins->dst.value, y); set_pair(w, REGISTER_EXEC, r); w->scc = r != 0; return 1; }
  switch (ins->opcode) {
#include "cases_save_exec.h"
  }
  return 0;
}
static int branch(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u64 vcc = scalar_pair(w, REGISTER_VCC), exec = scalar_pair(w, REGISTER_EXEC);
  int scc = w->scc, jumps = 0;
#define DO_BRANCH(CONDITION) jumps = CONDITION; break;
  switch (ins->opcode) {
#include "cases_branch.h"
  }
  if (jumps) w->pc = ins->target;
  return 1;
}
static int without_effect(Machine *m, Wave *w, const Instruction *ins) { (void)m, (void)w, (void)ins; return 1; }

/* ---- memory ---- */
static int overlaps(const Wave *w, const Pending *p) { /* the last access: with an earlier one still to be performed */
  for (int i = 0; i < w->n_vector - 1; i++) {
    const Pending *other = &w->vector_queue[(w->first_vector + i) % VECTOR_QUEUE];
    if (other->is_performed || other->ins->access == ACCESS_WRITE_BACK) continue;
    for (int j = 0; j < LANES; j++)
      for (int k = 0; k < LANES; k++)
        if (p->active >> j & 1 && other->active >> k & 1 && p->address[j] < other->address[k] + 16 &&
            other->address[k] < p->address[j] + 16)
          return 1;
  }
  return 0;
}
static void permute(const Wave *w, const Instruction *ins, Pending *p) { /* permutation: 0 swizzle, 1 pull, 2 push */
  u32 x[LANES], at[LANES] = {0};
  fetch(w, &ins->src[1], 0, x);
  if (ins->permutation) fetch(w, &ins->src[0], 0, at);
  memset(p->data2[0], 0, sizeof p->data2[0]);
  for (int lane = 0; lane < LANES; lane++) {
    int offset = ins->offset, i = lane & 31, from;
    if (ins->permutation == 2) {
      if (p->exec >> lane & 1) p->data2[0][(at[lane] + offset) / 4 % LANES] = x[lane];
      continue;
    }
    if (ins->permutation == 1) from = (at[lane] + offset) / 4 % LANES;
    else if (offset & 0x8000) from = (lane & ~3) | (offset >> 2 * (lane & 3) & 3);
    else from = (lane & 32) | (((i & offset) | (offset >> 5 & 31)) ^ (offset >> 10 & 31));
    p->data2[0][lane] = p->exec >> from & 1 ? x[from] : 0;
  }
}
static void set_addresses(const Wave *w, const Instruction *ins, Pending *p) {
  const Operand *address = &ins->src[0], *base = &ins->src[2];
  u32 low[LANES] = {0}, high[LANES];
  if (address->kind) fetch(w, address, 0, low);
  if (ins->space == SPACE_LDS) {
    for (int lane = 0; lane < LANES; lane++) p->address[lane] = low[lane]; /* offsets differ from piece to piece */
  } else if (ins->space == SPACE_BUFFER) { /* what is beyond its end reads 0 and is not written */
    u64 start = w->scalar[base->value] | (u64)(w->scalar[base->value + 1] & 0xffff) << 32;
    u32 size = w->scalar[base->value + 2], extra = scalar_word(w, &ins->src[3]);
    for (int lane = 0; lane < LANES; lane++) {
      u64 offset = (u64)(ins->has_offset_register ? low[lane] : 0) + (u32)ins->offset + extra;
      if (offset >= size) p->active &= ~(1ull << lane);
      p->address[lane] = start + offset;
    }
  } else if (base->kind) {
    for (int lane = 0; lane < LANES; lane++) p->address[lane] = scalar_pair(w, base->value) + low[lane] + (i64)ins->offset;
  } else {
    fetch(w, address, 1, high);
    for (int lane = 0; lane < LANES; lane++) p->address[lane] = pair(low[lane], high[lane]) + (i64)ins->offset;
  }
}
static u64 *traffic_of(Machine *m, const Instruction *ins) {
  return (u64 *)m->launch->traffic + (u64)ins->number * (TRAFFIC_COVERED + 1);
}
static void count_traffic(Machine *m, const Instruction *ins, const Pending *p, u64 lanes) {
  u64 *traffic = traffic_of(m, ins), last = ~0ull;
  int n = ins->bytes * n_pieces(ins);
  if (!lanes) return;
  for (int lane = 0; lane < LANES; lane++) {
    u64 sector = p->address[lane] / SECTOR_BYTES;
    if (!(lanes >> lane & 1) || sector == last) continue;
    traffic[TRAFFIC_SECTORS] += 1 + (n - 1) / SECTOR_BYTES;
    last = sector;
  }
  traffic[TRAFFIC_BYTES] += n * __builtin_popcountll(lanes);
  Region *r = ins->space == SPACE_LDS ? NULL : region_of(m, p->address[__builtin_ctzll(lanes)], 1);
  if (r && !r->is_writable) traffic[TRAFFIC_WEIGHT_BYTES] += n * __builtin_popcountll(lanes);
}
static int memory(Machine *m, Wave *w, const Instruction *ins) { /* issue: the queues do the rest */
  int is_scalar = ins->space == SPACE_SCALAR_CACHE, is_lds = is_scalar || ins->space == SPACE_LDS;
  if (!is_lds && w->n_vector == VECTOR_QUEUE - 1) wait_vector(m, w, VECTOR_QUEUE - 2);
  if (is_lds && w->n_lds == LDS_QUEUE) wait_lds(m, w, 0);
  Pending *p = is_lds ? &w->lds_queue[w->n_lds] : &w->vector_queue[(w->first_vector + w->n_vector) % VECTOR_QUEUE];
  p->ins = ins;
  p->exec = p->active = scalar_pair(w, REGISTER_EXEC);
  if (is_scalar) {
    u32 extra = ins->src[1].kind ? scalar_word(w, &ins->src[1]) : 0;
    p->address[0] = (scalar_pair(w, ins->src[0].value) + (i64)ins->offset + extra) & ~3ull;
    for (int k = 0; k < ins->bytes / 4; k++) w->scalar_pending[ins->dst.value + k]++;
    count_traffic(m, ins, p, 1);
  } else if (ins->access == ACCESS_PERMUTE) {
    permute(w, ins, p);
  } else if (ins->access == ACCESS_WRITE_BACK) {
    if (ins->scope) race_issue_write_back(&m->races, wave_index(m, w));
  } else {
    set_addresses(w, ins, p);
    count_traffic(m, ins, p, p->active);
    if (ins->access != ACCESS_STORE) memset(p->data2, 0, sizeof p->data2);
    if (ins->src[1].kind)
      for (int k = 0; k < ins->src[1].words; k++) fetch(w, &ins->src[1], k, p->data[k]);
    if (ins->dst2.kind)
      for (int k = 0; k < ins->dst2.words; k++) fetch(w, &ins->dst2, k, p->data2[k]);
  }
  if (!is_scalar && ins->dst.kind == KIND_VECTOR)
    for (int k = 0; k < ins->dst.words; k++) w->vector_pending[ins->dst.value + k]++;
  if (is_lds) w->n_lds++;
  else w->n_vector++;
  /* Late, an atomic still comes first: before all of its wave's earlier stores but those to the same place. */
  p->is_performed = 0;
  int is_early_atomic = ins->access == ACCESS_ATOMIC && !is_lds && !overlaps(w, p);
  if (!(m->launch->mode & MODE_LATE) || is_early_atomic) perform(m, w, p);
  return 1;
}

/* ---- matrix products ---- */
static int matrix(Machine *m, Wave *w, const Instruction *ins) {
  (void)m;
  u32 a[8][LANES], b[8][LANES], c[16][LANES], scale_a[LANES], scale_b[LANES], out[16][LANES];
  int n = ins->rows * ins->rows / LANES;
  for (int k = 0; k < ins->src[0].words; k++) fetch(w, &ins->src[0], k, a[k]);
  for (int k = 0; k < ins->src[1].words; k++) fetch(w, &ins->src[1], k, b[k]);
  for (int k = 0; k < n; k++) fetch(w, &ins->src[2], ins->src[2].kind == KIND_CONSTANT ? 0 : k, c[k]);
  if (ins->scale_byte_a >= 0) {
    fetch(w, &ins->src[3], 0, scale_a);
    fetch(w, &ins->dst2, 0, scale_b);
  }
  multiply(ins, a, b, c, scale_a, scale_b, out);
  for (int k = 0; k < n; k++) memcpy(registers(w, &ins->dst)[k], out[k], 4 * LANES);
  return 1;
}

/* ---- moves between lanes and registers, and the wave's state ---- */
static void swap_rows(u32 *x, u32 *y, int n) { /* rows of n lanes: the odd ones of x with the even ones of y */
  for (int first = 0; first < LANES; first += 2 * n)
    for (int i = 0; i < n; i++) {
      u32 t = x[first + n + i];
      x[first + n + i] = y[first + i];
      y[first + i] = t;
    }
}
static void scale_for_division(Wave *w, const Instruction *ins) {
  u32 source[3][LANES], result[LANES];
  u64 exec = scalar_pair(w, REGISTER_EXEC), back = 0;
  for (int k = 0; k < 3; k++) {
    fetch(w, &ins->src[k], 0, source[k]);
    change_sign(ins, k, source[k]);
  }
  for (int lane = 0; lane < LANES; lane++) {
    int scales_back;
    float r = div_scale(float_of(source[0][lane]), float_of(source[1][lane]), float_of(source[2][lane]), &scales_back);
    result[lane] = word(r);
    if (scales_back && exec >> lane & 1) back |= 1ull << lane;
  }
  store_lanes(registers(w, &ins->dst)[0], result, exec);
  set_pair(w, ins->dst2.value, back);
}
static int move(Machine *m, Wave *w, const Instruction *ins) {
  u64 exec = scalar_pair(w, REGISTER_EXEC), pairs[3][LANES] = {{0}};
  int n_before;
  u32 x[LANES], *to = registers(w, &ins->dst)[0], *from = registers(w, &ins->src[0])[0];
  switch (ins->opcode) {
    case OP_s_waitcnt:
      n_before = w->n_vector + w->n_lds;
      if (ins->vmcnt >= 0) wait_vector(m, w, ins->vmcnt);
      if (ins->lgkmcnt >= 0) wait_lds(m, w, ins->lgkmcnt);
      traffic_of(m, ins)[TRAFFIC_COVERED] += n_before - w->n_vector - w->n_lds;
      return 1;
    case OP_s_barrier: w->state = AT_BARRIER; return 1;
    case OP_s_endpgm:
      wait_vector(m, w, 0);
      wait_lds(m, w, 0);
      w->state = ENDED;
      return 1;
    case OP_buffer_wbl2: return memory(m, w, ins); /* is over when it was waited for */
    case OP_buffer_inv:
      if (m->launch->mode & MODE_CACHES && ins->scope) invalidate(m, &m->caches[w->workgroup]);
      if (ins->scope) race_invalidate(&m->races, wave_index(m, w));
      return 1;
    case OP_s_setreg_imm32_b32: w->saturates = ins->offset; return 1; /* decode.py lets MODE.FP16_OVFL alone pass */
    case OP_s_memtime:
    case OP_s_memrealtime: set_pair(w, ins->dst.value, m->launch->executed); return 1;
    case OP_v_readlane_b32: w->scalar[ins->dst.value] = from[scalar_word(w, &ins->src[1]) % LANES]; return 1;
    case OP_v_readfirstlane_b32: w->scalar[ins->dst.value] = from[exec ? __builtin_ctzll(exec) : 0]; return 1;
    case OP_v_writelane_b32: to[scalar_word(w, &ins->src[1]) % LANES] = scalar_word(w, &ins->src[0]); return 1;
    case OP_v_accvgpr_read_b32:
    case OP_v_accvgpr_write_b32:
    case OP_v_accvgpr_mov_b32:
      fetch(w, &ins->src[0], 0, x);
      store_lanes(to, x, exec);
      return 1;
    case OP_v_permlane32_swap_b32: swap_rows(to, from, 32); return 1;
    case OP_v_permlane16_swap_b32: swap_rows(to, from, 16); return 1;
    case OP_v_swap_b32:
      memcpy(x, to, sizeof x);
      store_lanes(to, from, exec);
      store_lanes(from, x, exec);
      return 1;
    case OP_v_pk_mov_b32:
      fetch_pairs(w, ins, pairs);
      for (int lane = 0; lane < LANES; lane++)
        pairs[2][lane] = pair((u32)(pairs[0][lane] >> 32 * (ins->op_sel & 1)), (u32)(pairs[1][lane] >> 32 * (ins->op_sel >> 1 & 1)));
      store_pairs(w, ins, pairs[2]);
      return 1;
    case OP_v_div_scale_f32: scale_for_division(w, ins); return 1;
  }
  return 0;
}

/* ---- waves ---- */
static int (*const executors[])(Machine *, Wave *, const Instruction *) = {
    [FORM_LANE] = lanes, [FORM_LANE_64] = lanes_64, [FORM_LANE_CARRY] = lanes_carry,
    [FORM_LANE_PAIR_F32] = lanes_pair_f32, [FORM_LANE_PAIR_F16] = lanes_pair_f16, [FORM_LANE_COMPARE] = lanes_compare,
    [FORM_SCALAR] = scalars, [FORM_SCALAR_64] = scalars_64, [FORM_SCALAR_OF_64] = scalars_of_64,
    [FORM_SCALAR_CONDITION] = scalar_condition, [FORM_SAVE_EXEC] = save_exec, [FORM_BRANCH] = branch,
    [FORM_WITHOUT_EFFECT] = without_effect, [FORM_MOVE] = move, [FORM_MEMORY] = memory, [FORM_MATRIX] = matrix,
};
static void step(Machine *m, Wave *w) {
  static const Instruction none;
  Launch *launch = m->launch;
  if (w->pc < 0 || w->pc >= launch->n_instructions) {
    report(m, w, &none, PROBLEM_FELL_OFF, 0, 0);
    w->state = ENDED;
    return;
  }
  const Instruction *ins = &m->code[w->pc];
  ((u64 *)launch->counts)[(u64)w->workgroup * launch->n_instructions + w->pc]++;
  int next = ++w->pc;
  launch->executed++;
  if (launch->mode & MODE_CHECK_HAZARDS) check_hazards(m, w, ins);
  if ((w->n_vector | w->n_lds) && ins->opcode != OP_s_waitcnt && ins->opcode != OP_s_endpgm) {
    for (int k = 0; k < 4; k++) check_arrived(m, w, ins, &ins->src[k]);
    check_arrived(m, w, ins, &ins->dst2);
    if (ins->form != FORM_MEMORY) check_arrived(m, w, ins, &ins->dst); /* loads into one register arrive in order */
  }
  if (!ins->form || !executors[ins->form](m, w, ins)) {
    report(m, w, ins, PROBLEM_UNKNOWN, 0, 0);
    w->state = ENDED;
  }
  if (w->pc != next) record_jump(w, ins);
}

static u64 next_random(u64 *state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  return *state ^= *state << 17;
}
/* Let the waves of a workgroup go on if all that have not ended stand at the barrier. Return whether they do. */
static int open_barrier(Machine *m, int workgroup) {
  int n = m->launch->waves_per_workgroup, any = 0;
  Wave *first = &m->waves[workgroup * n];
  for (int i = 0; i < n; i++) {
    if (first[i].state == READY) return 0;
    any |= first[i].state == AT_BARRIER;
  }
  for (int i = 0; i < n; i++)
    if (first[i].state == AT_BARRIER) first[i].state = READY;
  m->lds[workgroup].epoch++;
  if (any) race_barrier(&m->races, workgroup * n, n);
  return any;
}
/* Run all waves in turn, or in a random order, some instructions each. Return an OUTCOME. */
static int schedule(Machine *m) {
  Launch *launch = m->launch;
  int n = launch->n_workgroups * launch->waves_per_workgroup, n_left = n, n_idle_rounds = 0;
  u64 random = launch->seed * 0x9e3779b97f4a7c15ull + 88172645463325252ull;
  while (n_left) {
    int has_moved = 0;
    for (int i = 0; i < n; i++) {
      Wave *w = &m->waves[launch->seed ? next_random(&random) % n : (u64)i];
      if (w->state != READY) continue;
      has_moved = 1;
      if (w->stalled) {
        w->stalled--;
        continue;
      }
      int budget = launch->seed ? 1 + next_random(&random) % launch->quantum : launch->quantum;
      while (budget-- && w->state == READY) step(m, w);
      n_left -= w->state == ENDED;
      /* Right behind a barrier a wave may fall far behind, while other workgroups go on. */
      if (w->state != READY && open_barrier(m, w->workgroup) && launch->mode & MODE_STALL && next_random(&random) % 4 == 0) {
        int slow = w->workgroup * launch->waves_per_workgroup + next_random(&random) % launch->waves_per_workgroup;
        m->waves[slow].stalled = next_random(&random) % 400;
      }
    }
    n_idle_rounds = has_moved ? 0 : n_idle_rounds + 1;
    if (n_idle_rounds > 1000) return OUTCOME_STUCK;
    if (launch->executed > launch->max_instructions) return OUTCOME_TOO_LONG;
  }
  return OUTCOME_ENDED;
}

/* ---- a launch ---- */
static void start_wave(const Launch *launch, Wave *w, int index) {
  w->workgroup = index / launch->waves_per_workgroup;
  w->number = index % launch->waves_per_workgroup;
  w->vector = malloc(4 * LANES * N_VECTOR);
  w->accumulator = malloc(4 * LANES * N_ACCUMULATOR);
  w->vector_queue = malloc(sizeof(Pending) * VECTOR_QUEUE);
  w->lds_queue = malloc(sizeof(Pending) * LDS_QUEUE);
  for (int k = 0; k < N_VECTOR; k++)
    for (int lane = 0; lane < LANES; lane++) w->vector[k][lane] = launch->poison;
  for (int k = 0; k < N_ACCUMULATOR; k++)
    for (int lane = 0; lane < LANES; lane++) w->accumulator[k][lane] = launch->poison;
  for (int k = 0; k < N_SCALAR; k++) w->scalar[k] = launch->poison;
  for (int lane = 0; lane < LANES; lane++) w->vector[0][lane] = LANES * w->number + lane;
  set_pair(w, 0, launch->kernarg);
  memcpy(&w->scalar[2], launch->preload, 4 * launch->n_preload);
  w->scalar[launch->n_user_registers] = w->workgroup;
  set_pair(w, REGISTER_EXEC, ~0ull);
  w->jumps[0] = w->jumps[1] = -LONGEST_HAZARD - 1;
}
static void start_lds(const Launch *launch, Lds *lds) {
  int n = launch->lds_bytes + 4;
  *lds = (Lds){malloc(n), calloc(n, 1), calloc(n, 1), calloc(n, 4), calloc(n, 4), 1};
  for (int k = 0; k < n; k++) lds->bytes[k] = (u8)(launch->poison >> 8 * (k & 3));
}
/* Small tensors that a kernel writes are in every cache before it starts, as they were then. */
static void fill_cache(Machine *m, Cache *c) {
  enum { SMALL = 1 << 18 };
  for (int i = 0; i < m->launch->n_regions; i++) {
    Region *r = &m->regions[i];
    if (!r->is_writable || r->size > SMALL || !r->size) continue;
    for (u64 line = r->base / LINE_BYTES; line <= (r->base + r->size - 1) / LINE_BYTES; line++)
      fetch_line(m, cached_line(c, line), 0);
  }
}
int run(Launch *launch) {
  int n = launch->n_workgroups * launch->waves_per_workgroup;
  Machine machine = {launch, launch->code, launch->regions, calloc(n, sizeof(Wave)), calloc(launch->n_workgroups, sizeof(Lds)),
                     calloc(launch->n_workgroups, sizeof(Cache)), 0, {0}, calloc(2 * launch->n_instructions, sizeof(int))},
          *m = &machine;
  start_races(&m->races, launch, m->regions);
  fill_element_values();
  for (int i = 0; i < n; i++) start_wave(launch, &m->waves[i], i);
  for (int i = 0; i < launch->n_workgroups; i++) {
    start_lds(launch, &m->lds[i]);
    if (launch->mode & MODE_CACHES) fill_cache(m, &m->caches[i]);
  }
  int outcome = schedule(m);
  for (int i = 0; i < launch->n_workgroups; i++) {
    Lds *lds = &m->lds[i];
    write_back(&m->caches[i]); /* as at the end of a kernel */
    free(m->caches[i].lines), free(lds->bytes), free(lds->writer), free(lds->readers);
    free(lds->write_epoch), free(lds->read_epoch);
  }
  for (int i = 0; i < n; i++) {
    Wave *w = &m->waves[i];
    free(w->vector), free(w->accumulator), free(w->vector_queue), free(w->lds_queue);
  }
  end_races(&m->races, launch);
  free(m->waves), free(m->lds), free(m->caches), free(m->checked);
  return outcome;
}
int launch_bytes(void) { return sizeof(Launch); }
int instruction_bytes(void) { return sizeof(Instruction); }
