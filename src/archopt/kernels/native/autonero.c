/* AutoNero's step for all tensors, in three passes with torch's work between them.

   measure   ||g||^2 and <g, d> of every tensor; torch makes the limit f, the angle theta and `live` from their sums
   average   m and v of every tensor; and the whole step of what needs no polar factor: embeddings, heads, vectors
   turn      the rest of the step of hidden matrices, whose polar factors torch has made of m meanwhile

   Streams of memory of the weights' size: measure reads g, d; average reads g, m and writes m (others: reads w too,
   writes w, m, d); turn reads w, m, U and writes w, d. While a row is in cache it is passed over twice: for four sums,
   of w^2, w u, u^2 and m w, which give the norm that it will have after its step, and to write it. Where the norm would
   come out of a cancellation, or out of squares that vanish, it is formed again from the moved row itself.

   A step that is not live writes nothing. The result depends on neither the number of threads nor the instruction
   set. The caller (archopt/kernels/cpu_autonero.py) has checked types, layouts and devices. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared.h"

/* Kinds: a vector; rows that turn on spheres; rows that take plain steps; rows that turn along a polar factor. */
enum { ENTRIES, TURNING, PLAIN, HIDDEN };

/* One tensor, as cpu_autonero.py writes it: sixteen 64-bit words. The state is in float64 beside float64 weights,
   else in float32; `movement` may be in bfloat16 instead. */
typedef struct {
  void *weight;
  const void *grad;
  void *exp_avg;         /* m */
  void *exp_avg_sq;      /* v, one a row or entry */
  void *movement;        /* d */
  void *radius;          /* R, one a row; as grows_to none for vectors */
  void *grows_to;        /* norm at which a row that started at zero is grown up, 0 for others */
  float *step;           /* t, advanced by the last pass over the tensor */
  const void *direction; /* U of hidden matrices in the order of the weight, else NULL */
  const double *reach;   /* length a of plain steps; NULL for other kinds */
  int64_t format, movement_format;
  int64_t kind;
  int64_t rows, fan_in; /* fan_in entries that are neighbours make a row; 1 for vectors */
  int64_t group;
} Tensor;

_Static_assert(sizeof(Tensor) == 16 * sizeof(int64_t), "cpu_autonero.py writes pointers as 64-bit words");

/* Options of a group, as cpu_autonero.py writes them: five doubles. */
typedef struct {
  double beta, beta2;
  double sign;     /* -1 to ascend */
  double exponent; /* of the radius; 0 where radii are kept */
  double young;    /* length of a young row's plain step: 1, or 0 for sqrt(fan_in) */
} Options;

_Static_assert(sizeof(Options) == 5 * sizeof(double), "cpu_autonero.py writes five doubles");

/* What torch has made of the measures, for a group: four doubles, on whose values no host has looked. */
typedef struct {
  double f;     /* limit */
  double theta; /* the angle */
  double angle; /* theta times the group's lr */
  double live;  /* 1, or 0 where the step is void */
} Scalars;

/* What a unit of work sums up: ||g||^2 and <g, d>, or <m, d> in `first`. */
typedef struct {
  double first, second;
} Report;

/* What all rows of a tensor share at this step. */
typedef struct {
  double factor;           /* of gradients: limit and sign */
  double inverse;          /* 1 / (1 - beta^t) */
  double correction;       /* 1 - beta2^t */
  double angle, per_theta; /* per_theta: 1 / theta */
} Pace;

/* How a row moves: w <- scale (w - stride u). */
typedef struct {
  int moves;
  double stride, scale;
} Move;

/* Of a row: of w^2, w u, u^2 and m w. */
typedef struct {
  double ww, wu, uu, mw;
} Sums;

/* While a row is worked on the next one is fetched, unless both together leave the second cache. */
static const int64_t AHEAD_BYTES = 256 * 1024;

static Pace pace_of(const Tensor *t, const Options *o, const Scalars *s) {
  double step = (double)*t->step + 1;
  return (Pace){o->sign * s->f, 1 / (1 - pow(o->beta, step)), 1 - pow(o->beta2, step), s->angle, 1 / s->theta};
}

typedef void (*RowWork)(const Tensor *, const Options *, const Scalars *, int64_t begin, int64_t end, Report *);

#define KERNEL "autonero_rows.h"
#include "every_set.h"

static const RowWork MEASURE[SETS][FORMATS] = BY_SET(measure);
static const RowWork AVERAGE[SETS][FORMATS] = BY_SET(average);
static const RowWork STEP_ROWS[SETS][FORMATS] = BY_SET(step_rows);
static const RowWork STEP_ENTRIES[SETS][FORMATS] = BY_SET(step_entries);
static const RowWork TURN[SETS][FORMATS] = BY_SET(turn);

