/* Races in memory between workgroups, found by what must happen before what, whatever the order of waves was.
 *
 * Each wave has a clock, a count for each wave: what of the others' work happened before. A wave's own count grows at
 * each barrier and each write-back. Clocks are passed on
 *
 *     at s_barrier          between the waves of a workgroup
 *     by buffer_wbl2 sc1    to atomics of this wave behind the wait for it: what it had seen when that was issued
 *     by an atomic          that changes a word, to whoever accesses it by an atomic, or loads it past all caches
 *     by buffer_inv sc1     from these to the wave: only now are they of use
 *
 * A store counts when it is performed, so that one still in flight at a barrier or a write-back comes after it.
 */
enum { GRANULE = 16, MAX_CLOCK_WAVES = 64 }; /* bytes whose last reads are kept together */

typedef u32 Clock[MAX_CLOCK_WAVES];
typedef struct { u8 *writer, *value; u32 *written, (*read)[MAX_CLOCK_WAVES]; } Shadow; /* of a region: the last accesses' counts */
typedef struct { u64 address; Clock clock; } Sync;                           /* a word of atomics */
typedef struct {
  int n_waves;
  Shadow *shadows; /* of each region */
  Clock *now, *issued, *released, *offered; /* issued: when the last write-back was */
  Sync *syncs;
  int n_syncs;
} Races;
enum { MAX_SYNCS = 4096 };

static void join(u32 *to, const u32 *from, int n) {
  for (int i = 0; i < n; i++)
    if (from[i] > to[i]) to[i] = from[i];
}
static void start_races(Races *r, const Launch *launch, const Region *regions) {
  int n = launch->n_workgroups * launch->waves_per_workgroup;
  if (!(launch->mode & MODE_CHECK_RACES) || n > MAX_CLOCK_WAVES) return;
  *r = (Races){n, calloc(launch->n_regions, sizeof(Shadow)), calloc(n, sizeof(Clock)), calloc(n, sizeof(Clock)),
               calloc(n, sizeof(Clock)), calloc(n, sizeof(Clock)), calloc(MAX_SYNCS, sizeof(Sync)), 0};
  for (int i = 0; i < n; i++) r->now[i][i] = 1;
  for (int i = 0; i < launch->n_regions; i++) {
    u64 size = regions[i].size + 1;
    if (regions[i].is_writable)
      r->shadows[i] = (Shadow){calloc(size, 1), calloc(size, 1), calloc(size, 4), calloc(size / GRANULE + 2, sizeof(Clock))};
  }
}
static void end_races(Races *r, const Launch *launch) {
  for (int i = 0; r->n_waves && i < launch->n_regions; i++)
    free(r->shadows[i].writer), free(r->shadows[i].value), free(r->shadows[i].written), free(r->shadows[i].read);
  free(r->shadows), free(r->now), free(r->issued), free(r->released), free(r->offered), free(r->syncs);
}

/* Record an access by wave number `wave` of all. Return a wave whose access it races with, or -1.
 *
 * stored: the bytes of a store, NULL of a load. Several waves may store the same value in any order.
 */
static int record_access(Races *r, const Region *region, int index, int wave, u64 at, int n, const u8 *stored) {
  Shadow *s = &r->shadows[index];
  if (!r->n_waves || !s->writer) return -1;
  const u32 *now = r->now[wave];
  int other = -1;
  for (u64 k = at - region->base, end = k + n; k < end; k++) {
    int is_same = stored && s->value[k] == stored[k - (at - region->base)];
    if (s->written[k] > now[s->writer[k]] && !is_same) other = s->writer[k];
    if (!stored) {
      s->read[k / GRANULE][wave] = now[wave];
      continue;
    }
    for (int i = 0; i < r->n_waves; i++)
      if (i != wave && s->read[k / GRANULE][i] > now[i]) other = i;
    s->value[k] = stored[k - (at - region->base)];
    s->writer[k] = wave;
    s->written[k] = now[wave];
  }
  return other;
}
static u32 *sync_of(Races *r, u64 address) {
  for (int i = 0; i < r->n_syncs; i++)
    if (r->syncs[i].address == address) return r->syncs[i].clock;
  if (r->n_syncs == MAX_SYNCS) return NULL;
  r->syncs[r->n_syncs].address = address;
  return r->syncs[r->n_syncs++].clock;
}
static void synchronize(Races *r, int wave, u64 address, int passes_on) {
  u32 *clock = r->n_waves ? sync_of(r, address) : NULL;
  if (!clock) return;
  join(r->offered[wave], clock, r->n_waves);
  if (passes_on) join(clock, r->released[wave], r->n_waves);
}
static void race_issue_write_back(Races *r, int wave) {
  if (!r->n_waves) return;
  memcpy(r->issued[wave], r->now[wave], sizeof(Clock));
  r->now[wave][wave]++;
}
static void race_write_back(Races *r, int wave) {
  if (r->n_waves) memcpy(r->released[wave], r->issued[wave], sizeof(Clock));
}
static void race_invalidate(Races *r, int wave) {
  if (r->n_waves) join(r->now[wave], r->offered[wave], r->n_waves);
}
static void race_barrier(Races *r, int first, int n) { /* of waves first to first + n - 1 */
  Clock all = {0};
  if (!r->n_waves) return;
  for (int i = first; i < first + n; i++) join(all, r->now[i], r->n_waves);
  for (int i = first; i < first + n; i++) {
    memcpy(r->now[i], all, sizeof all);
    r->now[i][i]++;
  }
}
