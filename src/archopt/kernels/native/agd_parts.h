/* AGD's parts in one format, for one instruction set (see every_set.h). */

#include "lanes.h"

enum {
  FN(DOUBLES) = VECTOR_BYTES / sizeof(double),           /* in a vector */
  FN(VECTORS) = 2 * LANES_BYTES / VECTOR_BYTES           /* of partial sums: enough to hide the time of an addition */
};
typedef double FN(Wide) __attribute__((vector_size(VECTOR_BYTES)));
typedef A FN(Narrow) __attribute__((vector_size(VECTOR_BYTES / sizeof(double) * sizeof(A))));

/* The sum of squares of neighbouring entries. */
static double FN(squares)(const T *g, int64_t n) {
  enum { SIDE_BY_SIDE = FN(DOUBLES) * FN(VECTORS) };
  FN(Wide) sums[FN(VECTORS)] = {{0}};
  A room[BLOCK];
  double rest = 0;
  for (int64_t k = 0; k < n; k += BLOCK) {
    int64_t m = smaller(n - k, BLOCK), i = 0;
    const A *x = FN(read)(g + k, room, m);
    for (; i + SIDE_BY_SIDE <= m; i += SIDE_BY_SIDE) {
      UNROLLED
      for (int v = 0; v < FN(VECTORS); v++) {
        FN(Narrow) narrow;
        memcpy(&narrow, x + i + v * FN(DOUBLES), sizeof narrow);
        FN(Wide) wide = __builtin_convertvector(narrow, FN(Wide));
        sums[v] += wide * wide;
      }
    }
    for (; i < m; i++) rest += (double)x[i] * (double)x[i];
  }
  double lanes[SIDE_BY_SIDE];
  memcpy(lanes, sums, sizeof lanes);
  for (int half = SIDE_BY_SIDE / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  }
  return lanes[0] + rest;
}

/* The sums of squares that one unit has of each of its rows. */
static void FN(measure)(const Tensor *t, const Grid *grid, int64_t item, double *sums) {
  const Piece piece = piece_of(t, grid, item);
  const T *g = (const T *)t->grad + piece.at;
  for (int64_t r = 0; r < piece.rows; r++) sums[r] = 0;
  if (!interleaved(t)) {
    for (int64_t s = 0; s < piece.spread; s++) {
      for (int64_t r = 0; r < piece.rows; r++) sums[r] += FN(squares)(g + (s * t->rows + r) * t->run, piece.run);
    }
    return;
  }
  const Walk walk = walk_of(t, &piece);
  double side_by_side[STRIP] = {0};
  A room[STRIP];
  for (int64_t i = 0; i < walk.count; i++) {
    int64_t n = width_at(&walk, i);
    const A *restrict x = FN(read)(g + i * walk.hop, room, n);
    for (int64_t c = 0; c < n; c++) side_by_side[c] += (double)x[c] * (double)x[c];
  }
  for (int64_t c = 0; c < walk.width; c++) sums[c % walk.cells / t->run] += side_by_side[c];
}

/* How a part moves; a factor of 0 lets it rest. */
static Move FN(decide)(Norm norm, double distance) {
  double length = norm.size * norm.scale, factor = distance / length;
  if (distance == 0 || !(norm.size > 0) || !(norm.size <= DBL_MAX)) return (Move){0, 0};
  /* Out of the normal numbers of A it would be infinite or inexact. */
  double most = 0.25 / TINY, least = 4 * TINY;
  int exact = length >= least && length <= DBL_MAX && fabs(factor) >= least && fabs(factor) <= most;
  return (Move){factor, !exact};
}

/* distance * g / ||g||, where distance / ||g|| is no normal number of A. */
static inline A FN(far)(A g, Norm norm, double distance) {
  return (A)(distance * ((double)g / norm.scale / norm.size));
}

/* Adding 0 makes 0 of -0, which leaves a weight of -0 its sign. */
#ifdef FROM
#define MOVED(w, update) TO(FROM(w) - ((update) + 0))
#else
#define MOVED(w, update) ((w) - ((update) + 0))
#endif

static void FN(step_run)(T *restrict w, const T *restrict g, int64_t n, Norm norm, double distance) {
  const Move move = FN(decide)(norm, distance);
  if (move.far) {
    for (int64_t k = 0; k < n; k++) w[k] = MOVED(w[k], FN(far)(FN(one)(g + k), norm, distance));
    return;
  }
  const A factor = (A)move.factor;
  if (factor == 0) return;
  UNROLLED
  for (int64_t k = 0; k < n; k++) w[k] = MOVED(w[k], factor * FN(one)(g + k));
}

static void FN(step)(const Tensor *t, const Grid *grid, int64_t item, const Norm *norms, double distance) {
  const Piece piece = piece_of(t, grid, item);
  T *restrict w = (T *)t->weight + piece.at;
  const T *restrict g = (const T *)t->grad + piece.at;
  norms += piece.part;
  if (!interleaved(t)) {
    for (int64_t s = 0; s < piece.spread; s++) {
      for (int64_t r = 0; r < piece.rows; r++) {
        int64_t at = (s * t->rows + r) * t->run;
        FN(step_run)(w + at, g + at, piece.run, norms[r], distance);
      }
    }
    return;
  }
  const Walk walk = walk_of(t, &piece);
  A factors[STRIP];
  int far = 0, any = 0;
  for (int64_t c = 0; c < walk.width; c++) {
    Move move = FN(decide)(norms[c % walk.cells / t->run], distance);
    factors[c] = (A)move.factor;
    far |= move.far;
    any |= move.factor != 0 || move.far;
  }
  if (!any) return;
  for (int64_t i = 0; i < walk.count; i++) {
    T *restrict to = w + i * walk.hop;
    const T *restrict from = g + i * walk.hop;
    int64_t n = width_at(&walk, i);
    if (!far) {
      for (int64_t c = 0; c < n; c++) to[c] = MOVED(to[c], factors[c] * FN(one)(from + c));
      continue;
    }
    for (int64_t c = 0; c < n; c++) {
      Norm norm = norms[c % walk.cells / t->run];
      Move move = FN(decide)(norm, distance);
      to[c] = MOVED(to[c], move.far ? FN(far)(FN(one)(from + c), norm, distance) : factors[c] * FN(one)(from + c));
    }
  }
}

#undef MOVED
