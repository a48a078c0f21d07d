/* Nero's step for all tensors of a group, in one call.

   A tensor is rows of neurons in memory, nested as [batches][spread][rows][run]: neuron (batch, row) owns `spread`
   runs of `run` neighbouring entries. Linear and ordinary convolutions, channels-last ones too, have spread = 1 and
   one long run; columns and transposed convolutions have many short ones.

   While a neuron is in cache five sums are gathered: of w, w^2, g, g^2, w g. They give the mean and the norm that the
   neuron will have after its step, so that one reading pass and one writing pass do: three streams of memory for
   rows that fit in cache, five for longer ones. Where the norm would come out of a cancellation (the row is far from
   balanced) it is formed again from the moved row itself.

   Sums run in a fixed order that depends on neither the number of threads nor the instruction set, and products are never contracted (-ffp-contract=off): the same bits everywhere.

   The caller (archopt/kernels/cpu.py) has checked types, layouts and devices. Nothing here knows Python or torch. */

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "formats.h"

#define EXPORT __attribute__((visibility("default")))

#define INTERFACE 1 /* archopt/kernels/cpu.py asks for it; raise it where a struct or a signature changes */

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, FORMATS };

/* One tensor, as cpu.py writes it: twelve 64-bit words. */
typedef struct {
  void *weight;
  const void *grad;
  void *exp_avg_sq; /* v, one a neuron: float64 beside float64 weights, else float32 */
  const void *scale; /* s, in the type of v */
  const float *step; /* t, already advanced */
  float *turn;
  int32_t *skipped;
  int64_t format;
  int64_t batches, spread, rows, run; /* spread = run = 1: every entry is a neuron of its own, never projected */
} Tensor;

_Static_assert(sizeof(Tensor) == 12 * sizeof(int64_t), "cpu.py writes pointers as 64-bit words");