/* -- the passes over all tensors --------------------------------------------------------------------------- */

typedef struct {
  const Tensor *tensors;
  const Options *options;
  const Scalars *scalars;
  const RowWork *works;
  Report *reports;
} Job;

static void do_unit(const void *shared, int64_t tensor, int64_t begin, int64_t end, int64_t unit) {
  const Job *job = shared;
  const Tensor *t = &job->tensors[tensor];
  const Scalars *scalars = job->scalars ? &job->scalars[t->group] : NULL;
  job->works[tensor](t, &job->options[t->group], scalars, begin, end, &job->reports[unit]);
}

enum { MEASURING, AVERAGING, TURNING_ROWS };

static RowWork plan_of(const Tensor *t, int pass, int set, Plan *plan) {
  if (pass == MEASURING) {
    *plan = (Plan){t->rows * t->fan_in, UNIT, 0};
    return MEASURE[set][t->format];
  }
  *plan = (Plan){t->rows, at_least_one(UNIT / t->fan_in), 0};
  if (pass == TURNING_ROWS) return TURN[set][t->format];
  if (t->kind == ENTRIES) return STEP_ENTRIES[set][t->format];
  return (t->kind == HIDDEN ? AVERAGE : STEP_ROWS)[set][t->format];
}

/* One pass; `sums` gets the reports of each tensor, added up in the order of its units. Returns 0, or 1 where memory
   for the table of work ran out and nothing moved. */
static int32_t pass_over(const Tensor *tensors, int64_t count, const Options *options, const Scalars *scalars,
                         Report *sums, int pass, int32_t set, int32_t threads, void *parallel) {
  Plan *plans = malloc((size_t)at_least_one(count) * sizeof *plans);
  RowWork *works = malloc((size_t)at_least_one(count) * sizeof *works);
  Report *reports = NULL;
  if (plans && works) {
    for (int64_t i = 0; i < count; i++) works[i] = plan_of(&tensors[i], pass, set, &plans[i]);
    int64_t units = number_units(plans, count);
    reports = calloc((size_t)at_least_one(units), sizeof *reports);
    if (reports) {
      Job job = {tensors, options, scalars, works, reports};
      share_out(do_unit, &job, plans, count, units, threads, parallel);
      for (int64_t i = 0; i < count; i++) {
        sums[i] = (Report){0, 0};
        for (int64_t unit = plans[i].first; unit < (i + 1 < count ? plans[i + 1].first : units); unit++) {
          sums[i].first += reports[unit].first;
          sums[i].second += reports[unit].second;
        }
      }
    }
  }
  int32_t failed = reports == NULL;
  free(reports);
  free(works);
  free(plans);
  return failed;
}

/* sums: ||g||^2 and <g, d> of each tensor. */
EXPORT int32_t archopt_autonero_measure(const Tensor *tensors, int64_t count, const Options *options, Report *sums,
                                        int32_t set, int32_t threads, void *parallel) {
  return pass_over(tensors, count, options, NULL, sums, MEASURING, set, threads, parallel);
}

static int32_t moving_pass(const Tensor *tensors, int64_t count, const Options *options, const Scalars *scalars,
                           double *expected, int pass, int32_t set, int32_t threads, void *parallel) {
  Report *sums = malloc((size_t)at_least_one(count) * sizeof *sums);
  if (!sums) return 1;
  int32_t failed = pass_over(tensors, count, options, scalars, sums, pass, set, threads, parallel);
  if (!failed) {
    double total = 0;
    for (int64_t i = 0; i < count; i++) {
      int completes = pass == TURNING_ROWS || tensors[i].kind != HIDDEN;
      if (!completes || !scalars[tensors[i].group].live) continue;
      total += sums[i].first;
      *tensors[i].step += 1;
    }
    *expected = total;
  }
  free(sums);
  return failed;
}

/* expected: sum <gh, d> over the tensors whose step this pass completes. */
EXPORT int32_t archopt_autonero_average(const Tensor *tensors, int64_t count, const Options *options,
                                        const Scalars *scalars, double *expected, int32_t set, int32_t threads,
                                        void *parallel) {
  return moving_pass(tensors, count, options, scalars, expected, AVERAGING, set, threads, parallel);
}

EXPORT int32_t archopt_autonero_turn(const Tensor *tensors, int64_t count, const Options *options,
                                     const Scalars *scalars, double *expected, int32_t set, int32_t threads,
                                     void *parallel) {
  return moving_pass(tensors, count, options, scalars, expected, TURNING_ROWS, set, threads, parallel);
}
