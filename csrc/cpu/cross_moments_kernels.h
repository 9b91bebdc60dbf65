// What cross_moments does with blocks of rows in cache: take them in, shift them, multiply them.
//
// A block holds up to kBlockRows rows of kUnits units in the accumulation type, in panels
// [row][unit] as wide as two vector registers; units past the last one are zeros. Both factors of a
// product have this form: one is read in vectors, the other a number at a time. No torch headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/layer_tiles.h"

namespace neulig_fast {

constexpr int64_t kUnits = 32;       // whole panels at every level, in fp32 and in fp64
constexpr int64_t kBlockRows = 128;  // two AVX2 panels of them fill half of a first-level cache

// Some rows, one stride apart, of up to kUnits units to where they belong in a block.
template <typename T>
struct TakeRows {
  using A = Acc<T>;

  const T* from;  // first row, first unit
  int64_t row_stride, unit_stride;
  int64_t rows, units;
  A* block;
  int64_t begin, block_rows;  // which of the block's rows they are from; how many it has

  template <int kBytes>
  static NF_INLINE void run(const TakeRows& args) {
    constexpr int kWidth = kPanelWidth<kBytes, A>;
    for (int64_t u = 0; u < kUnits; u += kWidth) {
      TakeRows panel = args;
      panel.from += u * args.unit_stride;
      panel.block += u * args.block_rows + args.begin * kWidth;
      panel.units = std::clamp<int64_t>(args.units - u, 0, kWidth);
      const bool whole = panel.units == kWidth;
      if (whole && args.unit_stride == 1) panel.template copy<kWidth>();
      else if (whole && args.row_stride == 1) panel.template turn<kBytes, kWidth>();
      else panel.template gather<kWidth>(0);
    }
  }

  template <int kWidth>
  NF_INLINE void copy() const {
    constexpr int kLanes = kWidth / 2;
    for (int64_t r = 0; r < rows; ++r) {
      store<kLanes>(block + r * kWidth, load<kLanes>(from + r * row_stride));
      store<kLanes>(block + r * kWidth + kLanes, load<kLanes>(from + r * row_stride + kLanes));
    }
  }

  // Channels of an image, whose positions are rows: squares of lanes are transposed.
  template <int kBytes, int kWidth>
  NF_INLINE void turn() const {
    constexpr int kSide = std::min(kBytes, 32) / sizeof(A);
    int64_t r = 0;
    for (; r + kSide <= rows; r += kSide)
      for (int u = 0; u < kWidth; u += kSide) {
        Vec<A, kSide> square[kSide];
#pragma GCC unroll 8
        for (int k = 0; k < kSide; ++k) square[k] = load<kSide>(from + (u + k) * unit_stride + r);
        transpose(square);
#pragma GCC unroll 8
        for (int k = 0; k < kSide; ++k) store<kSide>(block + (r + k) * kWidth + u, square[k]);
      }
    gather<kWidth>(r);
  }

  template <int kWidth>
  NF_INLINE void gather(int64_t first) const {
    for (int64_t r = first; r < rows; ++r)
      for (int64_t u = 0; u < kWidth; ++u)
        block[r * kWidth + u] =
            u < units ? load<1>(from + r * row_stride + u * unit_stride)[0] : A(0);
  }
};

// Subtracts kUnits numbers from the rows of a block; adds its columns, and their squares, to
// totals.
template <typename A>
struct ShiftBlock {
  A* block;
  int64_t rows;
  const A* shift;
  double *sums, *squares;

  template <int kBytes>
  static NF_INLINE void run(const ShiftBlock& args) {
    constexpr int kLanes = kBytes / sizeof(A);
    constexpr int kWidth = kPanelWidth<kBytes, A>;
    for (int64_t u = 0; u < kUnits; u += kLanes) {
      const auto shift = load<kLanes>(args.shift + u);
      Vec<A, kLanes> sum = {}, square = {};
      A* at = args.block + u / kWidth * kWidth * args.rows + u % kWidth;
      for (int64_t r = 0; r < args.rows; ++r, at += kWidth) {
        const auto value = load<kLanes>(at) - shift;
        store<kLanes>(at, value);
        sum += value;
        square += value * value;
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        args.sums[u + lane] += sum[lane];
        args.squares[u + lane] += square[lane];
      }
    }
  }
};

// sums (kUnits, kUnits) += x' y of two blocks of as many rows; their product is summed apart first.
template <typename A>
struct MultiplyBlocks {
  const A *x, *y;
  int64_t rows;
  A* sums;

  template <int kBytes>
  static NF_INLINE void run(const MultiplyBlocks& args) {
    constexpr int kWidth = kPanelWidth<kBytes, A>;
    constexpr int kMost = kBytes == 64 ? 12 : 6;  // twice as many sums, and three registers, fit
    constexpr int kGroups = (kWidth + kMost - 1) / kMost;
    for (int64_t v = 0; v < kUnits; v += kWidth)
      for (int64_t u = 0; u < kUnits; u += kWidth) {
        const MultiplyBlocks panels = {args.x + u * args.rows, args.y + v * args.rows, args.rows,
                                       args.sums + u * kUnits + v};
        panels.template all<kBytes, kGroups>(std::make_integer_sequence<int, kGroups>());
      }
  }

  // Groups of units of x differ by one at most: none wastes its registers on a few.
  template <int kBytes, int kGroups, int... kGroup>
  NF_INLINE void all(std::integer_sequence<int, kGroup...>) const {
    constexpr int kWidth = kPanelWidth<kBytes, A>;
    (group<kBytes, kWidth * kGroup / kGroups, kWidth*(kGroup + 1) / kGroups>(), ...);
  }

  template <int kBytes, int kBegin, int kEnd>
  NF_INLINE void group() const {
    constexpr int kCount = kEnd - kBegin, kLanes = kBytes / sizeof(A);
    using V = Vec<A, kLanes>;
    V sum[kCount][2] = {};
    const A *from = x + kBegin, *panel = y;
    for (int64_t r = 0; r < rows; ++r, from += 2 * kLanes, panel += 2 * kLanes) {
      const V left = load<kLanes>(panel), right = load<kLanes>(panel + kLanes);
#pragma GCC unroll 12
      for (int k = 0; k < kCount; ++k) {
        const V value = broadcast<kBytes, V>(from[k]);
        sum[k][0] = product_sum<kBytes>(value, left, sum[k][0]);
        sum[k][1] = product_sum<kBytes>(value, right, sum[k][1]);
      }
    }
    A* to = sums + kBegin * kUnits;
#pragma GCC unroll 12
    for (int k = 0; k < kCount; ++k, to += kUnits) {
      store<kLanes>(to, load<kLanes>(to) + sum[k][0]);
      store<kLanes>(to + kLanes, load<kLanes>(to + kLanes) + sum[k][1]);
    }
  }
};

}  // namespace neulig_fast
