/* AutoNero's rows and entries in one format, for one instruction set (see every_set.h). */

#include "lanes.h"

/* Vector `part` of the lanes that begin at `from`, and back. */
static inline FN(Vector) FN(load)(const A *from, int part) {
  FN(Vector) x;
  memcpy(&x, from + part * (FN(LANES) / FN(PARTS)), sizeof x);
  return x;
}

static inline void FN(store)(A *to, int part, FN(Vector) x) {
  memcpy(to + part * (FN(LANES) / FN(PARTS)), &x, sizeof x);
}

static inline T FN(rounded)(A value) {
#ifdef FROM
  return TO(value);
#else
  return value;
#endif
}

/* -- the movement, in A or in bfloat16 --------------------------------------------------------------------- */

static inline const A *FN(read_movement)(const Tensor *t, int64_t at, A *restrict room, int64_t n) {
  if (t->movement_format != BFLOAT16) return (const A *)t->movement + at;
  const uint16_t *from = (const uint16_t *)t->movement + at;
  for (int64_t i = 0; i < n; i++) room[i] = from_bfloat16(from[i]);
  return room;
}

/* Where the movement is to be written: in place, or into `room` for `keep_movement`. */
static inline A *FN(movement_at)(const Tensor *t, int64_t at, A *room) {
  return t->movement_format == BFLOAT16 ? room : (A *)t->movement + at;
}

static inline void FN(keep_movement)(const Tensor *t, int64_t at, const A *restrict room, int64_t n) {
  if (t->movement_format != BFLOAT16) return;
  uint16_t *to = (uint16_t *)t->movement + at;
  for (int64_t i = 0; i < n; i++) to[i] = to_bfloat16((float)room[i]);
}

/* -- measure ----------------------------------------------------------------------------------------------- */

static inline void FN(measure_block)(const A *restrict g, const A *restrict d, int64_t n, double sign,
                                     Report *report) {
  FN(Lanes) gg = {0}, gd = {0};
  int64_t i = 0;
  for (; i + FN(LANES) <= n; i += FN(LANES)) {
    UNROLLED
    for (int part = 0; part < FN(PARTS); part++) {
      FN(Vector) a = FN(load)(g + i, part), b = FN(load)(d + i, part);
      gg.part[part] += a * a;
      gd.part[part] += a * b;
    }
  }
  double rest = 0, along = 0;
  for (; i < n; i++) {
    rest += (double)(g[i] * g[i]);
    along += (double)(g[i] * d[i]);
  }
  report->first += FN(across)(&gg) + rest;
  report->second += sign * (FN(across)(&gd) + along);
}

/* ||g||^2 and <g, d> of entries. */
static void FN(measure)(const Tensor *t, const Options *o, const Scalars *unused, int64_t begin, int64_t end,
                        Report *report) {
  (void)unused;
  A g_room[BLOCK], d_room[BLOCK];
  for (int64_t at = begin; at < end; at += BLOCK) {
    int64_t n = end - at < BLOCK ? end - at : BLOCK;
    const A *g = FN(read)((const T *)t->grad + at, g_room, n);
    FN(measure_block)(g, FN(read_movement)(t, at, d_room, n), n, o->sign, report);
  }
}

/* -- averages ---------------------------------------------------------------------------------------------- */

/* m <- beta m + (1 - beta) g with g multiplied by `factor`; returns the sum of the squares of those. */
static inline double FN(average_block)(A *restrict m, const A *restrict g, int64_t n, A factor, A beta, A rate) {
  FN(Lanes) sum = {0};
  int64_t i = 0;
  for (; i + FN(LANES) <= n; i += FN(LANES)) {
    UNROLLED
    for (int part = 0; part < FN(PARTS); part++) {
      FN(Vector) a = FN(load)(g + i, part) * factor;
      FN(store)(m + i, part, FN(load)(m + i, part) * beta + a * rate);
      sum.part[part] += a * a;
    }
  }
  double rest = 0;
  for (; i < n; i++) {
    A a = g[i] * factor;
    m[i] = m[i] * beta + a * rate;
    rest += (double)(a * a);
  }
  return FN(across)(&sum) + rest;
}

