/* Instruction sets of the processor, and work shared out among threads. */

#include "shared.h"

#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>

/* -- instruction sets -------------------------------------------------------------------------------------- */

static const char *const NAMES[SETS] = {
#if defined(__x86_64__)
    "x86-64", "AVX2", "AVX-512",
#elif defined(__aarch64__)
    "NEON", /* part of every aarch64 */
#else
    "baseline",
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

/* The name of an instruction set, NULL where it was not compiled or the processor lacks it; the last one that the
   processor has is the best. */
EXPORT const char *archopt_instructions(int32_t set) {
  return set >= 0 && set < SETS && runs_here(set) ? NAMES[set] : NULL;
}

/* -- pieces of work and who does them ---------------------------------------------------------------------- */

typedef struct {
  Work work;
  const void *job;
  const Plan *plans;
  int64_t count, units;
  int64_t next; /* unit that nobody has taken yet */
} Queue;

int64_t number_units(Plan *plans, int64_t count) {
  int64_t units = 0;
  for (int64_t i = 0; i < count; i++) {
    plans[i].first = units;
    units += ceiling(plans[i].items, plans[i].batch);
  }
  return units;
}

static void take_units(void *shared) {
  Queue *queue = shared;
  int64_t tensor = 0;
  for (;;) {
    int64_t unit = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
    if (unit >= queue->units) return;
    while (tensor + 1 < queue->count && queue->plans[tensor + 1].first <= unit) tensor++; /* units come in order */
    const Plan *plan = &queue->plans[tensor];
    int64_t begin = (unit - plan->first) * plan->batch;
    int64_t end = begin + plan->batch < plan->items ? begin + plan->batch : plan->items;
    queue->work(queue->job, tensor, begin, end, unit);
  }
}

static void *take_units_in_thread(void *shared) {
  take_units(shared);
  return NULL;
}

void share_out(Work work, const void *job, const Plan *plans, int64_t count, int64_t units, int32_t threads,
               void *parallel) {
  Queue queue = {work, job, plans, count, units, 0};
  if (threads > units) threads = (int32_t)units;
  if (threads <= 1) {
    take_units(&queue);
    return;
  }
  if (parallel) {
    ((void (*)(void (*)(void *), void *, unsigned, unsigned))parallel)(take_units, &queue, (unsigned)threads, 0);
    return;
  }
  pthread_t *others = malloc((size_t)(threads - 1) * sizeof *others);
  int started = 0;
  while (others && started < threads - 1 && !pthread_create(&others[started], NULL, take_units_in_thread, &queue))
    started++;
  take_units(&queue);
  for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
  free(others);
}
