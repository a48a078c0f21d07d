/* AGD's step for all tensors, in two calls: the norms of all parts of the gradients first, since the step size follows
   from all of them; then the step.

   A tensor is parts in memory, nested as [batches][spread][rows][run]: part (batch, row) owns `spread` runs of `run`
   neighbouring entries. A matrix is one part and one long run; the taps of a convolution are parts that lie
   interleaved, in runs of one entry or, channels-last, of all input channels.

   Four streams of memory: g; then w, g and w again.

   Squares are summed over few entries in the format's own arithmetic and then in double precision. Where such a sum
   is so small or large that squares vanish or overflow, it is formed again in double precision, in which those of
   narrower formats do neither; a float64 part is then measured relative to its largest entry.

   The result depends on neither the number of threads nor the instruction set. The caller
   (archopt/kernels/cpu_agd.py) has checked types, layouts and devices. */

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared.h"

/* One tensor, as cpu_agd.py writes it: seven 64-bit words. */
typedef struct {
  void *weight;
  const void *grad;
  int64_t format;
  int64_t batches, spread, rows, run;
} Tensor;

_Static_assert(sizeof(Tensor) == 7 * sizeof(int64_t), "cpu_agd.py writes pointers as 64-bit words");

/* Of a part: ||g|| = size * scale, both doubles. `scale` is 1 unless the squares of float64 entries leave the range
   of doubles; then it is a power of two near the largest entry. `size` is 0 where the part is zero. */
typedef struct {
  double size, scale;
} Norm;

enum { STRIP = 512, SHORT_RUN = 32 }; /* interleaved entries that are worked on side by side; runs shorter than this */
enum { STEPS = 64 };                  /* over so many of them a sum is narrow */
enum { UNITS = 4 };                   /* units that are one of interleaved entries, whose start costs more */

enum { LINE = 64, AHEAD = 4096 };     /* bytes of a cache line, and how far ahead gradients are asked for */

/* A narrow sum between these has lost nothing that matters: squares that vanish in float32 are below 1e-45. */
static const double LEAST_SQUARE = 1e-30, MOST_SQUARE = 1e37;

/* How a tensor is cut into units: so many rows of so many runs each, or a piece of one run. */
typedef struct {
  int64_t rows, spread, run;                      /* of a unit, at most */
  int64_t row_pieces, spread_pieces, run_pieces;
  int64_t norm, slot;                             /* the tensor's first ones */
} Grid;

/* What one unit covers. */
typedef struct {
  int64_t at;                /* first entry */
  int64_t part;              /* first part */
  int64_t rows, spread, run; /* of the unit */
} Piece;

static int interleaved(const Tensor *t) { return t->spread > 1 && t->run < SHORT_RUN; }

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static Grid grid_of(const Tensor *t) {
  Grid grid;
  grid.run = smaller(t->run, UNIT);
  grid.rows = smaller(t->rows, at_least_one((interleaved(t) ? STRIP : UNIT) / grid.run));
  int64_t unit = interleaved(t) ? UNITS * UNIT : UNIT;
  grid.spread = smaller(t->spread, at_least_one(unit / (grid.rows * grid.run)));
  grid.row_pieces = ceiling(t->rows, grid.rows);
  grid.spread_pieces = ceiling(t->spread, grid.spread);
  grid.run_pieces = ceiling(t->run, grid.run);
  grid.norm = grid.slot = 0;
  return grid;
}

static Piece piece_of(const Tensor *t, const Grid *grid, int64_t item) {
  int64_t run = item % grid->run_pieces * grid->run;
  item /= grid->run_pieces;
  int64_t row = item % grid->row_pieces * grid->rows;
  item /= grid->row_pieces;
  int64_t spread = item % grid->spread_pieces * grid->spread;
  int64_t batch = item / grid->spread_pieces;
  return (Piece){
      ((batch * t->spread + spread) * t->rows + row) * t->run + run,
      batch * t->rows + row,
      smaller(grid->rows, t->rows - row),
      smaller(grid->spread, t->spread - spread),
      smaller(grid->run, t->run - run),
  };
}

