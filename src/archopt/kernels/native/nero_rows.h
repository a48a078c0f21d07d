/* Nero's neurons in one format, for one instruction set (see every_set.h). */

#include "lanes.h"

/* Adds the sums of up to BLOCK entries to sums in double precision: each lane adds up no more than 64 of them
   (128 of float64), so that float32 loses hardly more than its last digit. `ahead`, if any, is memory that will be
   read next: it is asked for on the way. */
static inline void FN(add_block)(const A *restrict w, const A *restrict g, int64_t n, uintptr_t ahead, Sums *sums) {
  FN(Lanes) sw = {0}, sww = {0}, sg = {0}, sgg = {0}, swg = {0};
  int64_t i = 0;
  for (; i + FN(LANES) <= n; i += FN(LANES)) {
    if (ahead) PREFETCH(ahead + i * sizeof(T));
    UNROLLED
    for (int part = 0; part < FN(PARTS); part++) {
      FN(Vector) a, b;
      memcpy(&a, w + i + part * (FN(LANES) / FN(PARTS)), sizeof a);
      memcpy(&b, g + i + part * (FN(LANES) / FN(PARTS)), sizeof b);
      sw.part[part] += a;
      sww.part[part] += a * a;
      sg.part[part] += b;
      sgg.part[part] += b * b;
      swg.part[part] += a * b;
    }
  }
  Sums rest = {0, 0, 0, 0, 0};
  for (; i < n; i++) {
    double a = w[i], b = g[i];
    rest.w += a;
    rest.ww += a * a;
    rest.g += b;
    rest.gg += b * b;
    rest.wg += a * b;
  }
  sums->w += FN(across)(&sw) + rest.w;
  sums->ww += FN(across)(&sww) + rest.ww;
  sums->g += FN(across)(&sg) + rest.g;
  sums->gg += FN(across)(&sgg) + rest.gg;
  sums->wg += FN(across)(&swg) + rest.wg;
}

/* The sums of a neuron. The weights that lie `ahead` entries further on, if any, are asked for on the way. */
static Sums FN(sum_row)(const T *w, const T *g, int64_t spread, int64_t stride, int64_t run, int64_t ahead) {
  Sums sums = {0, 0, 0, 0, 0};
  A w_room[BLOCK], g_room[BLOCK];
  for (int64_t s = 0; s < spread; s++) {
    for (int64_t k = 0; k < run; k += BLOCK) {
      int64_t n = run - k < BLOCK ? run - k : BLOCK, at = s * stride + k;
      const uintptr_t next = ahead ? BEYOND(w + at, ahead) : 0;
      FN(add_block)(FN(read)(w + at, w_room, n), FN(read)(g + at, g_room, n), n, next, &sums);
    }
  }
  return sums;
}

/* Moves a neuron; rounds at random where it has a key. The gradients that lie `ahead` entries further on, if any, are asked for on the way. */
static void FN(move_row)(T *restrict w, const T *restrict g, int64_t spread, int64_t stride, int64_t run,
                         int64_t ahead, Move move, const uint32_t *key) {
  const A pace = (A)move.stride, mean = (A)move.mean, inverse = (A)move.inverse;
  (void)key; /* of bfloat16 alone */
  for (int64_t s = 0; s < spread; s++) {
    T *restrict to = w + s * stride;
    const T *restrict from = g + s * stride;
#ifdef FROM
    A w_room[BLOCK], g_room[BLOCK];
#endif
    for (int64_t k = 0; k < run; k += BLOCK) {
      int64_t n = run - k < BLOCK ? run - k : BLOCK;
      if (ahead) {
        for (int64_t i = 0; i < n; i += LANES_BYTES / sizeof(T)) PREFETCH(BEYOND(from + k + i, ahead));
      }
#ifdef FROM
      FN(read)(to + k, w_room, n);
      FN(read)(from + k, g_room, n);
#ifdef TO_AT_RANDOM
      if (key) {
        const uint32_t first = *key + (uint32_t)(s * run + k) * WEYL;
        for (int64_t i = 0; i < n; i++)
          to[k + i] = TO_AT_RANDOM(((w_room[i] - pace * g_room[i]) - mean) * inverse, first + (uint32_t)i * WEYL);
        continue;
      }
#endif
      for (int64_t i = 0; i < n; i++) to[k + i] = TO(((w_room[i] - pace * g_room[i]) - mean) * inverse);
#else
      UNROLLED
      for (int64_t i = 0; i < n; i++) to[k + i] = ((to[k + i] - pace * from[k + i]) - mean) * inverse;
#endif
    }
  }
}

