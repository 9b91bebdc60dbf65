// From fp32 to fewer bits, in vectors: fp8 to nearest even, saturating, and every narrow type
// stochastically with Philox4x32-10. neulig_fast/ops/_rounding.py says what the bits are. No torch
// headers.
#pragma once

#include <cstdint>
#include <utility>

#include "common/dtype.h"

namespace neulig_fast {

template <>
struct FormatOf<BFloat16> : FormatOfBFloat16 {};
template <>
struct FormatOf<Half> : FormatOfHalf {};

template <typename U>
NF_INLINE U choose(U mask, U yes, U no) {
  return (mask & yes) | (~mask & no);
}

// The bits of T for a magnitude's code: not above the largest, NaN for NaN, with the sign of v.
template <typename T, int kLanes>
NF_INLINE Vec<uint32_t, kLanes> finish_code(Vec<uint32_t, kLanes> code, Vec<float, kLanes> v) {
  using F = FormatOf<T>;
  using U = Vec<uint32_t, kLanes>;
  const U largest = U{} + F::kLargest, nan = U{} + F::kNan;
  code = choose<U>((U)(code > largest), largest, code);
  code = code | ((U)v >> 31) << (8 * sizeof(T) - 1);
  return choose<U>((U)(v != v), nan, code);
}

template <int kLanes>
NF_INLINE void store_code(void* p, Vec<uint32_t, kLanes> code, uint8_t) {
  const auto narrow = __builtin_convertvector(code, Vec<uint8_t, kLanes>);
  std::memcpy(p, &narrow, sizeof narrow);
}

template <int kLanes>
NF_INLINE void store_code(void* p, Vec<uint32_t, kLanes> code, uint16_t) {
  store_u16<kLanes>(p, code);
}

// Half of the last place, or a little less for an even value, carries into it. Subnormals: adding
// a power of two whose last place is the target's smallest value rounds there.
template <typename T, int kLanes>
NF_INLINE void store_nearest(T* p, Vec<float, kLanes> v) {
  using F = FormatOf<T>;
  using U = Vec<uint32_t, kLanes>;
  constexpr int kDropped = 23 - F::kMantissa;
  constexpr uint32_t kMagic = uint32_t(151 - F::kBias - F::kMantissa) << 23;
  const U magnitude = (U)v & 0x7FFFFFFFu;
  const U even = ((magnitude >> kDropped) & 1u) + ((1u << (kDropped - 1)) - 1u);
  const U normal = ((magnitude + even) >> kDropped) - (uint32_t(127 - F::kBias) << F::kMantissa);
  const U added = U{} + kMagic;
  const U subnormal = (U)((Vec<float, kLanes>)magnitude + (Vec<float, kLanes>)added) - kMagic;
  const U small = (U)(magnitude < (uint32_t(128 - F::kBias) << 23));
  store_code<kLanes>(p, finish_code<T, kLanes>(choose<U>(small, subnormal, normal), v), p->bits);
}

template <int kLanes>
NF_INLINE void store(Float8E4M3* p, Vec<float, kLanes> v) {
  store_nearest<Float8E4M3, kLanes>(p, v);
}

template <int kLanes>
NF_INLINE void store(Float8E5M2* p, Vec<float, kLanes> v) {
  store_nearest<Float8E5M2, kLanes>(p, v);
}

template <int kLanes>
NF_INLINE void store(double* p, Vec<float, kLanes> v) {
  const auto wide = __builtin_convertvector(v, Vec<double, kLanes>);
  std::memcpy(p, &wide, sizeof wide);
}

// The bits below the last place plus as many random bits, the upper ones of a word, carry or not.
template <typename T, int kLanes>
NF_INLINE void store_stochastic(T* p, Vec<float, kLanes> v, Vec<uint32_t, kLanes> random) {
  using F = FormatOf<T>;
  using U = Vec<uint32_t, kLanes>;
  const U magnitude = (U)v & 0x7FFFFFFFu, zero = {};
  const U field = magnitude >> 23;
  const U exponent = choose<U>((U)(field == 0u), zero + 1u, field);
  const U hidden = (U)(field != 0u) & (1u << 23);
  const U small = (U)(magnitude < (uint32_t(128 - F::kBias) << 23));
  const U below = uint32_t(151 - F::kBias - F::kMantissa) - exponent;
  U dropped = choose<U>(small, below, zero + uint32_t(23 - F::kMantissa));
  const U excess = (U)(dropped > 31u) & (dropped - 31u);
  const U gone = (U)(excess > 31u);  // a shift by 32 or more has no value
  const U significand = (((magnitude & 0x7FFFFFu) | hidden) >> (excess & 31u)) & ~gone;
  dropped = choose<U>((U)(dropped > 31u), zero + 31u, dropped);
  const U kept = choose<U>(small, significand, magnitude);
  const U code = (kept + (random >> (32u - dropped))) >> dropped;
  const U rebias = ~small & (uint32_t(127 - F::kBias) << F::kMantissa);
  store_code<kLanes>(p, finish_code<T, kLanes>(code - rebias, v), p->bits);
}

// Every other 32-bit lane of a, times b, to 64 bits. In assembly where the level has it: gcc 12
// makes a product of 64-bit lanes of it, which is many times slower.
template <int kLanes>
NF_INLINE Vec<uint64_t, kLanes / 2> wide_product(Vec<uint64_t, kLanes / 2> a, uint32_t b) {
  using W = Vec<uint64_t, kLanes / 2>;
#ifdef NF_HAVE_LEVELS
  if constexpr (kLanes >= 8) {
    W product;
    asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(W{} + b));
    return product;
  }
#endif
  return (a & 0xFFFFFFFFu) * uint64_t(b);
}

// All rounds of Philox4x32-kRounds (Salmon, Moraes, Dror, Shaw, SC 2011) in the lower halves of
// 64-bit lanes, one counter each; what the upper halves hold does not matter.
template <int kLanes, int kRounds>
NF_INLINE void philox_rounds(uint64_t seed, Vec<uint64_t, kLanes / 2> (&c)[4]) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const auto left = wide_product<kLanes>(c[0], 0xD2511F53u);
    const auto right = wide_product<kLanes>(c[2], 0xCD9E8D57u);
    c[0] = (right >> 32) ^ c[1] ^ low;
    c[1] = right;
    c[2] = (left >> 32) ^ c[3] ^ high;
    c[3] = left;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

// The words of even and odd counters, one after the other.
template <int kLanes, typename W>
NF_INLINE Vec<uint32_t, kLanes> interleaved(W even, W odd) {
  if constexpr (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) std::swap(even, odd);
  return (Vec<uint32_t, kLanes>)((even & 0xFFFFFFFFu) | odd << 32);
}

// Four words of Philox4x32-10 from each counter, in place.
template <int kLanes>
NF_INLINE void philox(uint64_t seed, Vec<uint32_t, kLanes> (&c)[4]) {
  using W = Vec<uint64_t, kLanes / 2>;
  W even[4], odd[4];
#pragma GCC unroll 4
  for (int word = 0; word < 4; ++word) {
    even[word] = (W)c[word];
    odd[word] = (W)c[word] >> 32;
    if constexpr (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) std::swap(even[word], odd[word]);
  }
  philox_rounds<kLanes, 10>(seed, even);
  philox_rounds<kLanes, 10>(seed, odd);
#pragma GCC unroll 4
  for (int word = 0; word < 4; ++word) c[word] = interleaved<kLanes>(even[word], odd[word]);
}

}  // namespace neulig_fast