/* The steps through an interleaved piece: `count` of them, `hop` entries apart, each over `width` neighbours (the last
   over what is left of `total`), whose parts repeat after `cells`. Where the piece is whole rows, many make a step. */
typedef struct {
  int64_t cells, width, hop, count, total;
} Walk;

static Walk walk_of(const Tensor *t, const Piece *piece) {
  int64_t cells = piece->rows * t->run;
  if (piece->rows < t->rows) return (Walk){cells, cells, t->rows * t->run, piece->spread, piece->spread * cells};
  int64_t many = at_least_one(STRIP / cells);
  int64_t width = cells * (many - (many > LANES_BYTES / 4 ? many % (LANES_BYTES / 4) : 0)); /* whole cache lines */
  int64_t total = piece->spread * cells;
  return (Walk){cells, width, width, ceiling(total, width), total};
}

static int64_t width_at(const Walk *walk, int64_t step) { return smaller(walk->width, walk->total - step * walk->width); }

/* How the entries of a part move: by factor * g where that is exact enough, else as `far` says. */
typedef struct {
  double factor;
  int far;
} Move;

#define KERNEL "agd_parts.h"
#include "every_set.h"

typedef void (*Measure)(const Tensor *, const Grid *, int64_t item, double *sums);
typedef void (*Step)(const Tensor *, const Grid *, int64_t item, const Norm *, double distance);

static const Measure MEASURE[SETS][FORMATS] = BY_SET(measure);
static const Step STEP[SETS][FORMATS] = BY_SET(step);

/* -- norms -------------------------------------------------------------------------------------------------- */

typedef struct {
  const Tensor *tensors;
  const Grid *grids;
  const double *distances;
  const Norm *norms;
  double *slots; /* sums of squares: one a unit and row of it */
  int set;
} Job;

static void measure_unit(const void *shared, int64_t tensor, int64_t begin, int64_t end, int64_t unit) {
  const Job *job = shared;
  const Tensor *t = &job->tensors[tensor];
  const Grid *grid = &job->grids[tensor];
  (void)end;
  (void)unit;
  MEASURE[job->set][t->format](t, grid, begin, job->slots + grid->slot + begin * grid->rows);
}

/* The norm of a float64 part whose sum of squares over- or underflows, or of one that is zero or not finite. */
static Norm measure_again(const Tensor *t, int64_t part) {
  const double *g = t->grad;
  g += (part / t->rows * t->spread * t->rows + part % t->rows) * t->run;
  double peak = 0;
  for (int64_t s = 0; s < t->spread; s++) {
    for (int64_t k = 0; k < t->run; k++) {
      double entry = fabs(g[s * t->rows * t->run + k]);
      if (!(entry <= DBL_MAX)) return (Norm){NAN, 1};
      peak = entry > peak ? entry : peak;
    }
  }
  if (peak == 0) return (Norm){0, 1};
  int exponent;
  frexp(peak, &exponent);
  double scale = ldexp(1, exponent - 1), sum = 0;
  for (int64_t s = 0; s < t->spread; s++) {
    double squares = 0;
    for (int64_t k = 0; k < t->run; k++) {
      double entry = g[s * t->rows * t->run + k] / scale;
      squares += entry * entry;
    }
    sum += squares;
  }
  return (Norm){sqrt(sum), scale};
}

/* Sums of squares between these have lost nothing that matters to over- or underflow. */
static const double SMALLEST_SQUARE = 1e-280, LARGEST_SQUARE = 1e300;

