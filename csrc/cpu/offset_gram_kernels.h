// The inner loops of offset_gram.cpp and gram.cpp: differences of a tile of columns, and their
// products. Built as in common/cpu_level.h; 16 lanes of fixed order at every level.
#pragma once

#include <cstdint>

#include "cpu/lane_sums.h"

namespace neulig_fast {

constexpr int kGroup = 4;           // rows side by side: 10 products; AVX2 has 16 registers
constexpr int kOthers = 2;          // rows of another group against them: 8 products
constexpr int64_t kTileSteps = 32;  // 512 columns: 8 KB for N = 5
constexpr int64_t kTile = kTileSteps * kLaneCount;

// What rows are differences from: the mean of all, by way of expert 0; a base; nothing.
enum class From { kMean, kBase, kZero };

// A tile of up to kGroup experts and the row they are differences from; x again where there is
// none.
template <typename T>
struct Tile {
  const T* first;
  const T* x;      // first expert of the group
  int64_t stride;  // elements from one expert to the next
  int64_t steps;   // of kLaneCount columns
  int64_t ahead;   // columns from here to what is fetched into the cache meanwhile

  // Fetches one step's columns of the rows `part`, `part` + parts, ...: each part of the lanes its
  // share, so that memory is as busy in every pass over the tile.
  NF_INLINE void fetch(int64_t step, int rows, int part, int parts) const {
    constexpr int kLineSteps = sizeof(T) == 2 ? 2 : 1;  // steps to a cache line, at least one
    if (step % kLineSteps != 0) return;
    for (int i = part; i <= rows; i += parts)
      __builtin_prefetch((i == rows ? first : x + i * stride) + step * kLaneCount + ahead);
  }
};

template <int kLanes, From kFrom, typename T>
NF_INLINE Vec<Acc<T>, kLanes> difference(const T* x, const T* first, int part) {
  const auto value = load_part<kLanes>(x, part);
  if constexpr (kFrom == From::kZero) return value;
  else return value - load_part<kLanes>(first, part);
}

// Products of kRows rows; of offsets from the mean also their sums, and expert 0 is no row.
template <typename T>
struct Few {
  using A = Acc<T>;
  Tile<T> tile;
  A share;                             // 1 / N
  Lanes<A>* sums;                      // one per row: added to
  Lanes<A>* products[kGroup][kGroup];  // added to
};

// One pass, although the sums do not all fit the registers: memory is busy all the time that way.
// It is not while a tile of differences is multiplied.
template <typename T, int kRows, From kFrom>
struct FewOf {
  template <int kBytes>
  static NF_INLINE void run(const Few<T>& few) {
    using A = Acc<T>;
    const Tile<T> t = few.tile;
    constexpr int kLanes = kBytes / sizeof(A), kParts = kLaneCount / kLanes;
    // Registers of a step that are summed in one pass over the tile. All of them would need too
    // many accumulators; one of few rows alone would leave too few in flight.
    constexpr int kTogether = kRows <= 2 && kParts > 1 ? 2 : 1;
    [[maybe_unused]] const auto share = Vec<A, kLanes>{} - few.share;
    for (int part = 0; part < kParts; part += kTogether) {
      Vec<A, kLanes> sums[kTogether][kRows] = {}, products[kTogether][kRows][kRows] = {};
#pragma GCC unroll 2
      for (int64_t step = 0; step < t.steps; ++step) {
#pragma GCC unroll 8
        for (int k = 0; k < kTogether; ++k) {
          t.fetch(step, kRows, part + k, kParts);
          const T* x = t.x + step * kLaneCount;
          const T* first = t.first + step * kLaneCount;
          Vec<A, kLanes> d[kRows];
          d[0] = difference<kLanes, kFrom>(x, first, part + k);
          [[maybe_unused]] auto total = d[0];
#pragma GCC unroll 8
          for (int i = 1; i < kRows; ++i) {
            d[i] = difference<kLanes, kFrom>(x + i * t.stride, first, part + k);
            if constexpr (kFrom == From::kMean) total = total + d[i];
          }
#pragma GCC unroll 8
          for (int j = 0; j < kRows; ++j) {
            if constexpr (kFrom == From::kMean) {
              d[j] = multiply_add<kLanes>(total, share, d[j]);
              sums[k][j] = sums[k][j] + d[j];
            }
#pragma GCC unroll 8
            for (int i = 0; i <= j; ++i)
              products[k][i][j] = multiply_add<kLanes>(d[i], d[j], products[k][i][j]);
          }
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < kTogether; ++k) {
        const int lane = (part + k) * kLanes;
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j) {
          if constexpr (kFrom == From::kMean) add_to<kLanes>(few.sums[j].lane + lane, sums[k][j]);
#pragma GCC unroll 8
          for (int i = 0; i <= j; ++i)
            add_to<kLanes>(few.products[i][j]->lane + lane, products[k][i][j]);
        }
      }
    }
  }
};

// Differences of a group of more experts.
template <typename T>
struct Differences {
  using A = Acc<T>;
  Tile<T> tile;
  Lanes<A>* rows;   // of `steps` differences, kTileSteps apart
  Lanes<A>* total;  // of the differences of all experts, if their mean is wanted: added to
};

template <typename T, int kRows, From kFrom>
struct DifferencesOf {
  template <int kBytes>
  static NF_INLINE void run(const Differences<T>& arguments) {
    const Differences<T> d = arguments;  // a copy: stores to the rows cannot change it
    const Tile<T>& t = d.tile;
    using A = Acc<T>;
    constexpr int kLanes = kBytes / sizeof(A), kParts = kLaneCount / kLanes;
    for (int part = 0; part < kParts; ++part) {
      const int lane = part * kLanes;
#pragma GCC unroll 2
      for (int64_t step = 0; step < t.steps; ++step) {
        t.fetch(step, kRows, part, kParts);
        const T* x = t.x + step * kLaneCount;
        const T* first = t.first + step * kLaneCount;
        Vec<A, kLanes> total = {};
        if constexpr (kFrom == From::kMean) total = load<kLanes>(d.total[step].lane + lane);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const auto row = difference<kLanes, kFrom>(x + i * t.stride, first, part);
          total = total + row;
          store<kLanes>(d.rows[i * kTileSteps + step].lane + lane, row);
        }
        if constexpr (kFrom == From::kMean) store<kLanes>(d.total[step].lane + lane, total);
      }
    }
  }
};

