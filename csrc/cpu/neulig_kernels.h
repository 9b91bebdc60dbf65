// The inner loops over a row's columns that NeuLig's ops share, compiled for every instruction
// level.
//
// Columns come in steps of 16. A sum over columns has 16 lanes, column modulo 16, whatever the
// width of a vector, so that every level gives the same bits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/vector_math.h"

namespace neulig_fast {

constexpr int kStep = 16;   // columns of a step, and lanes of a sum
constexpr int kBlock = 16;  // samples whose rows stay in the cache from their logits to dW
constexpr int kMaxExperts = 64;
constexpr double kEntropyEpsilon = 1e-6;  // as in neulig_fast/ops/neulig_loss_backward.py
constexpr int kMaxRows = 6;               // rows that one kernel handles side by side

inline int64_t whole_steps(int64_t columns) {
  return (columns + kStep - 1) / kStep * kStep;
}

// The value at p in all lanes. In assembly: gcc 12 puts `V{*p, *p, ...}` together lane by lane.
template <int kLanes, typename A>
NF_INLINE Vec<A, kLanes> broadcast(const A* p) {
  Vec<A, kLanes> v;
#ifdef NF_HAVE_LEVELS
  if constexpr (sizeof v >= 32) {
    if constexpr (sizeof(A) == 4) asm("vbroadcastss %1, %0" : "=v"(v) : "m"(*p));
    else asm("vbroadcastsd %1, %0" : "=v"(v) : "m"(*p));
    return v;
  }
#endif
  for (int k = 0; k < kLanes; ++k) v[k] = *p;
  return v;
}

// By halves: lanes k and k + 8, then k and k + 4, …
template <typename A>
NF_INLINE A sum_lanes(const A* lanes) {
  A sum[kStep / 2];
  for (int k = 0; k < kStep / 2; ++k) sum[k] = lanes[k] + lanes[k + kStep / 2];
  for (int half = kStep / 4; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sum[k] = sum[k] + sum[k + half];
  return sum[0];
}

// Rows of x side by side, a divisor of kBlock: with up to 6 rows of w their sums fit 16 registers,
// and with fewer they still are enough to hide latencies.
constexpr int rows_together(int rows) {
  return rows <= 2 ? 8 / rows : 2;
}

// lanes[s, i] (+)= x_s * w_i over columns, lane by lane. Rows come from memory in pieces that are
// too short for the hardware's own prefetching: the next rows' piece is fetched meanwhile.
template <typename T>
struct RowDots {
  const T* const* x;   // rows, readable also beyond `count` up to a multiple of kBlock
  const Acc<T>* w;     // row 0
  int64_t stride;      // from a row of w to the next
  int64_t columns;     // a multiple of kStep
  Acc<T>* lanes;       // (count, ., kStep), row 0; as many as x has
  int64_t lanes_step;  // from a row of x to the next
  int64_t count;
  bool first;  // nothing is there to add to
};

// All lanes of a few rows before the next rows: their piece stays in the first-level cache.
template <typename T, int kRows>
struct Dots {
  template <int kBytes>
  static NF_INLINE void run(const RowDots<T>& d) {
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    for (int64_t s = 0; s < d.count; s += rows_together(kRows))
      for (int part = 0; part < kStep; part += kLanes) rows<kLanes>(d, s, part);
  }

  template <int kLanes>
  static NF_INLINE void rows(const RowDots<T>& d, int64_t s, int part) {
    using A = Acc<T>;
    constexpr int kSide = rows_together(kRows);
    A* lanes = d.lanes + s * d.lanes_step + part;
    Vec<A, kLanes> sum[kSide][kRows] = {};
    const T *x[kSide], *ahead[kSide];
#pragma GCC unroll 8
    for (int j = 0; j < kSide; ++j) {
      x[j] = d.x[s + j];
      ahead[j] = s + kSide < d.count ? d.x[s + kSide + j] : d.x[j] + d.columns;
      if (!d.first)
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
          sum[j][i] = load<kLanes>(lanes + j * d.lanes_step + i * kStep);
    }
    for (int64_t p = part; p < d.columns; p += kStep) {
      Vec<A, kLanes> z[kSide];
#pragma GCC unroll 8
      for (int j = 0; j < kSide; ++j) {
        if (part == 0) __builtin_prefetch(ahead[j] + p);
        z[j] = load<kLanes>(x[j] + p);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const auto w = load<kLanes>(d.w + i * d.stride + p);
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j) sum[j][i] = multiply_add<kLanes>(z[j], w, sum[j][i]);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kSide; ++j)
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
        store<kLanes>(lanes + j * d.lanes_step + i * kStep, sum[j][i]);
  }
};

// sums[i] (+)= sum_s c[s, i] x_s, in the order of s.
template <typename T>
struct OuterSums {
  const T* const* x;
  const Acc<T>* c;  // (count, .), row 0
  int64_t c_step;   // from one x to the next
  int64_t count;
  Acc<T>* sums;  // row 0
  int64_t stride;
  int64_t columns;  // a multiple of kStep
  bool first;       // nothing is there to add to
};

template <typename T, int kRows>
struct Outer {
  template <int kBytes>
  static NF_INLINE void run(const OuterSums<T>& o) {
    using A = Acc<T>;
    constexpr int kLanes = kBytes / sizeof(A);
    constexpr int kVectors = kLanes == kStep ? 1 : 2;  // whole cache lines of fp32, 12 sums at most
    for (int64_t p = 0; p < o.columns; p += kVectors * kLanes) {
      Vec<A, kLanes> sum[kRows][kVectors] = {};
      if (!o.first)
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v)
            sum[i][v] = load<kLanes>(o.sums + i * o.stride + p + v * kLanes);
      for (int64_t s = 0; s < o.count; ++s) {
        Vec<A, kLanes> z[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) z[v] = load<kLanes>(o.x[s] + p + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const auto c = broadcast<kLanes>(o.c + s * o.c_step + i);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add<kLanes>(z[v], c, sum[i][v]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          store<kLanes>(o.sums + i * o.stride + p + v * kLanes, sum[i][v]);
    }
  }
};

// x = e^x for x <= 0, in place.
template <typename A>
struct Exponents {
  A* x;
  int64_t count;  // a multiple of kStep
};

template <typename A>
struct Exp {
  template <int kBytes>
  static NF_INLINE void run(const Exponents<A>& e) {
    constexpr int kLanes = kBytes / sizeof(A);
    for (int64_t p = 0; p < e.count; p += kLanes)
      store<kLanes>(e.x + p, exp_nonpositive<kLanes>(load<kLanes>(e.x + p)));
  }
};

}  // namespace neulig_fast
