// From fp32 to fewer bits, one value at a time: fp8 to nearest even, saturating, and every narrow
// type stochastically with Philox4x32-10. neulig_fast/ops/_rounding.py says what the bits are.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/formats.h"
#include "cuda/element.h"

namespace neulig_fast {

template <>
struct FormatOf<__nv_bfloat16> : FormatOfBFloat16 {};
template <>
struct FormatOf<__half> : FormatOfHalf {};

NF_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

NF_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

NF_DEVICE __half half_of(uint32_t bits) {
  __half_raw raw;
  raw.x = static_cast<uint16_t>(bits);
  return __half(raw);
}

// The upper byte of an fp16.
NF_DEVICE float widen(Float8E5M2 x) {
  return __half2float(half_of(uint32_t(x.bits) << 8));
}

// In fp16's place the exponent is 8 too small; its largest code is NaN.
NF_DEVICE float widen(Float8E4M3 x) {
  const uint32_t magnitude = x.bits & 0x7Fu;
  const uint32_t placed = (uint32_t(x.bits) & 0x80u) << 8 | magnitude << 7;
  const float value = multiply(__half2float(half_of(placed)), 256.0f);
  return magnitude == 0x7Fu ? float_of(0x7FC00000u) : value;
}

// Sixteen bytes of values of one or two as loaded: the compiler keeps lanes in a register each, and
// where a load may be skipped, it takes them apart at once, which waits for the load.
template <typename T>
struct alignas(16) PackedWords {
  uint32_t word[4];
};

// What a thread loads at once.
template <typename T, int kLanes>
using Loaded =
    std::conditional_t<sizeof(T) < 4 && sizeof(T) * kLanes == 16, PackedWords<T>, Pack<T, kLanes>>;

template <int kLanes, typename T>
NF_DEVICE Loaded<T, kLanes> load_all(const T* from) {
  return *reinterpret_cast<const Loaded<T, kLanes>*>(from);
}

// In the type it is summed in.
template <typename T, int kLanes>
NF_DEVICE void widen_all(Pack<T, kLanes>& x, Accumulator<T> (&value)[kLanes]) {
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = widen(x.lane[lane]);
}

// sm_89 and later convert e4m3 in pairs, to fp16, which holds all of its values.
NF_DEVICE void widen_pair(uint32_t pair, Float8E4M3, float& first, float& second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  first = __half2float(half_of(halves & 0xFFFFu));
  second = __half2float(half_of(halves >> 16));
#else
  first = widen(Float8E4M3{static_cast<uint8_t>(pair)});
  second = widen(Float8E4M3{static_cast<uint8_t>(pair >> 8)});
#endif
}
NF_DEVICE void widen_pair(uint32_t pair, Float8E5M2, float& first, float& second) {
  first = widen(Float8E5M2{static_cast<uint8_t>(pair)});
  second = widen(Float8E5M2{static_cast<uint8_t>(pair >> 8)});
}
NF_DEVICE void widen_pair(uint32_t pair, __nv_bfloat16, float& first, float& second) {
  first = float_of(pair << 16);
  second = float_of(pair & 0xFFFF0000u);
}
NF_DEVICE void widen_pair(uint32_t pair, __half, float& first, float& second) {
  first = widen(half_of(pair & 0xFFFFu));
  second = widen(half_of(pair >> 16));
}

template <typename T>
NF_DEVICE void widen_all(PackedWords<T>& x, float (&value)[kWideLanes<T>]) {
  NF_UNROLL
  for (int i = 0; i < 4; ++i) {
#ifdef __CUDA_ARCH__
    // Not ahead of the loop over outputs: widened, all experts would not fit the registers.
    asm volatile("" : "+r"(x.word[i]));
#endif
    if constexpr (sizeof(T) == 1) {
      widen_pair(x.word[i] & 0xFFFFu, T{}, value[4 * i], value[4 * i + 1]);
      widen_pair(x.word[i] >> 16, T{}, value[4 * i + 2], value[4 * i + 3]);
    } else {
      widen_pair(x.word[i], T{}, value[2 * i], value[2 * i + 1]);
    }
  }
}

// The bits of T for a magnitude's code: not above the largest, NaN for NaN, with the sign of x.
template <typename T>
NF_DEVICE uint32_t finish_code(uint32_t code, float x) {
  using F = FormatOf<T>;
  if (code > F::kLargest) code = F::kLargest;
  code |= bits_of(x) >> 31 << (8 * sizeof(T) - 1);
  return x != x ? F::kNan : code;
}

NF_DEVICE void set_code(uint32_t code, Float8E4M3& to) {
  to.bits = static_cast<uint8_t>(code);
}
NF_DEVICE void set_code(uint32_t code, Float8E5M2& to) {
  to.bits = static_cast<uint8_t>(code);
}
NF_DEVICE void set_code(uint32_t code, __half& to) {
  to = half_of(code);
}
NF_DEVICE void set_code(uint32_t code, __nv_bfloat16& to) {
  __nv_bfloat16_raw raw;
  raw.x = static_cast<uint16_t>(code);
  to = __nv_bfloat16(raw);
}

// Half of the last place, or a little less for an even value, carries into it. Subnormals: adding
// a power of two whose last place is the target's smallest value rounds there.
template <typename T>
NF_DEVICE void narrow_to_fp8(float x, T& to) {
  using F = FormatOf<T>;
  constexpr int kDropped = 23 - F::kMantissa;
  constexpr uint32_t kMagic = uint32_t(151 - F::kBias - F::kMantissa) << 23;
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  const uint32_t even = (magnitude >> kDropped & 1u) + ((1u << (kDropped - 1)) - 1u);
  uint32_t code = ((magnitude + even) >> kDropped) - (uint32_t(127 - F::kBias) << F::kMantissa);
  if (magnitude < uint32_t(128 - F::kBias) << 23)
    code = bits_of(add(float_of(magnitude), float_of(kMagic))) - kMagic;
  set_code(finish_code<T>(code, x), to);
}

NF_DEVICE void narrow(float x, Float8E4M3& to) {
  narrow_to_fp8(x, to);
}
NF_DEVICE void narrow(float x, Float8E5M2& to) {
  narrow_to_fp8(x, to);
}
// By way of fp32, like every fp64 that is stored in less.
template <typename T>
NF_DEVICE void narrow(double x, T& to) {
  narrow(static_cast<float>(x), to);
}

// The bits below the last place plus as many random bits, the upper ones of a word, carry or not.
// Without branches: the values of a warp seldom agree on whether they become subnormal. In bf16,
// whose exponents are fp32's, subnormals are nothing special.
template <typename T>
NF_DEVICE void narrow_randomly(float x, uint32_t random, T& to) {
  using F = FormatOf<T>;
  uint32_t kept = bits_of(x) & 0x7FFFFFFFu, dropped = 23 - F::kMantissa;
  uint32_t rebias = uint32_t(127 - F::kBias) << F::kMantissa;
  if constexpr (F::kBias < 127) {
    const uint32_t field = kept >> 23;
    const bool small = kept < uint32_t(128 - F::kBias) << 23;
    const uint32_t significand = (kept & 0x7FFFFFu) | (field > 0 ? 0x800000u : 0u);
    const uint32_t deep = uint32_t(151 - F::kBias - F::kMantissa) - (field > 0 ? field : 1u);
    // Bits that cannot matter are dropped before: a shift by 32 or more has no value.
    const uint32_t excess = deep > 31u ? deep - 31u : 0u;
    kept = small ? significand >> (excess < 31u ? excess : 31u) : kept;
    dropped = small ? deep - excess : dropped;
    rebias = small ? 0u : rebias;
  }
  set_code(finish_code<T>(((kept + (random >> (32u - dropped))) >> dropped) - rebias, x), to);
}

struct Words {
  uint32_t word[4];
};

struct Product {
  uint32_t lower, upper;
};

// All 64 bits of a * b. In one instruction, which nvcc does not find for constants above 2^31.
NF_DEVICE Product multiply_wide(uint32_t a, uint32_t b) {
  Product product;
#ifdef __CUDA_ARCH__
  asm("{ .reg .b64 all; mul.wide.u32 all, %2, %3; mov.b64 {%0, %1}, all; }"
      : "=r"(product.lower), "=r"(product.upper)
      : "r"(a), "r"(b));
#else
  const uint64_t all = static_cast<uint64_t>(a) * b;
  product = {static_cast<uint32_t>(all), static_cast<uint32_t>(all >> 32)};
#endif
  return product;
}

// Salmon, Moraes, Dror, Shaw, SC 2011.
NF_DEVICE Words philox(uint64_t seed, Words c) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  NF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const Product left = multiply_wide(c.word[0], 0xD2511F53u);
    const Product right = multiply_wide(c.word[2], 0xCD9E8D57u);
    c = {{right.upper ^ c.word[1] ^ low, right.lower, left.upper ^ c.word[3] ^ high, left.lower}};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return c;
}

// The words of kLanes columns from `column` on, counted from the start of their segment: a multiple
// of kLanes or of 4.
template <int kLanes>
NF_DEVICE void random_words(uint64_t seed, int64_t column, int64_t segment, int64_t output,
                            uint32_t (&words)[kLanes]) {
  NF_UNROLL
  for (int lane = 0; lane < kLanes; lane += 4) {
    const uint64_t group = static_cast<uint64_t>(column + lane) / 4;
    const Words four =
        philox(seed, {{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32),
                       static_cast<uint32_t>(segment), static_cast<uint32_t>(output)}});
    NF_UNROLL
    for (int j = 0; j < 4 && lane + j < kLanes; ++j) {
      const int at = kLanes >= 4 ? j : static_cast<int>(column & 3) + j;
      words[lane + j] = at < 2 ? (at == 0 ? four.word[0] : four.word[1])
                               : (at == 2 ? four.word[2] : four.word[3]);
    }
  }
}

}  // namespace neulig_fast
