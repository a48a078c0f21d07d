/* Nero's step for all tensors of a group, in one call.

   A tensor is rows of neurons in memory, nested as [batches][spread][rows][run]: neuron (batch, row) owns `spread`
   runs of `run` neighbouring entries. Linear and ordinary convolutions, channels-last ones too, have spread = 1 and
   one long run; columns and transposed convolutions have many short ones.

   While a neuron is in cache five sums are gathered: of w, w^2, g, g^2, w g. They give the mean and the norm that the
   neuron will have after its step, so that one reading pass and one writing pass do: three streams of memory for
   rows that fit in cache, five for longer ones. Where the norm would come out of a cancellation (the row is far from
   balanced) it is formed again from the moved row itself.

   The result depends on neither the number of threads nor the instruction set. The caller
   (archopt/kernels/cpu_nero.py) has checked types, layouts and devices. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "random.h"
#include "shared.h"

/* One tensor, as cpu_nero.py writes it: thirteen 64-bit words. */
typedef struct {
  void *weight;
  const void *grad;
  void *exp_avg_sq; /* v, one a neuron: float64 beside float64 weights, else float32 */
  const void *scale; /* s, in the type of v */
  float *step; /* t */
  float *turn;
  int32_t *skipped;
  int64_t format;
  int64_t batches, spread, rows, run; /* spread = run = 1: every entry is a neuron of its own, never projected */
  int64_t number; /* in its optimizer: a key of random numbers */
} Tensor;

_Static_assert(sizeof(Tensor) == 13 * sizeof(int64_t), "cpu_nero.py writes pointers as 64-bit words");

typedef struct {
  double lr, beta;
  int32_t zero_mean, unit_norm, maximize;
  int32_t at_random; /* how bfloat16 weights are rounded */
} Options;

typedef struct {
  double w, ww, g, gg, wg;
} Sums;

/* What all neurons of a tensor share at this step. */
typedef struct {
  double pace;       /* lr s */
  double correction; /* 1 - beta^t */
} Pace;

/* How a neuron moves: w <- (w - stride g - mean) * inverse. */
typedef struct {
  int moves, recheck;
  double stride, mean, inverse;
} Move;

/* What a piece of work reports. */
typedef struct {
  double turn;
  int64_t skipped;
} Report;

/* Where centring leaves less than rounding does of a constant row, the row is not divided (archopt/neurons.py). */
static double length_of(double square, double mean, double fan_in, double epsilon, double tiny) {
  double length = sqrt(square);
  double floor = fabs(mean) * (8 * epsilon * sqrt(fan_in)) + tiny;
  return length > floor ? length : 1.0;
}

/* Entries of a strip, the interleaved neurons that are worked on at once: the sums of a strip stay in the first
   cache, its weights and gradients in the second. */
enum { STRIP = 256, NARROWEST_STRIP = 32, SHORT_RUN = 32 };
static const int64_t STRIP_BYTES = 256 * 1024;

/* Neurons of a strip: as many as stay in cache, but whole cache lines. */
static int64_t strip_rows(const Tensor *t) {
  int64_t cells = STRIP_BYTES / (2 * t->spread * bytes_of(t->format));
  cells = cells > STRIP ? STRIP : cells < NARROWEST_STRIP ? NARROWEST_STRIP : cells;
  return at_least_one(cells / t->run);
}

/* While a neuron is worked on the next one is fetched, unless both together leave the second cache. */
static const int64_t AHEAD_BYTES = 128 * 1024;

typedef void (*NeroWork)(const Tensor *, const Options *, int64_t begin, int64_t end, Report *);

#define KERNEL "nero_rows.h"
#include "every_set.h"

static const NeroWork ROWS[SETS][FORMATS] = BY_SET(rows);
static const NeroWork STRIPS[SETS][FORMATS] = BY_SET(strips);
static const NeroWork ENTRIES[SETS][FORMATS] = BY_SET(entries);

/* -- the step of all tensors ------------------------------------------------------------------------------- */

typedef struct {
  const Tensor *tensors;
  const Options *options;
  const NeroWork *works; /* of each tensor */
  Report *reports;       /* of each unit */
} Job;

static NeroWork plan_of(const Tensor *t, int set, Plan *plan) {
  if (t->spread * t->run == 1) {
    *plan = (Plan){t->batches * t->rows, UNIT, 0};
    return ENTRIES[set][t->format];
  }
  if (t->spread == 1 || t->run >= SHORT_RUN) {
    *plan = (Plan){t->batches * t->rows, at_least_one(UNIT / (t->spread * t->run)), 0};
    return ROWS[set][t->format];
  }
  int64_t cells = strip_rows(t) * t->run;
  *plan = (Plan){t->batches * ceiling(t->rows, strip_rows(t)), at_least_one(UNIT / (t->spread * cells)), 0};
  return STRIPS[set][t->format];
}

static void nero_unit(const void *shared, int64_t tensor, int64_t begin, int64_t end, int64_t unit) {
  const Job *job = shared;
  job->works[tensor](&job->tensors[tensor], job->options, begin, end, &job->reports[unit]);
}

/* One step of `count` tensors. Returns 0, or 1 where memory for the table of work ran out and nothing moved. */
EXPORT int32_t archopt_nero(const Tensor *tensors, int64_t count, double lr, double beta, int32_t zero_mean,
                            int32_t unit_norm, int32_t maximize, int32_t at_random, int32_t set, int32_t threads,
                            void *parallel) {
  Options options = {lr, beta, zero_mean, unit_norm, maximize, at_random};
  Plan *plans = malloc((size_t)at_least_one(count) * sizeof *plans);
  NeroWork *works = malloc((size_t)at_least_one(count) * sizeof *works);
  Report *reports = NULL;
  if (plans && works) {
    for (int64_t i = 0; i < count; i++) works[i] = plan_of(&tensors[i], set, &plans[i]);
    int64_t units = number_units(plans, count);
    reports = calloc((size_t)at_least_one(units), sizeof *reports);
    if (reports) {
      for (int64_t i = 0; i < count; i++) *tensors[i].step += 1;
      Job job = {tensors, &options, works, reports};
      share_out(nero_unit, &job, plans, count, units, threads, parallel);
      for (int64_t i = 0; i < count; i++) {
        Report sum = {0, 0};
        for (int64_t unit = plans[i].first; unit < (i + 1 < count ? plans[i + 1].first : units); unit++) {
          sum.turn += reports[unit].turn;
          sum.skipped += reports[unit].skipped;
        }
        *tensors[i].turn = (float)(sum.turn / (double)(tensors[i].batches * tensors[i].rows));
        *tensors[i].skipped += (int32_t)sum.skipped;
      }
    }
  }
  int32_t failed = reports == NULL;
  free(reports);
  free(works);
  free(plans);
  return failed;
}
