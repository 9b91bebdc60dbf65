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

// Vector number `part` of the 16 columns at p.
template <int kLanes, typename T>
NF_INLINE Vec<Acc<T>, kLanes> load_part(const T* p, int part) {
  return load<kLanes>(p + part * kLanes);
}

// bf16: even columns before odd ones, at every level. A word holds two, and a shift or a mask is
// less work than spreading eight of them over a register, which took a quarter of the time.
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

// Differences of up to kGroup experts to the first one over the columns of a tile.
template <typename T>
struct Differences {
  using A = Acc<T>;
  const T* first;
  const T* x;       // first expert of the group
  int64_t stride;   // elements from one expert to the next
  int64_t steps;    // of kLaneCount columns
  int64_t ahead;    // columns from here to what is fetched into the cache meanwhile
  A share;          // 1 / N
  Lanes<A>* tile;   // rows of `steps` differences, kTileSteps apart
  Lanes<A>* total;  // of the differences of all experts: added to, unless these are all
  Lanes<A>* sums;   // of the offsets, if these are all: one per row, added to
};

// kAll: there are no other experts, so that the tile gets offsets, and nothing is left to do.
template <typename T, int kRows, bool kAll>
struct DifferencesOf {
  template <int kBytes>
  static NF_INLINE void run(const Differences<T>& arguments) {
    const Differences<T> t = arguments;  // a copy: stores to the tile cannot change it
    using A = Acc<T>;
    constexpr int kLanes = kBytes / sizeof(A), kParts = kLaneCount / kLanes;
    constexpr int kLineSteps = sizeof(T) == 2 ? 2 : 1;  // steps to a cache line, at least one
    const auto share = Vec<A, kLanes>{} - t.share;
    for (int part = 0; part < kParts; ++part) {
      Vec<A, kLanes> sums[kRows] = {};
#pragma GCC unroll 2
      for (int64_t step = 0; step < t.steps; ++step) {
        // Each part fetches its share of the rows, so that memory is as busy in every pass.
        if (step % kLineSteps == 0)
          for (int i = part; i <= kRows; i += kParts)
            __builtin_prefetch((i == kRows ? t.first : t.x + i * t.stride) + step * kLaneCount +
                               t.ahead);
        const int lane = part * kLanes;
        const T* x = t.x + step * kLaneCount;
        const auto first = load_part<kLanes>(t.first + step * kLaneCount, part);
        Vec<A, kLanes> d[kRows], total = {};
        if (!kAll) total = load<kLanes>(t.total[step].lane + lane);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          d[i] = load_part<kLanes>(x + i * t.stride, part) - first;
          total = kAll && i == 0 ? d[i] : total + d[i];
        }
        if (!kAll) store<kLanes>(t.total[step].lane + lane, total);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          if (kAll) d[i] = multiply_add<kLanes>(total, share, d[i]);
          if (kAll) sums[i] = sums[i] + d[i];
          store<kLanes>(t.tile[i * kTileSteps + step].lane + lane, d[i]);
        }
      }
      if (!kAll) continue;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) add_to<kLanes>(t.sums[i].lane + part * kLanes, sums[i]);
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

template <typename T>
struct Kernels {
  using A = Acc<T>;
  KernelFn<Differences<T>> differences[2][kGroup];  // of some rows, of all; 1, 2, 3, 4 of them
  KernelFn<Centring<A>> centring;
  KernelFn<Products<A>> triangle[kGroup];
  KernelFn<Products<A>> rectangle[kOthers];  // 4 rows and 1, 2 others

  explicit Kernels(CpuLevel level)
      : differences{{kernel_at<DifferencesOf<T, 1, false>, Differences<T>>(level),
                     kernel_at<DifferencesOf<T, 2, false>, Differences<T>>(level),
                     kernel_at<DifferencesOf<T, 3, false>, Differences<T>>(level),
                     kernel_at<DifferencesOf<T, 4, false>, Differences<T>>(level)},
                    {kernel_at<DifferencesOf<T, 1, true>, Differences<T>>(level),
                     kernel_at<DifferencesOf<T, 2, true>, Differences<T>>(level),
                     kernel_at<DifferencesOf<T, 3, true>, Differences<T>>(level),
                     kernel_at<DifferencesOf<T, 4, true>, Differences<T>>(level)}},
        centring{kernel_at<CentringOf<A>, Centring<A>>(level)},
        triangle{kernel_at<TriangleOf<A, 1>, Products<A>>(level),
                 kernel_at<TriangleOf<A, 2>, Products<A>>(level),
                 kernel_at<TriangleOf<A, 3>, Products<A>>(level),
                 kernel_at<TriangleOf<A, 4>, Products<A>>(level)},
        rectangle{kernel_at<RectangleOf<A, 1>, Products<A>>(level),
                  kernel_at<RectangleOf<A, 2>, Products<A>>(level)} {}
};

}  // namespace neulig_fast
