// Totals of offset_gram and gram: sums over rows' columns and over their products, in items. No
// torch headers but those of common/parallel.h.
//
// Few rows: differences in registers, and multiplied there. More: per tile of 512 columns, kept in
// the L1 cache while the next one comes from memory; then the products of four rows at a time with
// each other and with two of the others. Each row is read once from memory, however many there are.
//
// In a fixed order: blocks of 4096 columns counted from the segment's start; in each, 16 lanes
// (columns modulo 16) summed tile by tile in the accumulation type, products by fused
// multiplications and additions; blocks are added lane by lane, then lanes and items of 16 blocks,
// each in order, in fp64. The bits do not depend on threads or instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/offsets.h"
#include "common/parallel.h"
#include "common/segments.h"
#include "cpu/offset_gram_kernels.h"

namespace neulig_fast {

constexpr int64_t kBlock = 4096;
constexpr int64_t kItem = 16 * kBlock;  // columns a thread takes at a time

// Of totals, as common/offsets.h has them: where few experts are differences from their mean,
// number 0 is left out.
inline int64_t rows_of(int64_t experts, From from) {
  return from == From::kMean && experts - 1 <= kGroup ? experts - 1 : experts;
}

// Experts, one row each, and the row that they are differences from; that of expert 0 for a mean.
template <typename T>
struct Arena {
  const T *params, *first;
  int64_t stride, experts, columns;
};

// What one item is computed in; totals as in common/offsets.h, sums of nothing but offsets.
template <typename T, From kFrom>
class Accumulation {
  using A = Acc<T>;

 public:
  Accumulation(const Arena<T>& arena, const Kernels<T, kFrom>& kernels)
      : arena_(arena),
        columns_(arena.columns),
        experts_(arena.experts),
        rows_(rows_of(arena.experts, kFrom)),
        share_(A{1} / static_cast<A>(arena.experts)),
        kernels_(kernels),
        tile_(few() ? 0 : rows_ * kTileSteps),
        total_(few() ? 0 : kTileSteps),
        block_(count_totals(rows_)),
        totals_(count_totals(rows_)) {}

  // totals (entries,), over all columns of an item.
  void run(const Item& item, double* totals) {
    for (int64_t begin = item.begin; begin < item.end; begin += kBlock)
      add_block(begin, std::min(begin + kBlock, item.end));
    for (const Lanes<double>& lanes : totals_) {
      double sum = 0;
      for (const double value : lanes.lane) sum += value;
      *totals++ = sum;
    }
  }

 private:
  static constexpr int64_t kFirst = kFrom == From::kMean ? 1 : 0;  // of a group's experts

  // Whether one group is all.
  bool few() const {
    return rows_ <= kGroup && rows_ == experts_ - kFirst;
  }

  void add_block(int64_t begin, int64_t end) {
    std::fill(block_.begin(), block_.end(), Lanes<A>{});
    for (int64_t p = begin; p < end; p += kTile) {
      if (few()) add_few(p, std::min(kTile, end - p));
      else add_many(p, std::min(kTile, end - p));
    }
    for (size_t entry = 0; entry < block_.size(); ++entry)
      for (int lane = 0; lane < kLaneCount; ++lane)
        totals_[entry].lane[lane] += block_[entry].lane[lane];
  }

  // Calls add(tile, first step) for the whole steps of a tile of `count` experts from expert i on,
  // and for what is left, fewer columns than a step, on zero-padded copies.
  template <typename Add>
  void for_steps(int64_t i, int64_t count, int64_t begin, int64_t columns, const Add& add) {
    const int64_t steps = columns / kLaneCount, rest = columns % kLaneCount;
    const int64_t ahead = begin + 2 * kTile <= columns_ ? kTile : 0;
    const T *first = arena_.first + begin, *x = arena_.params + i * arena_.stride + begin;
    if (steps > 0) add(Tile<T>{first, x, arena_.stride, steps, ahead}, int64_t{0});
    if (rest == 0) return;
    const int64_t done = steps * kLaneCount;
    alignas(64) T padded[kGroup + 1][kLaneCount] = {};
    std::memcpy(padded[0], first + done, rest * sizeof(T));
    for (int64_t row = 0; row < count; ++row)
      std::memcpy(padded[row + 1], x + row * arena_.stride + done, rest * sizeof(T));
    add(Tile<T>{padded[0], padded[1], kLaneCount, 1, 0}, steps);
  }

