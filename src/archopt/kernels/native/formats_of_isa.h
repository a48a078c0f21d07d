/* The kernels of one instruction set, ISA with vectors of VECTOR_BYTES, for every format; included once for each. */

#define T float
#define A float
#define WHOLE int32_t
#define EPSILON 1.1920928955078125e-07
#define TINY 1.1754943508222875e-38
#define FORMAT float32
#include "nero_rows.h"
#undef FORMAT
#undef T

#define T uint16_t
#define FORMAT bfloat16
#define FROM from_bfloat16
#define TO to_bfloat16
#include "nero_rows.h"
#undef TO
#undef FROM
#undef FORMAT

#define FORMAT float16
#define FROM from_float16
#define TO to_float16
#include "nero_rows.h"
#undef TO
#undef FROM
#undef FORMAT
#undef T
#undef TINY
#undef EPSILON
#undef WHOLE
#undef A

#define T double
#define A double
#define WHOLE int64_t
#define EPSILON 2.2204460492503131e-16
#define TINY 2.2250738585072014e-308
#define FORMAT float64
#include "nero_rows.h"
#undef FORMAT
#undef TINY
#undef EPSILON
#undef WHOLE
#undef A
#undef T

#define OF(kind, format) NAMED(kind, format, ISA)
#define TABLE(kind) {OF(kind, float32), OF(kind, float64), OF(kind, bfloat16), OF(kind, float16)}
#define JOIN(kind, isa) kind##_##isa
#define FOR_ISA(kind, isa) JOIN(kind, isa)

static const Work FOR_ISA(rows, ISA)[FORMATS] = TABLE(rows);
static const Work FOR_ISA(strips, ISA)[FORMATS] = TABLE(strips);
static const Work FOR_ISA(entries, ISA)[FORMATS] = TABLE(entries);

#undef FOR_ISA
#undef JOIN
#undef TABLE
#undef OF
