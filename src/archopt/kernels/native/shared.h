/* What all kernels share: number formats, pieces of work and who does them. Knows neither Python nor torch. */

#ifndef ARCHOPT_SHARED_H
#define ARCHOPT_SHARED_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

#define INTERFACE 3 /* archopt/kernels/cpu.py asks for it; raise it where a struct or a signature changes */

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, FORMATS }; /* cpu.py has the same numbers */

#if defined(__x86_64__)
enum { SETS = 3 }; /* instruction sets: baseline, AVX2, AVX-512 */
#else
enum { SETS = 1 };
#endif

enum { UNIT = 65536 }; /* entries that a thread takes at a time, or one row if that is more */
enum { BLOCK = 1024 }; /* entries that are converted, and summed before the sum of sums, at once */

enum { LANES_BYTES = 64 }; /* of partial sums side by side, whatever the width of the processor's vectors */

/* A row whose squared norm after its step is a smaller part of its terms than this is summed again. */
#define CANCELLATION 0.25

/* Addresses as numbers: what is asked for ahead may lie beyond the end of a tensor, where no pointer may point. */
#define BEYOND(pointer, entries) ((uintptr_t)(pointer) + (uintptr_t)(entries) * sizeof *(pointer))
#define PREFETCH(address) __builtin_prefetch((const void *)(address), 0, 2)

#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll_count(4)")
#else
#define UNROLLED _Pragma("GCC unroll 4")
#endif

#define PASTE(a, b, c) a##_##b##_##c
#define NAMED(a, b, c) PASTE(a, b, c)
#define FN(name) NAMED(name, FORMAT, ISA)

static inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t at_least_one(int64_t a) { return a > 1 ? a : 1; }

static inline int64_t bytes_of(int64_t format) { return format == FLOAT64 ? 8 : format == FLOAT32 ? 4 : 2; }

/* The work on one tensor: so many items (rows, strips, entries), `batch` of them a unit. */
typedef struct {
  int64_t items, batch;
  int64_t first; /* unit of the whole job: set by `number_units` */
} Plan;

/* Does items `begin` to `end` of a tensor, which are one unit of the job. */
typedef void (*Work)(const void *job, int64_t tensor, int64_t begin, int64_t end, int64_t unit);

/* Numbers the units of all tensors; returns how many there are. */
int64_t number_units(Plan *plans, int64_t count);

/* Does all units, in the calling thread and up to `threads - 1` others. Those are torch's own OpenMP threads where
   its runtime is at hand (`parallel`, the address of GOMP_parallel), so that no second pool competes with them; else
   threads that end with the call. Which thread does which unit is left to chance: a unit must depend on no other. */
void share_out(Work work, const void *job, const Plan *plans, int64_t count, int64_t units, int32_t threads,
               void *parallel);

#endif
