/* AGD's parts in one format, for one instruction set (see every_set.h). */

#include "lanes.h"

enum { FN(SQUARES) = 2 * FN(LANES), FN(VECTORS) = 2 * FN(PARTS) }; /* enough to hide the time of an addition */

/* The sum of squares of a block, in double precision. */
static double FN(squares_again)(const A *x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  return sum;
}

/* The sum of squares of up to BLOCK entries; memory `ahead` is asked for on the way. Each lane adds up no more than 32 of them (64 of float64). */
static double FN(squares_of_block)(const A *x, int64_t n, uintptr_t ahead) {
  FN(Vector) sums[FN(VECTORS)] = {{0}};
  int64_t i = 0;
  for (; i + FN(SQUARES) <= n; i += FN(SQUARES)) {
    for (int line = 0; line < FN(SQUARES) * (int)sizeof(T); line += LINE) PREFETCH(ahead + i * sizeof(T) + line);
    UNROLLED
    for (int v = 0; v < FN(VECTORS); v++) {
      FN(Vector) entries;
      memcpy(&entries, x + i + v * (FN(SQUARES) / FN(VECTORS)), sizeof entries);
      sums[v] += entries * entries;
    }
  }
  A lanes[FN(SQUARES)];
  memcpy(lanes, sums, sizeof lanes);
  for (int half = FN(SQUARES) / 2; half; half /= 2) {
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  }
  double sum = lanes[0] + FN(squares_again)(x + i, n - i);
  return sum >= LEAST_SQUARE && sum <= MOST_SQUARE ? sum : FN(squares_again)(x, n);
}

static double FN(squares)(const T *g, int64_t n) {
  A room[BLOCK];
  double sum = 0;
  for (int64_t k = 0; k < n; k += BLOCK) {
    int64_t m = smaller(n - k, BLOCK);
    sum += FN(squares_of_block)(FN(read)(g + k, room, m), m, (uintptr_t)(g + k) + AHEAD);
  }
  return sum;
}

/* Adds the squares of interleaved entries, over up to STEPS steps of a walk, to sums side by side. */
static void FN(squares_side_by_side)(const T *g, const Walk *walk, int64_t begin, int64_t end, double *sums) {
  A squares[STRIP] = {0}, room[STRIP];
  for (int64_t i = begin; i < end; i++) {
    int64_t n = width_at(walk, i);
    const A *restrict x = FN(read)(g + i * walk->hop, room, n);
    const uintptr_t ahead = (uintptr_t)(g + i * walk->hop) + AHEAD;
    for (int64_t line = 0; line < n * (int64_t)sizeof(T); line += LINE) PREFETCH(ahead + line);
    for (int64_t c = 0; c < n; c++) squares[c] += x[c] * x[c];
  }
  int sound = 1;
  for (int64_t c = 0; c < walk->width; c++) sound &= squares[c] >= (A)LEAST_SQUARE && squares[c] <= (A)MOST_SQUARE;
  if (sound) {
    for (int64_t c = 0; c < walk->width; c++) sums[c] += (double)squares[c];
    return;
  }
  for (int64_t i = begin; i < end; i++) {
    int64_t n = width_at(walk, i);
    const A *restrict x = FN(read)(g + i * walk->hop, room, n);
    for (int64_t c = 0; c < n; c++) sums[c] += (double)x[c] * (double)x[c];
  }
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
  for (int64_t i = 0; i < walk.count; i += STEPS) {
    FN(squares_side_by_side)(g, &walk, i, smaller(i + STEPS, walk.count), side_by_side);
  }
  for (int64_t c = 0; c < walk.width;) {
    for (int64_t r = 0; r < piece.rows; r++) {
      for (int64_t k = 0; k < t->run; k++) sums[r] += side_by_side[c++];
    }
  }
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
  for (int64_t r = 0; r < piece.rows; r++) {
    Move move = FN(decide)(norms[r], distance);
    for (int64_t k = 0; k < t->run; k++) factors[r * t->run + k] = (A)move.factor;
    far |= move.far;
    any |= move.factor != 0 || move.far;
  }
  if (!any) return;
  for (int64_t c = walk.cells; c < walk.width; c++) factors[c] = factors[c - walk.cells];
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