/* m and v of a row; returns s^2. */
static inline double FN(average_row)(const Tensor *t, const Options *o, const Pace *pace, int64_t row) {
  const T *g = (const T *)t->grad + row * t->fan_in;
  A *m = (A *)t->exp_avg + row * t->fan_in, *v = (A *)t->exp_avg_sq + row;
  A room[BLOCK];
  double square = 0;
  for (int64_t k = 0; k < t->fan_in; k += BLOCK) {
    int64_t n = t->fan_in - k < BLOCK ? t->fan_in - k : BLOCK;
    const A *from = FN(read)(g + k, room, n);
    square += FN(average_block)(m + k, from, n, (A)pace->factor, (A)o->beta, (A)(1 - o->beta));
  }
  *v = (A)(o->beta2 * (double)*v + (1 - o->beta2) * square);
  return (double)*v / pace->correction;
}

/* Rows of hidden matrices: m and v. */
static void FN(average)(const Tensor *t, const Options *o, const Scalars *s, int64_t begin, int64_t end,
                        Report *report) {
  (void)report;
  if (!s->live) return;
  const Pace pace = pace_of(t, o, s);
  for (int64_t row = begin; row < end; row++) FN(average_row)(t, o, &pace, row);
}

/* -- the move of a row ------------------------------------------------------------------------------------- */

/* Adds the sums of up to BLOCK entries. Memory from the address `ahead` on, if any, is asked for on the way. */
static inline void FN(sum_block)(const A *restrict w, const A *restrict u, const A *restrict m, int64_t n,
                                 uintptr_t ahead, Sums *sums) {
  FN(Lanes) ww = {0}, wu = {0}, uu = {0}, mw = {0};
  int64_t i = 0;
  for (; i + FN(LANES) <= n; i += FN(LANES)) {
    if (ahead) PREFETCH(ahead + i * sizeof(T));
    UNROLLED
    for (int part = 0; part < FN(PARTS); part++) {
      FN(Vector) a = FN(load)(w + i, part), b = FN(load)(u + i, part);
      ww.part[part] += a * a;
      wu.part[part] += a * b;
      uu.part[part] += b * b;
      mw.part[part] += FN(load)(m + i, part) * a;
    }
  }
  Sums rest = {0, 0, 0, 0};
  for (; i < n; i++) {
    rest.ww += (double)(w[i] * w[i]);
    rest.wu += (double)(w[i] * u[i]);
    rest.uu += (double)(u[i] * u[i]);
    rest.mw += (double)(m[i] * w[i]);
  }
  sums->ww += FN(across)(&ww) + rest.ww;
  sums->wu += FN(across)(&wu) + rest.wu;
  sums->uu += FN(across)(&uu) + rest.uu;
  sums->mw += FN(across)(&mw) + rest.mw;
}

/* The sum of (w - stride u)^2 where the four sums cannot tell it. */
static double FN(look_again)(const T *w, const A *u, int64_t fan_in, A stride) {
  double square = 0;
  for (int64_t i = 0; i < fan_in; i++) {
    double x = (double)(FN(one)(w + i) - u[i] * stride);
    square += x * x;
  }
  return square;
}

/* to: scale (w - stride u), which may be w itself; d: (w - that) / theta; returns <m, d>. The entries of u and m that
   lie `ahead` further on, if any, are asked for. */
