/* Memory as a wave sees it, and what is on its way there.
 *
 * Memory instructions wait in queues, as the hardware counts them. Registers get what was loaded only when an s_waitcnt
 * covers the load. With MODE_LATE, memory itself is read and written only then. With MODE_CACHES, each workgroup has a
 * write-back cache that nothing but buffer_wbl2 sc1 and buffer_inv sc1 keeps coherent with the others'.
 */
enum { LANES = 64, N_VECTOR = 512, N_ACCUMULATOR = 256, N_SCALAR = 128, LINE_BYTES = 128, SECTOR_BYTES = 64, WORDS = 4 };
enum { VECTOR_QUEUE = 64, LDS_QUEUE = 128, RECENT = 32 };
enum State { READY, AT_BARRIER, ENDED };

typedef struct { u64 number; u8 data[LINE_BYTES], valid[LINE_BYTES], dirty[LINE_BYTES]; } Line;
typedef struct { Line *lines; int capacity, used; } Cache;
enum { NO_LINE = -1 };

/* A memory instruction that was issued. */
typedef struct {
  const Instruction *ins;
  u64 exec, active; /* lanes; active: of them those within a buffer */
  u64 address[LANES];
  int is_performed;
  u32 data[WORDS][LANES], data2[WORDS][LANES]; /* to store; loaded values replace the second */
} Pending;

typedef struct { const Instruction *ins; i64 time; } Issued; /* time: wait states since the wave's start */
typedef struct {
  u32 scalar[N_SCALAR];
  u32 (*vector)[LANES], (*accumulator)[LANES];
  int scc, pc, state, workgroup, number, saturates, stalled;
  Pending *vector_queue, *lds_queue; /* what vmcnt and lgkmcnt count */
  int n_vector, first_vector, n_lds;
  u8 vector_pending[N_VECTOR], scalar_pending[N_SCALAR]; /* loads into a register */
  Issued recent[RECENT];
  i64 time, jumps[2]; /* when the last two jumps were, and where the last one came from */
  u32 n_issued;
  int jumped_from;
} Wave;

typedef struct {
  u8 *bytes, *writer, *readers; /* since the last barrier: the last wave that wrote a byte, and those that read it */
  u32 *write_epoch, *read_epoch, epoch;
} Lds;

#include "races.h"

typedef struct {
  Launch *launch;
  const Instruction *code;
  Region *regions;
  Wave *waves;
  Lds *lds;
  Cache *caches;
  int last_region;
  Races races;
  int *checked; /* for each instruction: the ways to it whose hazards were looked for */
} Machine;

static void report(Machine *m, const Wave *w, const Instruction *ins, int problem, int detail, u64 address) {
  Launch *launch = m->launch;
  for (int i = 0; i < launch->n_reports; i++) {
    Report *r = &launch->reports[i];
    if (r->problem == problem && r->number == ins->number && r->detail == detail) {
      r->count++;
      return;
    }
  }
  if (launch->n_reports < (int)(sizeof launch->reports / sizeof *launch->reports))
    launch->reports[launch->n_reports++] = (Report){problem, ins->number, w->workgroup, w->number, detail, 1, address};
}

static inline u64 scalar_pair(const Wave *w, int i) { return pair(w->scalar[i], w->scalar[i + 1]); }
static inline void set_pair(Wave *w, int i, u64 x) {
  w->scalar[i] = (u32)x;
  w->scalar[i + 1] = (u32)(x >> 32);
}