typedef struct {
  double lr, beta;
  int32_t zero_mean, unit_norm, maximize;
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

/* A neuron whose squared norm after the step is a smaller part of its terms than this is summed again. */
static const double CANCELLATION = 0.25;

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

static int64_t bytes_of(int64_t format) { return format == FLOAT64 ? 8 : format == FLOAT32 ? 4 : 2; }

static int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t at_least_one(int64_t a) { return a > 1 ? a : 1; }

/* Neurons of a strip: as many as stay in cache, but whole cache lines. */
static int64_t strip_rows(const Tensor *t) {
  int64_t cells = STRIP_BYTES / (2 * t->spread * bytes_of(t->format));
  cells = cells > STRIP ? STRIP : cells < NARROWEST_STRIP ? NARROWEST_STRIP : cells;
  return at_least_one(cells / t->run);
}

enum { UNIT = 16384 }; /* entries that a thread takes at a time, or one neuron if that is more */
enum { BLOCK = 1024 }; /* entries that are converted, and summed before the sum of sums, at once */

enum { LANES_BYTES = 64 }; /* of partial sums side by side, whatever the width of the processor's vectors */

/* While a neuron is worked on the next one is fetched, unless both together leave the second cache. */
static const int64_t AHEAD_BYTES = 128 * 1024;
#define PREFETCH(address) __builtin_prefetch((address), 0, 2)

#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll_count(4)")
#else
#define UNROLLED _Pragma("GCC unroll 4")
#endif

typedef void (*Work)(const Tensor *, const Options *, int64_t, int64_t, Report *);

#define PASTE(a, b, c) a##_##b##_##c
#define NAMED(a, b, c) PASTE(a, b, c)

#define ISA baseline
#define VECTOR_BYTES 16
#include "formats_of_isa.h"
#undef VECTOR_BYTES
#undef ISA

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define ISA avx2
#define VECTOR_BYTES 32
#include "formats_of_isa.h"
#undef VECTOR_BYTES
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw")
#endif
#define ISA avx512
#define VECTOR_BYTES 64
#include "formats_of_isa.h"
#undef VECTOR_BYTES
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* The instruction sets that were compiled, the last one that the processor has being the best. */
static const struct {
  const char *name;
  const Work *rows, *strips, *entries; /* by format */
} SETS[] = {
#if defined(__x86_64__)
    {"x86-64", rows_baseline, strips_baseline, entries_baseline},
    {"AVX2", rows_avx2, strips_avx2, entries_avx2},
    {"AVX-512", rows_avx512, strips_avx512, entries_avx512},
#elif defined(__aarch64__)
    {"NEON", rows_baseline, strips_baseline, entries_baseline}, /* part of every aarch64 */
#else
    {"baseline", rows_baseline, strips_baseline, entries_baseline},
#endif
};

static int runs_here(int set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (set == 1) return __builtin_cpu_supports("avx2");
  if (set == 2)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#endif
  return set == 0;
}

EXPORT int32_t archopt_interface(void) { return INTERFACE; }

/* The name of an instruction set, NULL where it was not compiled or the processor lacks it. */
EXPORT const char *archopt_instructions(int32_t set) {
  return set >= 0 && set < (int)(sizeof SETS / sizeof *SETS) && runs_here(set) ? SETS[set].name : NULL;
}

/* -- pieces of work and who does them ---------------------------------------------------------------------- */

typedef struct {
  Work work;
  int64_t items; /* neurons, strips or entries of the tensor */
  int64_t batch; /* of them a unit */
  int64_t first; /* unit of the whole job */
} Plan;

typedef struct {
  const Tensor *tensors;
  const Options *options;
  const Plan *plans;
  Report *reports;
  int64_t count, units;
  int64_t next; /* unit that nobody has taken yet */
} Job;

static Plan plan_of(const Tensor *t, int set, int64_t first) {
  if (t->spread * t->run == 1) {
    return (Plan){SETS[set].entries[t->format], t->batches * t->rows, UNIT, first};
  }
  int64_t fan_in = t->spread * t->run;
  if (t->spread == 1 || t->run >= SHORT_RUN) {
    return (Plan){SETS[set].rows[t->format], t->batches * t->rows, at_least_one(UNIT / fan_in), first};
  }
  int64_t cells = strip_rows(t) * t->run;
  int64_t strips = t->batches * ceiling(t->rows, strip_rows(t));
  return (Plan){SETS[set].strips[t->format], strips, at_least_one(UNIT / (t->spread * cells)), first};
}

static void work_on(void *shared) {
  Job *job = shared;
  int64_t tensor = 0;
  for (;;) {
    int64_t unit = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (unit >= job->units) return;
    while (tensor + 1 < job->count && job->plans[tensor + 1].first <= unit) tensor++; /* units come in order */
    const Plan *plan = &job->plans[tensor];
    int64_t begin = (unit - plan->first) * plan->batch;
    int64_t end = begin + plan->batch < plan->items ? begin + plan->batch : plan->items;
    plan->work(&job->tensors[tensor], job->options, begin, end, &job->reports[unit]);
  }
}

static void *work_in_thread(void *shared) {
  work_on(shared);
  return NULL;
}

/* The calling thread and `threads - 1` others. Those are torch's own OpenMP threads where its runtime is at hand
   (`parallel`), so that no second pool competes with them; else threads that end with the step. */
static void share(Job *job, int32_t threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
  if (threads > job->units) threads = (int32_t)job->units;
  if (threads <= 1) {
    work_on(job);
    return;
  }
  if (parallel) {
    parallel(work_on, job, (unsigned)threads, 0);
    return;
  }
  pthread_t *others = malloc((size_t)(threads - 1) * sizeof *others);
  int started = 0;
  while (others && started < threads - 1 && !pthread_create(&others[started], NULL, work_in_thread, job)) started++;
  work_on(job);
  for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
  free(others);
}

/* One step of `count` tensors. Returns 0, or 1 where memory for the table of work ran out and nothing moved. */
EXPORT int32_t archopt_nero(const Tensor *tensors, int64_t count, double lr, double beta, int32_t zero_mean,
                            int32_t unit_norm, int32_t maximize, int32_t set, int32_t threads, void *parallel) {
  Options options = {lr, beta, zero_mean, unit_norm, maximize};
  Plan *plans = malloc((size_t)at_least_one(count) * sizeof *plans);
  if (!plans) return 1;
  int64_t units = 0;
  for (int64_t i = 0; i < count; i++) {
    plans[i] = plan_of(&tensors[i], set, units);
    units += ceiling(plans[i].items, plans[i].batch);
  }
  Report *reports = calloc((size_t)at_least_one(units), sizeof *reports);
  if (!reports) {
    free(plans);
    return 1;
  }
  Job job = {tensors, &options, plans, reports, count, units, 0};
  share(&job, threads, (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel);
  for (int64_t i = 0; i < count; i++) {
    Report sum = {0, 0};
    for (int64_t unit = plans[i].first; unit < (i + 1 < count ? plans[i + 1].first : units); unit++) {
      sum.turn += reports[unit].turn;
      sum.skipped += reports[unit].skipped;
    }
    *tensors[i].turn = (float)(sum.turn / (double)(tensors[i].batches * tensors[i].rows));
    *tensors[i].skipped += (int32_t)sum.skipped;
  }
  free(reports);
  free(plans);
  return 0;
}
