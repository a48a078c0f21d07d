/* Random numbers by counter, for stochastic rounding: a function of the tensor's number in its optimizer, the step,
   the neuron and the entry, so that they depend on neither threads nor instruction set and a resumed run has the same.

   A neuron's key is three rounds of splitmix64 (Steele, Lea, Flood 2014); an entry's bits are the key plus a Weyl
   sequence through a 32-bit finaliser of two multiplications and three shifts, whose bias is small (Wellons 2018). */

#ifndef ARCHOPT_RANDOM_H
#define ARCHOPT_RANDOM_H

#include <stdint.h>

#include "formats.h"

enum { WEYL = 0x1e3779b1 }; /* odd: all entries of a neuron differ before they are mixed */

static inline uint64_t splitmix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

static inline uint32_t key_of(int64_t tensor, int64_t step, int64_t neuron) {
  return (uint32_t)splitmix(splitmix(splitmix((uint64_t)tensor) ^ (uint64_t)step) ^ (uint64_t)neuron);
}

static inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/* One of the two neighbours, the nearer one the more often: right on average. NaN stays NaN. */
static inline uint16_t to_bfloat16_at_random(float value, uint32_t counter) {
  uint32_t bits = as_bits(value);
  uint32_t rounded = (bits + (mix(counter) >> 16)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

#endif
