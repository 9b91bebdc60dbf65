// The inner loops of offset_gram.cpp: differences of a tile of columns, and their products.
// Built as in common/cpu_level.h; 16 lanes of fixed order at every level.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace neulig_fast {

constexpr int kLaneCount = 16;  // columns of one step, and partial sums of one block
constexpr int kGroup = 4;  // rows side by side: 10 products of one group, 8 of two, 16 registers
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

// Differences of up to kGroup rows to the first, over the columns of one tile.
template <typename T>
struct Subtract {
  const T* first;
  const T* x;           // first row of the group
  int64_t stride;       // elements from one row to the next
  Lanes<Acc<T>>* tile;  // rows of `steps` lanes, kTileSteps apart
  Lanes<Acc<T>>* sums;  // one per row, added to
  int64_t steps;        // of kLaneCount columns
  int64_t ahead;        // columns from here to what is fetched into the cache meanwhile
};

template <typename T, int kRows>
struct SubtractRows {
  template <int kBytes>
  static NF_INLINE void run(const Subtract<T>& arguments) {
    const Subtract<T> s = arguments;  // a copy: stores to the tile cannot change it
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    constexpr int kParts = kLaneCount / kLanes;
    Vec<Acc<T>, kLanes> sums[kRows][kParts] = {};
    for (int64_t step = 0; step < s.steps; ++step) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
        __builtin_prefetch(s.x + i * s.stride + step * kLaneCount + s.ahead);
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = step * kLaneCount + part * kLanes;
        const auto first = load<kLanes>(s.first + at);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const auto difference = load<kLanes>(s.x + i * s.stride + at) - first;
          sums[i][part] = sums[i][part] + difference;
          store<kLanes>(s.tile[i * kTileSteps + step].lane + part * kLanes, difference);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part)
        add_to<kLanes>(s.sums[i].lane + part * kLanes, sums[i][part]);
  }
};

// Products of the rows of a tile: kRows rows from `a` on with each other, or with kOthers from `b`.
template <typename A>
struct Multiply {
  const Lanes<A>* a;
  const Lanes<A>* b;
  Lanes<A>* products[kGroup][kGroup];  // added to
  int64_t steps;
};

template <typename A, int kRows, int kOthers>
struct MultiplyRows {
  static constexpr bool kTriangle = kOthers == 0;
  static constexpr int kColumns = kTriangle ? kRows : kOthers;

  template <int kBytes>
  static NF_INLINE void run(const Multiply<A>& m) {
    constexpr int kLanes = kBytes / sizeof(A);
    // The lanes of a register after those of another: twice as many accumulators would not fit.
    for (int lane = 0; lane < kLaneCount; lane += kLanes) {
      Vec<A, kLanes> sums[kRows][kColumns] = {};
      for (int64_t step = 0; step < m.steps; ++step) {
        Vec<A, kLanes> a[kRows];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) a[i] = load<kLanes>(m.a[i * kTileSteps + step].lane + lane);
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) {
          const auto b = kTriangle ? a[j] : load<kLanes>(m.b[j * kTileSteps + step].lane + lane);
#pragma GCC unroll 8
          for (int i = 0; i < (kTriangle ? j + 1 : kRows); ++i) sums[i][j] = sums[i][j] + a[i] * b;
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 8
        for (int i = 0; i < (kTriangle ? j + 1 : kRows); ++i)
          add_to<kLanes>(m.products[i][j]->lane + lane, sums[i][j]);
    }
  }
};

template <typename T>
struct Kernels {
  using A = Acc<T>;
  KernelFn<Subtract<T>> subtract[kGroup];  // 1, 2, 3, 4 rows
  KernelFn<Multiply<A>> triangle[kGroup];  // 1, 2, 3, 4 rows
  KernelFn<Multiply<A>> rectangle[2];      // 4 rows and 1, 2 others

  explicit Kernels(CpuLevel level)
      : subtract{kernel_at<SubtractRows<T, 1>, Subtract<T>>(level),
                 kernel_at<SubtractRows<T, 2>, Subtract<T>>(level),
                 kernel_at<SubtractRows<T, 3>, Subtract<T>>(level),
                 kernel_at<SubtractRows<T, 4>, Subtract<T>>(level)},
        triangle{kernel_at<MultiplyRows<A, 1, 0>, Multiply<A>>(level),
                 kernel_at<MultiplyRows<A, 2, 0>, Multiply<A>>(level),
                 kernel_at<MultiplyRows<A, 3, 0>, Multiply<A>>(level),
                 kernel_at<MultiplyRows<A, 4, 0>, Multiply<A>>(level)},
        rectangle{kernel_at<MultiplyRows<A, 4, 1>, Multiply<A>>(level),
                  kernel_at<MultiplyRows<A, 4, 2>, Multiply<A>>(level)} {}
};

}  // namespace neulig_fast