/* ---- memory behind a cache ---- */
static Region *region_of(Machine *m, u64 at, u64 n) {
  for (int i = -1; i < m->launch->n_regions; i++) {
    int candidate = i < 0 ? m->last_region : i;
    Region *r = &m->regions[candidate];
    if (at >= r->base && n <= r->size && at - r->base <= r->size - n) {
      m->last_region = candidate;
      return r;
    }
  }
  return NULL;
}
static Line *slot_of(const Cache *c, u64 number) { /* its line, or the free one for it */
  for (u64 hash = number * 0x9e3779b97f4a7c15ull >> 20;; hash++) {
    Line *line = &c->lines[hash & (c->capacity - 1)];
    if (line->number == number || line->number == (u64)NO_LINE) return line;
  }
}
static Line *find_line(const Cache *c, u64 number) {
  if (!c->capacity) return NULL;
  Line *line = slot_of(c, number);
  return line->number == number ? line : NULL;
}
static Line *cached_line(Cache *c, u64 number) {
  Line *line = find_line(c, number);
  if (line) return line;
  if (2 * (c->used + 1) > c->capacity) {
    Cache old = *c;
    c->capacity = old.capacity ? 2 * old.capacity : 256;
    c->lines = malloc(sizeof(Line) * c->capacity);
    for (int i = 0; i < c->capacity; i++) c->lines[i].number = NO_LINE;
    for (int i = 0; i < old.capacity; i++)
      if (old.lines[i].number != (u64)NO_LINE) *slot_of(c, old.lines[i].number) = old.lines[i];
    free(old.lines);
  }
  line = slot_of(c, number);
  *line = (Line){.number = number};
  c->used++;
  return line;
}
static void fetch_line(Machine *m, Line *line, int again) { /* as far as it lies in a region; `again`: clean bytes too */
  for (int k = 0; k < LINE_BYTES; k++) {
    u64 at = line->number * LINE_BYTES + k;
    if (line->dirty[k] || (line->valid[k] && !again)) continue;
    line->valid[k] = region_of(m, at, 1) != NULL;
    if (line->valid[k]) line->data[k] = *(u8 *)at;
  }
}
static void write_back(Cache *c) {
  for (int i = 0; i < c->capacity; i++) {
    Line *line = &c->lines[i];
    if (line->number == (u64)NO_LINE) continue;
    for (int k = 0; k < LINE_BYTES; k++)
      if (line->dirty[k]) *(u8 *)(line->number * LINE_BYTES + k) = line->data[k];
    memset(line->dirty, 0, LINE_BYTES);
  }
}
/* What is loaded later must not be older than now: of all values that the hardware may show, the oldest is kept. */
static void invalidate(Machine *m, Cache *c) {
  for (int i = 0; i < c->capacity; i++)
    if (c->lines[i].number != (u64)NO_LINE) fetch_line(m, &c->lines[i], 1);
}
static void read_memory(Machine *m, const Wave *w, u64 at, int n, int past_caches, u8 *out) {
  if (!(m->launch->mode & MODE_CACHES)) {
    memcpy(out, (void *)at, n);
    return;
  }
  Cache *c = &m->caches[w->workgroup];
  for (int i = 0; i < n; i++, at++) {
    Line *line = past_caches ? find_line(c, at / LINE_BYTES) : cached_line(c, at / LINE_BYTES);
    int k = at % LINE_BYTES;
    if (past_caches) { /* from memory, but for what this workgroup wrote */
      out[i] = line && line->dirty[k] ? line->data[k] : *(u8 *)at;
    } else {
      if (!line->valid[k]) fetch_line(m, line, 0);
      out[i] = line->data[k];
    }
  }
}
static void write_memory(Machine *m, const Wave *w, u64 at, int n, int past_caches, const u8 *in) {
  Region *r = region_of(m, at, n);
  memset((u8 *)r->written + (at - r->base), 1, n);
  if (!(m->launch->mode & MODE_CACHES)) {
    memcpy((void *)at, in, n);
    return;
  }
  for (int i = 0; i < n; i++, at++) {
    Line *line = cached_line(&m->caches[w->workgroup], at / LINE_BYTES);
    int k = at % LINE_BYTES;
    line->data[k] = in[i];
    line->valid[k] = 1;
    line->dirty[k] = !past_caches;
    if (past_caches) *(u8 *)at = in[i];
  }
}
static void drop_cached(Machine *m, const Wave *w, u64 at, int n) { /* before an atomic, which acts on memory itself */
  Line *line = m->launch->mode & MODE_CACHES ? find_line(&m->caches[w->workgroup], at / LINE_BYTES) : NULL;
  for (int k = at % LINE_BYTES, end = k + n; line && k < end; k++) {
    if (line->dirty[k]) *(u8 *)(line->number * LINE_BYTES + k) = line->data[k];
    line->valid[k] = line->dirty[k] = 0;
  }
}
static u32 atomic_result(int operation, u32 old, u32 x, u32 expected) {
  switch (operation) {
    case ATOMIC_ADD: return old + x;
    case ATOMIC_SUB: return old - x;
    case ATOMIC_SMAX: return largest(old, x);
    case ATOMIC_SMIN: return smallest(old, x);
    case ATOMIC_UMAX: return old > x ? old : x;
    case ATOMIC_UMIN: return old < x ? old : x;
    case ATOMIC_AND: return old & x;
    case ATOMIC_OR: return old | x;
    case ATOMIC_XOR: return old ^ x;
    case ATOMIC_SWAP: return x;
    case ATOMIC_CMPSWAP: return old == expected ? x : old;
    case ATOMIC_ADD_F32: return word(float_of(old) + float_of(x));
  }
  return old;
}