  void add_few(int64_t begin, int64_t columns) {
    if (rows_ == 0) return;
    Few<T> call{{}, share_, block_.data(), {}};
    for (int64_t j = 0; j < rows_; ++j)
      for (int64_t i = 0; i <= j; ++i) call.products[i][j] = &block_[product_index(rows_, i, j)];
    for_steps(kFirst, rows_, begin, columns, [&](const Tile<T>& tile, int64_t) {
      call.tile = tile;
      kernels_.few[rows_ - 1](call);
    });
  }

  // Offsets of a tile, the last step filled up with zeros, and then their products.
  void add_many(int64_t begin, int64_t columns) {
    const int64_t steps = (columns + kLaneCount - 1) / kLaneCount;
    std::fill_n(row(experts_ - 1), kTileSteps, Lanes<A>{});  // of expert 0, if it is none from it
    std::fill(total_.begin(), total_.end(), Lanes<A>{});
    for (int64_t i = kFirst; i < experts_; i += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, experts_ - i);
      for_steps(i, count, begin, columns, [&](const Tile<T>& tile, int64_t step) {
        kernels_.differences[count - 1]({tile, row(i - kFirst) + step, total_.data() + step});
      });
    }
    if constexpr (kFrom == From::kMean)
      kernels_.centring({row(0), total_.data(), rows_, steps, share_, block_.data()});
    multiply(steps);
  }

  // Each group of rows with itself and with all rows after it.
  void multiply(int64_t steps) {
    for (int64_t i = 0; i < rows_; i += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, rows_ - i);
      kernels_.triangle[count - 1](products(i, count, i, count, steps));
      for (int64_t j = i + kGroup; j < rows_; j += kOthers) {
        const int64_t others = std::min<int64_t>(kOthers, rows_ - j);
        kernels_.rectangle[others - 1](products(i, kGroup, j, others, steps));
      }
    }
  }

  // Of `count` rows of the tile from i on with `others` rows from j on.
  Products<A> products(int64_t i, int64_t count, int64_t j, int64_t others, int64_t steps) {
    Products<A> result{row(i), row(j), steps, {}};
    for (int64_t a = i; a < i + count; ++a)
      for (int64_t b = std::max(a, j); b < j + others; ++b)
        result.products[a - i][b - j] = &block_[product_index(rows_, a, b)];
    return result;
  }

  Lanes<A>* row(int64_t i) {
    return tile_.data() + i * kTileSteps;
  }

  const Arena<T> arena_;
  int64_t columns_, experts_, rows_;
  A share_;
  const Kernels<T, kFrom>& kernels_;
  std::vector<Lanes<A>> tile_;
  std::vector<Lanes<A>> total_;
  std::vector<Lanes<A>> block_;
  std::vector<Lanes<double>> totals_;
};

// totals (S, entries) in fp64 of all segments.
template <typename T, From kFrom>
std::vector<double> totals_of(const Arena<T>& arena, const Segments& segments) {
  static const Kernels<T, kFrom> kernels(cpu_level());
  const int64_t entries = count_totals(rows_of(arena.experts, kFrom));
  const std::vector<Item> items = cut_items(segments, kItem);
  std::vector<double> parts(items.size() * entries), totals(segments.count * entries, 0.0);
  for_each_item(items.size(), arena.experts * arena.columns, [&](int64_t i) {
    Accumulation<T, kFrom>(arena, kernels).run(items[i], parts.data() + i * entries);
  });
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t e = 0; e < entries; ++e)
      totals[items[i].segment * entries + e] += parts[i * entries + e];
  return totals;
}

}  // namespace neulig_fast
