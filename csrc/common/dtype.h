// Element types, the type they are summed in, and vectors of them. No torch headers.
//
// bf16 and fp16 are converted in vectors: with integer arithmetic, and where the level has an
// instruction for fp16, with that, in assembly: gcc 12 leaves _Float16 conversions scalar, which is
// many times slower.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/cpu_level.h"
#include "common/formats.h"

namespace neulig_fast {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename E, int kLanes>
struct VecOf {
  typedef E type __attribute__((vector_size(sizeof(E) * kLanes)));
};
template <typename E, int kLanes>
using Vec = typename VecOf<E, kLanes>::type;

template <typename V>
NF_INLINE V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// load<kLanes>(p): kLanes elements from any address, in the type they are summed in (exact).
template <int kLanes>
NF_INLINE Vec<float, kLanes> load(const float* p) {
  return load_bits<Vec<float, kLanes>>(p);
}

template <int kLanes>
NF_INLINE Vec<double, kLanes> load(const double* p) {
  return load_bits<Vec<double, kLanes>>(p);
}

// Lane by lane: gcc 12 makes one instruction of it, and several of __builtin_convertvector.
template <typename E, int... kLane>
NF_INLINE Vec<uint32_t, sizeof...(kLane)> load_words(const void* p,
                                                     std::integer_sequence<int, kLane...>) {
  const auto v = load_bits<Vec<E, sizeof...(kLane)>>(p);
  return Vec<uint32_t, sizeof...(kLane)>{uint32_t{v[kLane]}...};
}

template <int kLanes>
NF_INLINE Vec<uint32_t, kLanes> load_u16(const void* p) {
  return load_words<uint16_t>(p, std::make_integer_sequence<int, kLanes>());
}

template <int kLanes>
NF_INLINE Vec<float, kLanes> load(const BFloat16* p) {
  return (Vec<float, kLanes>)(load_u16<kLanes>(p) << 16);
}

// fp16 in the upper half of a word. Two branches that need no denormal fp32 arithmetic: rebias the
// exponent (normal, inf, NaN), or let a subtraction of 0.5 normalise the mantissa (zero,
// subnormal).
template <int kLanes>
NF_INLINE Vec<float, kLanes> widen_half(Vec<uint32_t, kLanes> word) {
  using F = Vec<float, kLanes>;
  using U = Vec<uint32_t, kLanes>;
  const U sign = word & 0x80000000u;
  const U twice = word + word;
  const U normal = (U)((F)((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f);
  const U subnormal = (U)((F)((twice >> 17) | (126u << 23)) - 0.5f);
  const U small = (U)(twice < (1u << 27));
  return (F)(sign | (subnormal & small) | (normal & ~small));
}

template <int kLanes>
NF_INLINE Vec<float, kLanes> load(const Half* p) {
#ifdef NF_HAVE_LEVELS
  if constexpr (kLanes >= 8) {
    const auto half = load_bits<Vec<uint16_t, kLanes>>(p);
    Vec<float, kLanes> value;
    asm("vcvtph2ps %1, %0" : "=v"(value) : "v"(half));
    return value;
  }
#endif
  return widen_half<kLanes>(load_u16<kLanes>(p) << 16);
}

template <int kLanes>
NF_INLINE Vec<uint32_t, kLanes> load_u8(const void* p) {
  return load_words<uint8_t>(p, std::make_integer_sequence<int, kLanes>());
}

// The upper byte of an fp16.
template <int kLanes>
NF_INLINE Vec<float, kLanes> load(const Float8E5M2* p) {
  return widen_half<kLanes>(load_u8<kLanes>(p) << 24);
}

// As for fp16: rebias the exponent, or let a subtraction of 2^-6 normalise the mantissa.
template <int kLanes>
NF_INLINE Vec<float, kLanes> load(const Float8E4M3* p) {
  using F = Vec<float, kLanes>;
  using U = Vec<uint32_t, kLanes>;
  const U byte = load_u8<kLanes>(p);
  const U magnitude = (byte & 0x7Fu) << 20;
  const U subnormal = (U)((F)(magnitude + (121u << 23)) - 0x1.0p-6f);
  const U small = (U)(magnitude < (1u << 23));
  const U nan = (U)(magnitude == (0x7Fu << 20));
  const U normal = (magnitude + (120u << 23)) | (nan & 0x7FC00000u);
  return (F)((byte & 0x80u) << 24 | (subnormal & small) | (normal & ~small));
}

// a * b + c, rounded once. In assembly, as compilers put vectors of std::fma together only at
// times; where the level has no such instruction, the C library's: slow, and the same bits.
template <typename A, int... kLane>
NF_INLINE Vec<A, sizeof...(kLane)> multiply_add_lanes(Vec<A, sizeof...(kLane)> a,
                                                      Vec<A, sizeof...(kLane)> b,
                                                      Vec<A, sizeof...(kLane)> c,
                                                      std::integer_sequence<int, kLane...>) {
  return Vec<A, sizeof...(kLane)>{std::fma(a[kLane], b[kLane], c[kLane])...};
}

template <int kLanes, typename V>
NF_INLINE V multiply_add(V a, V b, V c) {
  using A = std::decay_t<decltype(a[0])>;
#ifdef NF_HAVE_LEVELS
  if constexpr (sizeof(V) >= 32) {
    if constexpr (sizeof(A) == 4) asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    else asm("vfmadd231pd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
#endif
  return multiply_add_lanes<A>(a, b, c, std::make_integer_sequence<int, kLanes>());
}

// store<kLanes>(p, v): rounds to nearest even to p's type and writes; NaN stays NaN.
template <int kLanes>
NF_INLINE void store(float* p, Vec<float, kLanes> v) {
  std::memcpy(p, &v, sizeof v);
}

template <int kLanes>
NF_INLINE void store(double* p, Vec<double, kLanes> v) {
  std::memcpy(p, &v, sizeof v);
}

template <int kLanes>
NF_INLINE void store_u16(void* p, Vec<uint32_t, kLanes> v) {
  const auto narrow = __builtin_convertvector(v, Vec<uint16_t, kLanes>);
  std::memcpy(p, &narrow, sizeof narrow);
}

template <int kLanes>
NF_INLINE void store(BFloat16* p, Vec<float, kLanes> v) {
  using U = Vec<uint32_t, kLanes>;
  const U bits = (U)v;
  const U nan = (U)(v != v);
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  store_u16<kLanes>(p, (rounded & ~nan) | (nan & 0x7FC0u));
}

// Scaling up and down turns too large values into inf; adding the value to a power of two of its
// own exponent, 13 bits coarser, rounds the mantissa in place.
template <int kLanes>
NF_INLINE void store(Half* p, Vec<float, kLanes> v) {
  using F = Vec<float, kLanes>;
  using U = Vec<uint32_t, kLanes>;
  const U bits = (U)v;
#ifdef NF_HAVE_LEVELS
  if constexpr (kLanes >= 8) {
    const U nan = (U)(v != v);
    const F same = (F)((bits & ~(nan & 0x7FFFFFFFu)) | (nan & 0x7FC00000u));  // of every NaN
    Vec<uint16_t, kLanes> half;
    asm("vcvtps2ph $0, %1, %0" : "=v"(half) : "v"(same));  // to nearest even
    std::memcpy(p, &half, sizeof half);
    return;
  }
#endif
  const U sign = (bits >> 16) & 0x8000u;
  const U twice = bits + bits;
  const F magnitude = ((F)(bits & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;
  const U exponent = twice & 0xFF000000u;
  const U tiny = (U)(exponent < 0x71000000u);
  const U bias = (exponent & ~tiny) | (tiny & 0x71000000u);
  const U sum = (U)((F)((bias >> 1) + 0x07800000u) + magnitude);
  const U rounded = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  const U nan = (U)(twice > 0xFF000000u);
  store_u16<kLanes>(p, sign | (rounded & ~nan) | (nan & 0x7E00u));
}

}  // namespace neulig_fast
