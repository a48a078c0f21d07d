/* Half-precision numbers as float32 and back, in integer arithmetic that every compiler can vectorise.

   Written out rather than left to _Float16 and F16C so that all instruction sets, and processors that have neither,
   give the same bits. Rounding is to nearest, ties to even; NaN stays NaN. */

#ifndef ARCHOPT_FORMATS_H
#define ARCHOPT_FORMATS_H

#include <stdint.h>
#include <string.h>

static inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float from_bfloat16(uint16_t half) { return as_float((uint32_t)half << 16); }

static inline uint16_t to_bfloat16(float value) {
  uint32_t bits = as_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline float from_float16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
  uint32_t magnitude = half & 0x7fffu;
  uint32_t normal = (magnitude << 13) + (112u << 23);           /* the exponent's bias, 15, becomes 127 */
  uint32_t special = (magnitude << 13) | 0x7f800000u;           /* infinity and NaN */
  float subnormal = as_float((magnitude << 13) + (113u << 23)) - as_float(113u << 23);
  uint32_t bits = magnitude >= 0x7c00u ? special : normal;
  bits = magnitude < 0x0400u ? as_bits(subnormal) : bits;
  return as_float(bits | sign);
}

static inline uint16_t to_float16(float value) {
  uint32_t bits = as_bits(value);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  /* Rounded at bit 13; a carry runs on into the exponent, up to infinity from 65520 on. */
  uint32_t normal = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  /* Below 2^-14 the addition of 1/2 does the rounding: the last bit of the sum is worth 2^-24. */
  uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return (uint16_t)(half | sign);
}

#endif
