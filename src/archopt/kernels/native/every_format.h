/* A kernel (the header KERNEL) in every format, for one instruction set, ISA with vectors of VECTOR_BYTES. */

#define T float
#define A float
#define WHOLE int32_t
#define EPSILON 1.1920928955078125e-07
#define TINY 1.1754943508222875e-38
#define FORMAT float32
#include KERNEL
#undef FORMAT
#undef T

#define T uint16_t
#define FORMAT bfloat16
#define FROM from_bfloat16
#define TO to_bfloat16
#define TO_AT_RANDOM to_bfloat16_at_random
#include KERNEL
#undef TO_AT_RANDOM
#undef TO
#undef FROM
#undef FORMAT

#define FORMAT float16
#define FROM from_float16
#define TO to_float16
#include KERNEL
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
#include KERNEL
#undef FORMAT
#undef TINY
#undef EPSILON
#undef WHOLE
#undef A
#undef T