// Differences of a tile, one row per expert, zeros for the first, less their mean.
template <typename A>
struct Centring {
  Lanes<A>* tile;
  const Lanes<A>* total;
  int64_t rows, steps;
  A share;
  Lanes<A>* sums;  // of the offsets, one per row: added to
};

template <typename A>
struct CentringOf {
  template <int kBytes>
  static NF_INLINE void run(const Centring<A>& arguments) {
    const Centring<A> c = arguments;
    constexpr int kLanes = kBytes / sizeof(A), kParts = kLaneCount / kLanes;
    const auto share = Vec<A, kLanes>{} - c.share;
    for (int64_t i = 0; i < c.rows; ++i) {
      Vec<A, kLanes> sums[kParts] = {};
      for (int64_t step = 0; step < c.steps; ++step)
#pragma GCC unroll 8
        for (int part = 0; part < kParts; ++part) {
          A* d = c.tile[i * kTileSteps + step].lane + part * kLanes;
          const auto total = load<kLanes>(c.total[step].lane + part * kLanes);
          const auto offset = multiply_add<kLanes>(total, share, load<kLanes>(d));
          store<kLanes>(d, offset);
          sums[part] = sums[part] + offset;
        }
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part)
        add_to<kLanes>(c.sums[i].lane + part * kLanes, sums[part]);
    }
  }
};

// Products of rows of a tile, from `a` on, with each other (`b` is not read) or with those from `b`
// on. All accumulators stay in registers: one in memory would be waited for in every step.
template <typename A>
struct Products {
  const Lanes<A>* a;
  const Lanes<A>* b;
  int64_t steps;
  Lanes<A>* products[kGroup][kGroup];  // added to
};

template <typename A, int kRows>
struct TriangleOf {
  template <int kBytes>
  static NF_INLINE void run(const Products<A>& r) {
    constexpr int kLanes = kBytes / sizeof(A);
    // Registers of a step that are summed in one pass: few rows alone keep too few in flight.
    constexpr int kTogether = kRows <= 2 && kLanes < kLaneCount ? 2 : 1;
    for (int lane = 0; lane < kLaneCount; lane += kLanes * kTogether) {
      Vec<A, kLanes> products[kTogether][kRows][kRows] = {};
      for (int64_t step = 0; step < r.steps; ++step) {
#pragma GCC unroll 8
        for (int k = 0; k < kTogether; ++k) {
          Vec<A, kLanes> d[kRows];
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i)
            d[i] = load<kLanes>(r.a[i * kTileSteps + step].lane + lane + k * kLanes);
#pragma GCC unroll 8
          for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
            for (int i = 0; i <= j; ++i)
              products[k][i][j] = multiply_add<kLanes>(d[i], d[j], products[k][i][j]);
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < kTogether; ++k)
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
          for (int i = 0; i <= j; ++i)
            add_to<kLanes>(r.products[i][j]->lane + lane + k * kLanes, products[k][i][j]);
    }
  }
};

// kGroup rows with kColumns <= kOthers others.
template <typename A, int kColumns>
struct RectangleOf {
  template <int kBytes>
  static NF_INLINE void run(const Products<A>& r) {
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
          for (int j = 0; j < kColumns; ++j)
            products[i][j] = multiply_add<kLanes>(a, b[j], products[i][j]);
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

template <typename T, From kFrom>
struct Kernels {
  using A = Acc<T>;
  KernelFn<Few<T>> few[kGroup];  // of 1, 2, 3, 4 rows
  KernelFn<Differences<T>> differences[kGroup];
  KernelFn<Centring<A>> centring;
  KernelFn<Products<A>> triangle[kGroup];
  KernelFn<Products<A>> rectangle[kOthers];  // 4 rows and 1, 2 others

  explicit Kernels(CpuLevel level)
      : few{kernel_at<FewOf<T, 1, kFrom>, Few<T>>(level),
            kernel_at<FewOf<T, 2, kFrom>, Few<T>>(level),
            kernel_at<FewOf<T, 3, kFrom>, Few<T>>(level),
            kernel_at<FewOf<T, 4, kFrom>, Few<T>>(level)},
        differences{kernel_at<DifferencesOf<T, 1, kFrom>, Differences<T>>(level),
                    kernel_at<DifferencesOf<T, 2, kFrom>, Differences<T>>(level),
                    kernel_at<DifferencesOf<T, 3, kFrom>, Differences<T>>(level),
                    kernel_at<DifferencesOf<T, 4, kFrom>, Differences<T>>(level)},
        centring{kernel_at<CentringOf<A>, Centring<A>>(level)},
        triangle{kernel_at<TriangleOf<A, 1>, Products<A>>(level),
                 kernel_at<TriangleOf<A, 2>, Products<A>>(level),
                 kernel_at<TriangleOf<A, 3>, Products<A>>(level),
                 kernel_at<TriangleOf<A, 4>, Products<A>>(level)},
        rectangle{kernel_at<RectangleOf<A, 1>, Products<A>>(level),
                  kernel_at<RectangleOf<A, 2>, Products<A>>(level)} {}
};

}  // namespace neulig_fast
