/* Wait states between instructions of a wave: whether it leaves those that hazards.py demands.
 *
 * What is found depends on the way to an instruction alone, so that each way is looked at once: the one without a jump,
 * and the last one with a single jump in the window.
 */
static int overlap(const Used *x, const Used *y) {
  return x->first < y->first + y->words && y->first < x->first + x->words;
}
static int is_summand(int use) { return use >= USE_XDL_4_READS_SUMMAND; }
static int wait_states_needed(const Instruction *first, const Instruction *second) {
  int needed = 0;
  for (int i = 0; i < first->n_uses; i++)
    for (int j = 0; j < second->n_uses; j++) {
      const Used *x = &first->uses[i], *y = &second->uses[j];
      int n = WAIT_STATES[x->use][y->use], is_same = x->first == y->first && x->words == y->words;
      int is_chained = is_summand(y->use) && x->use >= USE_XDL_4_WRITES && is_same;
      if (n > needed && overlap(x, y) && !is_chained) needed = n;
    }
  return needed;
}
static int is_checked(Machine *m, const Wave *w, const Instruction *ins) { /* return whether it was, this way */
  if (w->time - w->jumps[1] <= LONGEST_HAZARD) return 0;
  int has_jump = w->time - w->jumps[0] <= LONGEST_HAZARD, way = 1 + (has_jump ? w->jumped_from : 0);
  int *checked = &m->checked[2 * ins->number + has_jump], was = *checked == way;
  *checked = way;
  return was;
}
static void check_hazards(Machine *m, Wave *w, const Instruction *ins) {
  if (!is_checked(m, w, ins))
    for (int k = 1; k <= RECENT; k++) {
      const Issued *earlier = &w->recent[(w->n_issued - k) % RECENT];
      int left = (int)(w->time - earlier->time) - 1;
      if (!earlier->ins || left >= LONGEST_HAZARD) break;
      int needed = wait_states_needed(earlier->ins, ins);
      if (left < needed) report(m, w, ins, PROBLEM_HAZARD, earlier->ins->number, needed << 8 | left);
    }
  w->recent[w->n_issued++ % RECENT] = (Issued){ins, w->time};
  w->time += ins->wait_states;
}
static void record_jump(Wave *w, const Instruction *ins) {
  w->jumps[1] = w->jumps[0];
  w->jumps[0] = w->time - 1;
  w->jumped_from = ins->number;
}
