/* A kernel (the header KERNEL) for every instruction set and format; included once by each kernel's own file.

   KERNEL is compiled with

   T       what weights and gradients are stored as        FORMAT, ISA   names of the two
   A       what arithmetic is done in: float or double     WHOLE         the integer as wide as A
   EPSILON, TINY   of A                                    FROM, TO      T to A and back, where they differ
   VECTOR_BYTES    of the instruction set                  TO_AT_RANDOM  A to bfloat16, by a counter

   and names what it defines FN(name). Of a function so named, BY_SET(name) is the table by set and format.

   Sums run in a fixed order, in lanes that are written out, and products are never contracted (-ffp-contract=off):
   the same bits for every set. Loops over neighbouring entries have no order of their own and are left to the
   compiler's vectoriser. */

#include "formats.h"
#include "shared.h"

#define ISA baseline
#define VECTOR_BYTES 16
#include "every_format.h"
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
#include "every_format.h"
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
#include "every_format.h"
#undef VECTOR_BYTES
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* By set, as archopt_instructions numbers them, and format. */
#define BY_FORMAT(kind, isa) \
  {NAMED(kind, float32, isa), NAMED(kind, float64, isa), NAMED(kind, bfloat16, isa), NAMED(kind, float16, isa)}
#if defined(__x86_64__)
#define BY_SET(kind) {BY_FORMAT(kind, baseline), BY_FORMAT(kind, avx2), BY_FORMAT(kind, avx512)}
#else
#define BY_SET(kind) {BY_FORMAT(kind, baseline)}
#endif