static inline double FN(move_block)(A *to, A *restrict d, const A *w, const A *restrict u, const A *restrict m,
                                    int64_t n, int64_t ahead, A stride, A scale, A per_theta) {
  FN(Lanes) sum = {0};
  int64_t i = 0;
  for (; i + FN(LANES) <= n; i += FN(LANES)) {
    if (ahead) {
      PREFETCH(BEYOND(u + i, ahead));
      PREFETCH(BEYOND(m + i, ahead));
    }
    UNROLLED
    for (int part = 0; part < FN(PARTS); part++) {
      FN(Vector) before = FN(load)(w + i, part);
      FN(Vector) after = (before - FN(load)(u + i, part) * stride) * scale;
      FN(Vector) made = (before - after) * per_theta;
      sum.part[part] += FN(load)(m + i, part) * made;
      FN(store)(to + i, part, after);
      FN(store)(d + i, part, made);
    }
  }
  double rest = 0;
  for (; i < n; i++) {
    A before = w[i], after = (before - u[i] * stride) * scale;
    d[i] = (before - after) * per_theta;
    to[i] = after;
    rest += (double)(m[i] * d[i]);
  }
  return FN(across)(&sum) + rest;
}

/* How a row that has `square` = s^2 moves along u, which is m itself where there is no polar factor; its radius. */
static Move FN(decide)(const Tensor *t, const Options *o, const Pace *pace, double square, int64_t row, int64_t ahead,
                       const T *restrict w, const A *m, const A *u) {
  A *R = (A *)t->radius + row, *grows_to = (A *)t->grows_to + row;
  A room[BLOCK];
  Move move = {0, 0, 1};
  Sums sums = {0, 0, 0, 0};
  for (int64_t k = 0; k < t->fan_in; k += BLOCK) {
    int64_t n = t->fan_in - k < BLOCK ? t->fan_in - k : BLOCK;
    FN(sum_block)(FN(read)(w + k, room, n), u + k, m + k, n, ahead ? BEYOND(w + k, ahead) : 0, &sums);
  }
  int polar = u != m;
  double s = sqrt(square), length = polar ? sqrt(sums.uu) : s;
  if (!((A)length > 0 && (A)s > 0 && pace->angle != 0)) return move;

  int young = *grows_to > 0, plain = young || t->kind == PLAIN;
  double radius = (double)*R, reach = radius;
  if (young) reach = o->young ? o->young : sqrt((double)t->fan_in);
  if (t->kind == PLAIN) reach = *t->reach;
  move.stride = pace->angle * reach / length * (polar ? 1 : pace->inverse);

  double a = move.stride, terms = sums.ww + a * (a * sums.uu), after = terms - 2 * a * sums.wu;
  if (!(after > CANCELLATION * terms) || sums.uu < TINY / EPSILON) after = FN(look_again)(w, u, t->fan_in, (A)a);
  double norm = sqrt(after);
  move.moves = (A)norm > 0;
  if (!move.moves) return move;
  if (plain) {
    *R = (A)norm;
  } else {
    double scaled = radius * s;
    double outward = sums.mw * pace->inverse / (scaled == 0 ? 1 : scaled);
    *R = (A)(o->exponent == 0 ? radius : radius * exp(-o->exponent * pace->angle * outward));
    move.scale = (double)*R / norm;
  }
  if (young && *R >= *grows_to) *grows_to = 0;
  return move;
}

/* Entries from a row to the next one, where that is to be fetched while this one is worked on, else 0. */
static inline int64_t FN(ahead_of)(const Tensor *t) {
  return 6 * t->fan_in * (int64_t)sizeof(A) <= AHEAD_BYTES ? t->fan_in : 0;
}