/* v of a neuron that has `square` = ||g||^2, and its stride; the square of a skipped neuron is not finite. */
static inline Move FN(decide)(const Options *o, Pace pace, double square, A *v, Report *report) {
  Move move = {0, 0, 0, 0, 1};
  if (!isfinite((A)square)) { /* too large for A counts as infinite */
    report->skipped++;
    return move;
  }
  *v = (A)(o->beta * (double)*v + (1 - o->beta) * square);
  double rms = sqrt((double)*v / pace.correction);
  move.moves = (A)square > 0 && rms > 0 && o->lr != 0;
  if (!move.moves) return move;
  double stride = pace.pace / rms;
  report->turn += stride * sqrt(square);
  move.stride = (A)(o->maximize ? -stride : stride); /* as it will be applied */
  return move;
}

static inline Pace FN(pace_of)(const Tensor *t, const Options *o) {
  return (Pace){o->lr * (double)*(const A *)t->scale, 1 - pow(o->beta, (double)*t->step)};
}

/* Mean and norm after the step, from the five sums. */
static inline void FN(foresee)(const Options *o, const Sums *sums, double fan_in, Move *move) {
  double t = move->stride;
  if (o->zero_mean) move->mean = (sums->w - t * sums->g) / fan_in;
  if (!o->unit_norm) return;
  double terms = sums->ww + t * (t * sums->gg);
  double square = (terms - 2 * t * sums->wg) - fan_in * move->mean * move->mean;
  move->recheck = !(square > CANCELLATION * terms);
  move->inverse = 1 / length_of(square, move->mean, fan_in, EPSILON, TINY);
}

/* The same from the moved row itself, rounded as it will be written: two more passes over it. */
static void FN(look_again)(const Options *o, const T *w, const T *g, int64_t spread, int64_t stride, int64_t run,
                           Move *move) {
  const A pace = (A)move->stride;
  double fan_in = (double)(spread * run), total = 0, square = 0;
  for (int64_t s = 0; s < spread; s++) {
    double part = 0;
    for (int64_t k = 0; k < run; k++) {
      int64_t at = s * stride + k;
      part += (double)(A)(FN(one)(w + at) - pace * FN(one)(g + at));
    }
    total += part;
  }
  A mean = o->zero_mean ? (A)(total / fan_in) : 0;
  for (int64_t s = 0; s < spread; s++) {
    double part = 0;
    for (int64_t k = 0; k < run; k++) {
      int64_t at = s * stride + k;
      A moved = (FN(one)(w + at) - pace * FN(one)(g + at)) - mean;
      part += (double)moved * (double)moved;
    }
    square += part;
  }
  move->mean = mean;
  move->inverse = 1 / length_of(square, mean, fan_in, EPSILON, TINY);
}

/* Neurons that own long runs: one at a time. */
static void FN(rows)(const Tensor *t, const Options *o, int64_t begin, int64_t end, Report *report) {
  const int64_t stride = t->rows * t->run;
  const Pace pace = FN(pace_of)(t, o);
  const int64_t fan_in = t->spread * t->run;
  const int64_t ahead = t->spread == 1 && 2 * fan_in * (int64_t)sizeof(T) <= AHEAD_BYTES ? fan_in : 0;
  A *v = t->exp_avg_sq;
  for (int64_t row = begin; row < end; row++) {
    int64_t at = (row / t->rows) * t->spread * stride + (row % t->rows) * t->run;
    T *w = (T *)t->weight + at;
    const T *g = (const T *)t->grad + at;
    Sums sums = FN(sum_row)(w, g, t->spread, stride, t->run, ahead);
    Move move = FN(decide)(o, pace, sums.gg, v + row, report);
    if (!move.moves) continue;
    FN(foresee)(o, &sums, (double)fan_in, &move);
    if (move.recheck) FN(look_again)(o, w, g, t->spread, stride, t->run, &move);
    const uint32_t key = key_of(t->number, (int64_t)*t->step, row);
    FN(move_row)(w, g, t->spread, stride, t->run, ahead, move, o->at_random ? &key : NULL);
  }
}