static double sum_up(const Tensor *t, const Grid *grid, const double *slots, Norm *norms) {
  double total = 0;
  for (int64_t part = 0; part < t->batches * t->rows; part++) {
    int64_t batch = part / t->rows, row = part % t->rows;
    double square = 0;
    for (int64_t s = 0; s < grid->spread_pieces; s++) {
      int64_t item = ((batch * grid->spread_pieces + s) * grid->row_pieces + row / grid->rows) * grid->run_pieces;
      for (int64_t k = 0; k < grid->run_pieces; k++) square += slots[(item + k) * grid->rows + row % grid->rows];
    }
    int sound = t->format != FLOAT64 || (square >= SMALLEST_SQUARE && square <= LARGEST_SQUARE);
    norms[part] = sound ? (Norm){sqrt(square), 1} : measure_again(t, part);
    total += norms[part].size * norms[part].scale;
  }
  return total;
}

/* Cuts all tensors into units; returns how many slots they need. */
static int64_t plan_all(const Tensor *tensors, int64_t count, Grid *grids, Plan *plans) {
  int64_t slots = 0, norms = 0;
  for (int64_t i = 0; i < count; i++) {
    grids[i] = grid_of(&tensors[i]);
    int64_t items = tensors[i].batches * grids[i].spread_pieces * grids[i].row_pieces * grids[i].run_pieces;
    plans[i] = (Plan){items, 1, 0};
    grids[i].slot = slots;
    grids[i].norm = norms;
    slots += items * grids[i].rows;
    norms += tensors[i].batches * tensors[i].rows;
  }
  return slots;
}

/* The norms of all parts, in order, and the sum over tensors of reach * sum of norms.

   Returns 0, or 1 where memory for the table of work ran out. */
EXPORT int32_t archopt_agd_measure(const Tensor *tensors, int64_t count, const double *reaches, Norm *norms,
                                   double *sum, int32_t set, int32_t threads, void *parallel) {
  Grid *grids = malloc((size_t)at_least_one(count) * sizeof *grids);
  Plan *plans = malloc((size_t)at_least_one(count) * sizeof *plans);
  double *slots = NULL;
  if (grids && plans) {
    slots = malloc((size_t)at_least_one(plan_all(tensors, count, grids, plans)) * sizeof *slots);
    if (slots) {
      Job job = {tensors, grids, NULL, norms, slots, set};
      share_out(measure_unit, &job, plans, count, number_units(plans, count), threads, parallel);
      *sum = 0;
      for (int64_t i = 0; i < count; i++) {
        *sum += reaches[i] * sum_up(&tensors[i], &grids[i], slots + grids[i].slot, norms + grids[i].norm);
      }
    }
  }
  int32_t failed = slots == NULL;
  free(slots);
  free(plans);
  free(grids);
  return failed;
}

/* -- the step ----------------------------------------------------------------------------------------------- */

static void step_unit(const void *shared, int64_t tensor, int64_t begin, int64_t end, int64_t unit) {
  const Job *job = shared;
  const Tensor *t = &job->tensors[tensor];
  const Grid *grid = &job->grids[tensor];
  (void)end;
  (void)unit;
  STEP[job->set][t->format](t, grid, begin, job->norms + grid->norm, job->distances[tensor]);
}

/* Moves each part by a distance: that of its tensor, `eta` times its pace. Parts that are zero or not finite stay.

   Returns 0, or 1 where memory for the table of work ran out and nothing moved. */
EXPORT int32_t archopt_agd_step(const Tensor *tensors, int64_t count, const double *paces, const Norm *norms,
                                const double *eta, int32_t set, int32_t threads, void *parallel) {
  Grid *grids = malloc((size_t)at_least_one(count) * sizeof *grids);
  Plan *plans = malloc((size_t)at_least_one(count) * sizeof *plans);
  double *distances = malloc((size_t)at_least_one(count) * sizeof *distances);
  int32_t failed = !grids || !plans || !distances;
  if (!failed) {
    plan_all(tensors, count, grids, plans);
    for (int64_t i = 0; i < count; i++) distances[i] = *eta * paces[i];
    Job job = {tensors, grids, distances, norms, NULL, set};
    share_out(step_unit, &job, plans, count, number_units(plans, count), threads, parallel);
  }
  free(distances);
  free(plans);
  free(grids);
  return failed;
}
