/* Entries in one format and sums in lanes, for one instruction set; included by a kernel (see every_set.h). */

enum { FN(LANES) = LANES_BYTES / sizeof(A), FN(PARTS) = LANES_BYTES / VECTOR_BYTES };

typedef A FN(Vector) __attribute__((vector_size(VECTOR_BYTES)));
typedef struct {
  FN(Vector) part[FN(PARTS)];
} FN(Lanes);

/* Entries as A: where they lie, or converted into `room`. */
static inline const A *FN(read)(const T *restrict from, A *restrict room, int64_t n) {
#ifdef FROM
  for (int64_t i = 0; i < n; i++) room[i] = FROM(from[i]);
  return room;
#else
  (void)room;
  (void)n;
  return from;
#endif
}

static inline double FN(across)(const FN(Lanes) *lanes) {
  A x[FN(LANES)];
  memcpy(x, lanes, sizeof x);
  UNROLLED
  for (int half = FN(LANES) / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  }
  return x[0];
}

static inline A FN(one)(const T *from) {
#ifdef FROM
  return FROM(*from);
#else
  return *from;
#endif
}
