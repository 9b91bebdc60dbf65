// The inner loops of offset_gram.cpp: differences of a tile of columns, and their products.
// Built as in common/cpu_level.h; 16 lanes of fixed order at every level.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace neulig_fast {

constexpr int kLaneCount = 16;      // columns of one step, and partial sums of one block
constexpr int kGroup = 4;           // rows side by side: 10 products; AVX2 has 16 registers
constexpr int kOthers = 2;          // rows of another group against them: 8 products
constexpr int64_t kTileSteps = 32;  // 512 columns: 8 KB for N = 5
constexpr int64_t kTile = kTileSteps * kLaneCount;

template <typename A>
struct alignas(64) Lanes {
  A lane[kLaneCount];
};

template <int kLanes, typename A>
NF_INLINE void add_to(A* to, Vec<A, kLanes> values) {
  store<kLanes>(to, load<kLanes>(to) + values);
}

// Differences of up to kGroup rows to the first row over the columns of one tile, their sums and
// their products with each other.
template <typename T>
struct Triangle {
  using A = Acc<T>;
  const T* first;
  const T* x;      // first row of the group
  int64_t stride;  // elements from one row to the next
  int64_t steps;   // of kLaneCount columns
  int64_t ahead;   // columns from here to what is fetched into the cache meanwhile
  Lanes<A>* tile;  // written if kept: rows of `steps` differences, kTileSteps apart
  Lanes<A>* sums;  // one per row, added to
  Lanes<A>* products[kGroup][kGroup];  // added to
};

template <typename T, int kRows, bool kKeep>
struct TriangleOf {
  template <int kBytes>
  static NF_INLINE void run(const Triangle<T>& arguments) {
    const Triangle<T> t = arguments;  // a copy: stores to the tile cannot change it
    using A = Acc<T>;
    constexpr int kLanes = kBytes / sizeof(A), kParts = kLaneCount / kLanes;
    // Registers of a step that are summed in one pass over the tile. All of them would need too
    // many accumulators; one of few rows alone would leave too few in flight.
    constexpr int kTogether = kRows <= 2 && kParts > 1 ? 2 : 1;
    constexpr int kLineSteps = sizeof(T) == 2 ? 2 : 1;  // steps to a cache line, at least one
    for (int part = 0; part < kParts; part += kTogether) {
      Vec<A, kLanes> sums[kTogether][kRows] = {}, products[kTogether][kRows][kRows] = {};
#pragma GCC unroll 2
      for (int64_t step = 0; step < t.steps; ++step) {
#pragma GCC unroll 8
        for (int k = 0; k < kTogether; ++k) {
          // Each part fetches its share of the rows, so that memory is as busy in every pass.
          if (step % kLineSteps == 0)
            for (int i = part + k; i <= kRows; i += kParts)
              __builtin_prefetch((i == kRows ? t.first : t.x + i * t.stride) + step * kLaneCount +
                                 t.ahead);
          const int lane = (part + k) * kLanes;
          const auto first = load<kLanes>(t.first + step * kLaneCount + lane);
          Vec<A, kLanes> d[kRows];
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            d[i] = load<kLanes>(t.x + i * t.stride + step * kLaneCount + lane) - first;
            if (kKeep) store<kLanes>(t.tile[i * kTileSteps + step].lane + lane, d[i]);
            sums[k][i] = sums[k][i] + d[i];
          }
#pragma GCC unroll 8
          for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
            for (int i = 0; i <= j; ++i) products[k][i][j] = products[k][i][j] + d[i] * d[j];
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < kTogether; ++k) {
        const int lane = (part + k) * kLanes;
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j) {
          add_to<kLanes>(t.sums[j].lane + lane, sums[k][j]);
#pragma GCC unroll 8
          for (int i = 0; i <= j; ++i)
            add_to<kLanes>(t.products[i][j]->lane + lane, products[k][i][j]);
        }
      }
    }
  }
};

// Products of kGroup rows of a tile, from `a` on, with kOthers rows from `b` on.
template <typename A>
struct Rectangle {
  const Lanes<A>* a;
  const Lanes<A>* b;
  int64_t steps;
  Lanes<A>* products[kGroup][kOthers];  // added to
};

template <typename A, int kColumns>
struct RectangleOf {
  template <int kBytes>
  static NF_INLINE void run(const Rectangle<A>& r) {
    constexpr int kLanes = kBytes / sizeof(A);
    for (int lane = 0; lane < kLaneCount; lane += kLanes) {
      Vec<A, kLanes> products[kGroup][kColumns] = {};
      for (int64_t step = 0; step < r.steps; ++step) {
        Vec<A, kLanes> b[kColumns];
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j)
          b[j] = load<kLanes>(r.b[j * kTileSteps + step].lane + lane);
#pragma GCC unroll 8
        for (int i = 0; i < kGroup; ++i) {
          const auto a = load<kLanes>(r.a[i * kTileSteps + step].lane + lane);
#pragma GCC unroll 8
          for (int j = 0; j < kColumns; ++j) products[i][j] = products[i][j] + a * b[j];
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j)
          add_to<kLanes>(r.products[i][j]->lane + lane, products[i][j]);
    }
  }
};

template <typename T>
struct Kernels {
  using A = Acc<T>;
  KernelFn<Triangle<T>> triangle[2][kGroup];  // all rows there are, or kept; 1, 2, 3, 4 of them
  KernelFn<Rectangle<A>> rectangle[kOthers];  // 4 rows and 1, 2 others

  explicit Kernels(CpuLevel level)
      : triangle{{kernel_at<TriangleOf<T, 1, false>, Triangle<T>>(level),
                  kernel_at<TriangleOf<T, 2, false>, Triangle<T>>(level),
                  kernel_at<TriangleOf<T, 3, false>, Triangle<T>>(level),
                  kernel_at<TriangleOf<T, 4, false>, Triangle<T>>(level)},
                 {kernel_at<TriangleOf<T, 1, true>, Triangle<T>>(level),
                  kernel_at<TriangleOf<T, 2, true>, Triangle<T>>(level),
                  kernel_at<TriangleOf<T, 3, true>, Triangle<T>>(level),
                  kernel_at<TriangleOf<T, 4, true>, Triangle<T>>(level)}},
        rectangle{kernel_at<RectangleOf<A, 1>, Rectangle<A>>(level),
                  kernel_at<RectangleOf<A, 2>, Rectangle<A>>(level)} {}
};

}  // namespace neulig_fast