/* Neurons whose entries are interleaved, in short runs: as many neighbours as make a strip, side by side. */
static void FN(strips)(const Tensor *t, const Options *o, int64_t begin, int64_t end, Report *report) {
  const int64_t stride = t->rows * t->run, width = strip_rows(t), strips = ceiling(t->rows, width);
  const Pace pace = FN(pace_of)(t, o);
  for (int64_t strip = begin; strip < end; strip++) {
    int64_t batch = strip / strips, first = (strip % strips) * width;
    int64_t rows = t->rows - first < width ? t->rows - first : width, cells = rows * t->run;
    T *restrict w = (T *)t->weight + batch * t->spread * stride + first * t->run;
    const T *restrict g = (const T *)t->grad + (w - (T *)t->weight);
    A *v = (A *)t->exp_avg_sq + batch * t->rows + first;

    double sw[STRIP] = {0}, sww[STRIP] = {0}, sg[STRIP] = {0}, sgg[STRIP] = {0}, swg[STRIP] = {0};
    A w_room[STRIP], g_room[STRIP];
    for (int64_t s = 0; s < t->spread; s++) {
      const A *restrict a = FN(read)(w + s * stride, w_room, cells);
      const A *restrict b = FN(read)(g + s * stride, g_room, cells);
      for (int64_t c = 0; c < cells; c++) {
        double x = a[c], y = b[c];
        sw[c] += x;
        sww[c] += x * x;
        sg[c] += y;
        sgg[c] += y * y;
        swg[c] += x * y;
      }
    }

    A paces[STRIP], means[STRIP], inverses[STRIP];
    WHOLE moves[STRIP];
#ifdef TO_AT_RANDOM
    uint32_t keys[STRIP];
    for (int64_t r = 0; o->at_random && r < rows; r++) {
      uint32_t key = key_of(t->number, (int64_t)*t->step, batch * t->rows + first + r);
      for (int64_t k = 0; k < t->run; k++) keys[r * t->run + k] = key + (uint32_t)k * WEYL;
    }
#endif
    int any = 0;
    for (int64_t r = 0; r < rows; r++) {
      Sums sums = {0, 0, 0, 0, 0};
      for (int64_t c = r * t->run; c < (r + 1) * t->run; c++) {
        sums.w += sw[c];
        sums.ww += sww[c];
        sums.g += sg[c];
        sums.gg += sgg[c];
        sums.wg += swg[c];
      }
      Move move = FN(decide)(o, pace, sums.gg, v + r, report);
      if (move.moves) FN(foresee)(o, &sums, (double)(t->spread * t->run), &move);
      if (move.recheck) FN(look_again)(o, w + r * t->run, g + r * t->run, t->spread, stride, t->run, &move);
      any |= move.moves;
      for (int64_t c = r * t->run; c < (r + 1) * t->run; c++) {
        paces[c] = (A)move.stride;
        means[c] = (A)move.mean;
        inverses[c] = (A)move.inverse;
        moves[c] = move.moves;
      }
    }
    if (!any) continue;
    for (int64_t s = 0; s < t->spread; s++) {
      T *restrict to = w + s * stride;
      const A *restrict b = FN(read)(g + s * stride, g_room, cells);
#ifdef FROM
      FN(read)(to, w_room, cells);
#ifdef TO_AT_RANDOM
      if (o->at_random) {
        const uint32_t here = (uint32_t)(s * t->run) * WEYL;
        for (int64_t c = 0; c < cells; c++) {
          T moved = TO_AT_RANDOM(((w_room[c] - paces[c] * b[c]) - means[c]) * inverses[c], keys[c] + here);
          to[c] = moves[c] ? moved : to[c];
        }
        continue;
      }
#endif
      for (int64_t c = 0; c < cells; c++) {
        T moved = TO(((w_room[c] - paces[c] * b[c]) - means[c]) * inverses[c]);
        to[c] = moves[c] ? moved : to[c];
      }
#else
      for (int64_t c = 0; c < cells; c++) {
        T moved = ((to[c] - paces[c] * b[c]) - means[c]) * inverses[c];
        to[c] = moves[c] ? moved : to[c];
      }
#endif
    }
  }
}

/* Neurons of one entry each: biases, gains and the like. */
static void FN(entries)(const Tensor *t, const Options *o, int64_t begin, int64_t end, Report *report) {
  const Pace pace = FN(pace_of)(t, o);
  A *v = t->exp_avg_sq;
  for (int64_t i = begin; i < end; i++) {
    T *w = (T *)t->weight + i;
    A g = FN(one)((const T *)t->grad + i);
    Move move = FN(decide)(o, pace, (double)g * (double)g, v + i, report);
    if (!move.moves) continue;
    A moved = FN(one)(w) - (A)move.stride * g;
#ifdef TO_AT_RANDOM
    *w = o->at_random ? TO_AT_RANDOM(moved, key_of(t->number, (int64_t)*t->step, i)) : TO(moved);
#elif defined(FROM)
    *w = TO(moved);
#else
    *w = moved;
#endif
  }
}
