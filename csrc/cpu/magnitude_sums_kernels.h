// The inner loop of magnitude_sums.cpp: sums of |d| over whole steps of columns between which no
// bound changes, with and without what is dropped. 16 lanes of fixed order. No torch headers.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/vector_math.h"
#include "cpu/draw_columns.h"
#include "cpu/lane_sums.h"

namespace neulig_fast {

template <typename T>
struct SumCall {
  using A = Acc<T>;
  const T *x, *base;
  const uint16_t* drawn;  // 0xFFFF where a draw keeps a column, else 0; null: no draws
  A lower, upper;         // dropped: |d| <= lower and |d| > upper; NaN drops nothing
  int64_t steps;
  Lanes<A>*before, *after;  // added to
};

// Vector number `part` of the masks of 16 columns, in the order of load_part: all bits or none.
template <typename T, int kLanes>
NF_INLINE Vec<Bits<Acc<T>>, kLanes> drawn_part(const uint16_t* p, int part) {
  using A = Acc<T>;
  using S = Vec<SignedBits<A>, kLanes>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr int kWords = kLaneCount / 2;
    if constexpr (kLanes > kWords) {
      const auto words = load_bits<Vec<int32_t, kWords>>(p);
      return (Vec<uint32_t, kLanes>)__builtin_shufflevector(
          words << 16 >> 16, words >> 16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    } else {
      constexpr int kLoads = kWords / kLanes;
      const auto words = load_bits<S>(p + part % kLoads * 2 * kLanes);
      return (Vec<uint32_t, kLanes>)(part < kLoads ? words << 16 >> 16 : words >> 16);
    }
  } else {
    return load_drawn<A>(p + part * kLanes, std::make_integer_sequence<int, kLanes>());
  }
}

template <typename T, bool kBounds, bool kDrawn>
struct MagnitudeSums {
  using A = Acc<T>;

  template <int kBytes>
  static NF_INLINE void run(const SumCall<T>& args) {
    const SumCall<T> call = args;
    constexpr int kLanes = kBytes / sizeof(A), kParts = kLaneCount / kLanes;
    using V = Vec<A, kLanes>;
    using U = Vec<Bits<A>, kLanes>;
    V before[kParts], after[kParts];
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      before[part] = load<kLanes>(call.before->lane + part * kLanes);
      after[part] = load<kLanes>(call.after->lane + part * kLanes);
    }
    for (int64_t p = 0; p < call.steps * kLaneCount; p += kLaneCount) {
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const V d = load_part<kLanes>(call.x + p, part) - load_part<kLanes>(call.base + p, part);
        const V magnitude = (V)((U)d & ~(U{} + (Bits<A>(1) << (8 * sizeof(A) - 1))));
        U kept = ~U{};
        if constexpr (kDrawn) kept = drawn_part<T, kLanes>(call.drawn + p, part);
        if constexpr (kBounds)
          kept &= ~((U)(magnitude <= call.lower) | (U)(magnitude > call.upper));
        before[part] = before[part] + magnitude;
        after[part] = after[part] + (V)((U)magnitude & kept);
      }
    }
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      store<kLanes>(call.before->lane + part * kLanes, before[part]);
      store<kLanes>(call.after->lane + part * kLanes, after[part]);
    }
  }
};

}  // namespace neulig_fast