/* The step of a row; returns <m, d>. */
static inline double FN(step_row)(const Tensor *t, const Options *o, const Pace *pace, double square, int64_t row,
                                  const A *u) {
  const int64_t first = row * t->fan_in;
  const A *m = (const A *)t->exp_avg + first;
  T *w = (T *)t->weight + first;
  const int64_t ahead = FN(ahead_of)(t);
  const Move move = FN(decide)(t, o, pace, square, row, ahead, w, m, u);
  A d_room[BLOCK];
#ifdef FROM
  A w_room[BLOCK];
#endif
  double along = 0;
  for (int64_t k = 0; k < t->fan_in; k += BLOCK) {
    int64_t n = t->fan_in - k < BLOCK ? t->fan_in - k : BLOCK;
    A *d = FN(movement_at)(t, first + k, d_room);
    if (!move.moves) {
      memset(d, 0, (size_t)n * sizeof *d);
    } else {
#ifdef FROM
      FN(read)(w + k, w_room, n);
      A *to = w_room;
#else
      A *to = w + k;
#endif
      along += FN(move_block)(to, d, to, u + k, m + k, n, ahead, (A)move.stride, (A)move.scale, (A)pace->per_theta);
#ifdef FROM
      for (int64_t i = 0; i < n; i++) w[k + i] = TO(w_room[i]);
#endif
    }
    FN(keep_movement)(t, first + k, d, n);
  }
  return along * pace->inverse;
}

/* Rows that need no polar factor: the whole step. */
static void FN(step_rows)(const Tensor *t, const Options *o, const Scalars *s, int64_t begin, int64_t end,
                          Report *report) {
  if (!s->live) return;
  const Pace pace = pace_of(t, o, s);
  for (int64_t row = begin; row < end; row++) {
    double square = FN(average_row)(t, o, &pace, row);
    report->first += FN(step_row)(t, o, &pace, square, row, (const A *)t->exp_avg + row * t->fan_in);
  }
}

/* Rows of hidden matrices that have m, v and a direction. */
static void FN(turn)(const Tensor *t, const Options *o, const Scalars *s, int64_t begin, int64_t end,
                     Report *report) {
  if (!s->live) return;
  const Pace pace = pace_of(t, o, s);
  for (int64_t row = begin; row < end; row++) {
    double square = (double)((const A *)t->exp_avg_sq)[row] / pace.correction;
    report->first += FN(step_row)(t, o, &pace, square, row, (const A *)t->direction + row * t->fan_in);
  }
}

/* Vectors, entry by entry: the whole step. */
static void FN(step_entries)(const Tensor *t, const Options *o, const Scalars *scalars, int64_t begin, int64_t end,
                             Report *report) {
  if (!scalars->live) return;
  const Pace pace = pace_of(t, o, scalars);
  const A factor = (A)pace.factor, per_theta = (A)pace.per_theta;
  const A beta = (A)o->beta, rate = (A)(1 - o->beta), beta2 = (A)o->beta2, rate2 = (A)(1 - o->beta2);
  const A stride = (A)(pace.angle * pace.inverse * sqrt(pace.correction));
  A g_room[BLOCK], w_room[BLOCK], d_room[BLOCK], after[BLOCK], along[BLOCK];
  double total = 0;
  for (int64_t at = begin; at < end; at += BLOCK) {
    int64_t n = end - at < BLOCK ? end - at : BLOCK;
    const A *restrict g = FN(read)((const T *)t->grad + at, g_room, n);
    A *restrict m = (A *)t->exp_avg + at, *restrict v = (A *)t->exp_avg_sq + at;
    A *restrict d = FN(movement_at)(t, at, d_room);
    T *w = (T *)t->weight + at;
    const A *before = FN(read)(w, w_room, n);
    for (int64_t i = 0; i < n; i++) {
      A a = g[i] * factor;
      m[i] = m[i] * beta + a * rate;
      v[i] = v[i] * beta2 + a * a * rate2;
      A root = (A)sqrt((double)v[i]);
      A move = stride != 0 && root > 0 ? stride * m[i] / root : 0;
      after[i] = before[i] - move;
      d[i] = (before[i] - after[i]) * per_theta;
      along[i] = m[i] * d[i];
    }
    for (int64_t i = 0; i < n; i++) w[i] = FN(rounded)(after[i]);
    for (int64_t i = 0; i < n; i++) total += (double)along[i];
    FN(keep_movement)(t, at, d, n);
  }
  report->first += total * pace.inverse;
}
