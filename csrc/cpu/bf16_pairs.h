// Columns of bf16 in pairs of registers, even ones and odd ones: words are taken apart and put
// together in fewer instructions than halves of registers are widened and narrowed. No torch
// headers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/rounding.h"

namespace neulig_fast {

// The lower half of a word is the even column.
constexpr bool kHasPairs = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

template <int kLanes>
NF_INLINE void load_pair(const BFloat16* from, Vec<float, kLanes>& even, Vec<float, kLanes>& odd) {
  const auto words = load_bits<Vec<uint32_t, kLanes>>(from);
  even = (Vec<float, kLanes>)(words << 16);
  odd = (Vec<float, kLanes>)(words & 0xFFFF0000u);
}

// The upper half of a word is the value in bf16, as store() has it.
template <int kLanes>
NF_INLINE Vec<uint32_t, kLanes> rounded_bf16(Vec<float, kLanes> v) {
  using U = Vec<uint32_t, kLanes>;
  const U bits = (U)v, nan = U{} + 0x7FC00000u;
  return choose<U>((U)(v != v), nan, bits + 0x7FFFu + ((bits >> 16) & 1u));
}

template <int kLanes>
NF_INLINE void store_pair(BFloat16* to, Vec<float, kLanes> even, Vec<float, kLanes> odd) {
  const auto upper = rounded_bf16<kLanes>(odd) & 0xFFFF0000u;
  const auto words = (rounded_bf16<kLanes>(even) >> 16) | upper;
  std::memcpy(to, &words, sizeof words);
}

}  // namespace neulig_fast