/* ---- LDS ---- */
static void check_lds(Machine *m, const Wave *w, const Instruction *ins, u64 at, int n, const u8 *written) {
  Lds *lds = &m->lds[w->workgroup];
  if (written && !memcmp(lds->bytes + at, written, n)) return; /* the same value by several waves */
  for (u64 k = at; k < at + n; k++) {
    if (lds->write_epoch[k] == lds->epoch && lds->writer[k] != w->number)
      report(m, w, ins, PROBLEM_LDS_RACE, written ? 2 : 1, k);
    if (lds->read_epoch[k] != lds->epoch) lds->readers[k] = 0;
    if (written) {
      if (lds->readers[k] & ~(1 << w->number)) report(m, w, ins, PROBLEM_LDS_RACE, 3, k);
      lds->write_epoch[k] = lds->epoch;
      lds->writer[k] = w->number;
    } else {
      lds->read_epoch[k] = lds->epoch;
      lds->readers[k] |= 1 << w->number;
    }
  }
}

/* ---- an access ---- */
static int n_pieces(const Instruction *ins) { return ins->second_offset >= 0 ? 2 : 1; }

/* Return where a lane's access is in this process, NULL after a report. */
static u8 *place_of(Machine *m, const Wave *w, const Instruction *ins, int lane, u64 at) {
  int n = ins->bytes;
  if (ins->space == SPACE_LDS) {
    if (at + n > (u64)m->launch->lds_bytes) {
      report(m, w, ins, PROBLEM_LDS_BOUNDS, lane, at);
      return NULL;
    }
    if (at % (n > 8 ? 8 : n)) report(m, w, ins, PROBLEM_MISALIGNED, lane, at);
    return m->lds[w->workgroup].bytes + at;
  }
  Region *r = region_of(m, at, n);
  if (!r || (ins->access != ACCESS_LOAD && !r->is_writable)) {
    report(m, w, ins, r ? PROBLEM_READ_ONLY : PROBLEM_OUT_OF_BOUNDS, lane, at);
    return NULL;
  }
  if (at % (n > 4 ? 4 : n)) report(m, w, ins, PROBLEM_MISALIGNED, lane, at);
  return (u8 *)at;
}
static int wave_index(const Machine *m, const Wave *w) {
  return w->workgroup * m->launch->waves_per_workgroup + w->number;
}
/* What an access says about the order of waves: scoped ones and atomics order them, others must be ordered. */
static void check_order(Machine *m, const Wave *w, const Instruction *ins, u64 at, const u8 *stored) {
  if (!m->races.n_waves) return;
  int wave = wave_index(m, w);
  if (ins->scope) {
    synchronize(&m->races, wave, at, 0);
    return;
  }
  Region *r = region_of(m, at, ins->bytes);
  int other = record_access(&m->races, r, r - m->regions, wave, at, ins->bytes, stored);
  if (other >= 0 && other / m->launch->waves_per_workgroup != w->workgroup) report(m, w, ins, PROBLEM_RACE, other, at);
}
static void access_lane(Machine *m, Wave *w, Pending *p, int lane, int piece, u32 *loaded) {
  const Instruction *ins = p->ins;
  int is_lds = ins->space == SPACE_LDS, n = ins->bytes;
  u64 at = is_lds ? (u32)(p->address[lane] + (piece ? ins->second_offset : ins->offset)) : p->address[lane];
  u8 *place = place_of(m, w, ins, lane, at);
  if (!place) return;
  u32 stored[WORDS];
  for (int k = 0; k < WORDS; k++) stored[k] = (piece ? p->data2 : p->data)[k][lane];
  if (ins->half == 2) stored[0] >>= 16;
  if (is_lds && m->launch->mode & MODE_CHECK_LDS)
    check_lds(m, w, ins, at, n, ins->access == ACCESS_STORE ? (u8 *)stored : NULL);
  if (!is_lds && ins->access != ACCESS_ATOMIC) check_order(m, w, ins, at, ins->access == ACCESS_STORE ? (u8 *)stored : NULL);
  u8 *to = (u8 *)loaded + piece * n;
  if (ins->access == ACCESS_LOAD) {
    if (is_lds) memcpy(to, place, n);
    else read_memory(m, w, at, n, ins->scope, to);
  } else if (ins->access == ACCESS_STORE) {
    if (is_lds) memcpy(place, stored, n);
    else write_memory(m, w, at, n, ins->scope, (u8 *)stored);
  } else {
    if (!is_lds) drop_cached(m, w, at, n);
    memcpy(to, place, 4);
    u32 new = atomic_result(ins->atomic, loaded[0], p->data[0][lane], p->data[1][lane]);
    memcpy(place, &new, 4);
    if (!is_lds && m->races.n_waves) synchronize(&m->races, wave_index(m, w), at, new != loaded[0]);
    Region *r = is_lds ? NULL : region_of(m, at, 4);
    if (r) memset((u8 *)r->written + (at - r->base), 1, 4);
  }
}
static void perform(Machine *m, Wave *w, Pending *p) { /* the access itself; loaded values stay in p->data2 */
  const Instruction *ins = p->ins;
  p->is_performed = 1;
  if (ins->access == ACCESS_PERMUTE) return;
  if (ins->access == ACCESS_WRITE_BACK) {
    if (m->launch->mode & MODE_CACHES && ins->scope) write_back(&m->caches[w->workgroup]);
    if (ins->scope) race_write_back(&m->races, wave_index(m, w));
    return;
  }
  if (ins->space == SPACE_SCALAR_CACHE) {
    Region *r = region_of(m, p->address[0], ins->bytes);
    if (!r) {
      report(m, w, ins, PROBLEM_OUT_OF_BOUNDS, 0, p->address[0]);
      return;
    }
    if (memchr((u8 *)r->written + (p->address[0] - r->base), 1, ins->bytes))
      report(m, w, ins, PROBLEM_STALE_SCALAR, 0, p->address[0]);
    memcpy(p->data2, (void *)p->address[0], ins->bytes);
    return;
  }
  for (int lane = 0; lane < LANES; lane++) {
    if (!(p->active >> lane & 1)) continue;
    u32 loaded[2 * WORDS] = {0};
    for (int piece = 0; piece < n_pieces(ins); piece++) access_lane(m, w, p, lane, piece, loaded);
    if (ins->access != ACCESS_STORE)
      for (int k = 0; k < WORDS; k++) p->data2[k][lane] = loaded[k];
  }
}

