// Sums in 16 lanes of fixed order, columns modulo 16, at every instruction set. No torch headers.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace neulig_fast {

constexpr int kLaneCount = 16;  // columns of one step, and partial sums of one block

template <typename A>
struct alignas(64) Lanes {
  A lane[kLaneCount];
};

template <int kLanes, typename A>
NF_INLINE void add_to(A* to, Vec<A, kLanes> values) {
  store<kLanes>(to, load<kLanes>(to) + values);
}

// Vector number `part` of the 16 columns at p.
template <int kLanes, typename T>
NF_INLINE Vec<Acc<T>, kLanes> load_part(const T* p, int part) {
  return load<kLanes>(p + part * kLanes);
}

// bf16: even columns before odd ones, at every level. A word holds two, and a shift or a mask is
// less work than spreading eight of them over a register.
template <int kLanes>
NF_INLINE Vec<float, kLanes> load_part(const BFloat16* p, int part) {
  constexpr int kWords = kLaneCount / 2;
  if constexpr (kLanes > kWords) {
    const auto words = load_bits<Vec<uint32_t, kWords>>(p);
    return (Vec<float, kLanes>)__builtin_shufflevector(words << 16, words & 0xFFFF0000u, 0, 1, 2, 3,
                                                       4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  } else {
    constexpr int kLoads = kWords / kLanes;
    const auto words = load_bits<Vec<uint32_t, kLanes>>(p + part % kLoads * 2 * kLanes);
    return (Vec<float, kLanes>)(part < kLoads ? words << 16 : words & 0xFFFF0000u);
  }
}

}  // namespace neulig_fast