/* ds_read_b64_tr: within 16 lanes, each of which read 64 bits of a row: lane i gets column i of 64 / bits rows. */
static void transpose(u32 (*x)[LANES], int bits) {
  u64 in[LANES], out;
  int n = 64 / bits, lanes_of_row = 16 / n;
  for (int lane = 0; lane < LANES; lane++) in[lane] = pair(x[0][lane], x[1][lane]);
  for (int lane = 0; lane < LANES; lane++) {
    int i = lane % 16, first = lane - i;
    out = 0;
    for (int j = 0; j < n; j++) out |= field(in[first + lanes_of_row * j + i / n], bits * (i % n), bits) << bits * j;
    x[0][lane] = (u32)out;
    x[1][lane] = (u32)(out >> 32);
  }
}
static void deliver(Wave *w, Pending *p) { /* loaded values into registers */
  const Instruction *ins = p->ins;
  int bytes = ins->bytes * n_pieces(ins), words = (bytes + 3) / 4;
  if (ins->space == SPACE_SCALAR_CACHE) {
    memcpy(&w->scalar[ins->dst.value], p->data2, bytes);
    for (int k = 0; k < words; k++) w->scalar_pending[ins->dst.value + k]--;
    return;
  }
  if (ins->dst.kind == KIND_NONE) return;
  u32(*to)[LANES] = (ins->dst.kind == KIND_ACCUMULATOR ? w->accumulator : w->vector) + ins->dst.value;
  if (ins->transposed) transpose(p->data2, ins->transposed);
  for (int k = 0; k < words; k++) {
    for (int lane = 0; lane < LANES; lane++) {
      if (!(p->exec >> lane & 1)) continue;
      u32 x = p->data2[k][lane];
      if (bytes < 4) x = ins->is_signed ? sign_extended(x, 8 * bytes) : x & low_ones(8 * bytes);
      to[k][lane] = ins->half ? into_half(to[k][lane], x, ins->half == 2) : x;
    }
    if (ins->dst.kind == KIND_VECTOR) w->vector_pending[ins->dst.value + k]--;
  }
}
static void finish(Machine *m, Wave *w, Pending *p) {
  if (!p->is_performed) perform(m, w, p);
  deliver(w, p);
}
static void wait_vector(Machine *m, Wave *w, int left) {
  while (w->n_vector > left) {
    finish(m, w, &w->vector_queue[w->first_vector]);
    w->first_vector = (w->first_vector + 1) % VECTOR_QUEUE;
    w->n_vector--;
  }
}
static void wait_lds(Machine *m, Wave *w, int left) { /* scalar loads arrive in any order: only 0 covers them */
  int n_lds = 0, n_kept = 0;
  for (int i = 0; i < w->n_lds; i++) n_lds += w->lds_queue[i].ins->space != SPACE_SCALAR_CACHE;
  for (int i = 0; i < w->n_lds; i++) {
    Pending *p = &w->lds_queue[i];
    int is_scalar = p->ins->space == SPACE_SCALAR_CACHE;
    if (is_scalar ? left == 0 : n_lds > left) {
      finish(m, w, p);
      n_lds -= !is_scalar;
    } else {
      if (n_kept != i) w->lds_queue[n_kept] = *p;
      n_kept++;
    }
  }
  w->n_lds = n_kept;
}
