// sums[s, i] = sum over p in segment s of xi_i[p], gram[s, i, j] = sum of xi_i[p] * xi_j[p],
// xi_i = theta_i - mean_j theta_j                                               (offset_gram, CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; segments (S + 1,)
// boundaries; sums (S, N) and gram (S, N, N) contiguous fp64.
// Offsets are formed as common/offsets.h says, in the accumulation type, fp32 (fp64 for fp64). Up
// to 5 experts: in registers, and multiplied there. More: per tile of 512 columns, kept in the L1
// cache while the next one comes from memory; then the products of four rows at a time with each
// other and with two of the others. Each expert is read once from memory, however many there are.
//
// Sums in a fixed order: blocks of 4096 columns counted from the segment's start; in each, 16 lanes
// (columns modulo 16) summed tile by tile in the accumulation type, products by fused
// multiplications and additions; blocks are added lane by lane, then lanes and items of 16 blocks,
// each in order, in fp64. The bits do not depend on threads or instruction set.
//
// Bytes: N * P * itemsize.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/offsets.h"
#include "common/parallel.h"
#include "common/segments.h"
#include "cpu/offset_gram_kernels.h"

namespace neulig_fast {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kItem = 16 * kBlock;  // columns a thread takes at a time

int64_t rows_of(int64_t experts) {
  return experts - 1 <= kGroup ? experts - 1 : experts;
}

// What one item is computed in; rows and totals as in common/offsets.h.
template <typename T>
class Accumulation {
  using A = Acc<T>;

 public:
  Accumulation(const T* params, int64_t row_stride, const BlendShape& shape,
               const Kernels<T>& kernels)
      : params_(params),
        stride_(row_stride),
        columns_(shape.columns),
        experts_(shape.experts),
        rows_(rows_of(shape.experts)),
        share_(A{1} / static_cast<A>(shape.experts)),
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
  // Whether one group is all but expert 0, which then has no row.
  bool few() const {
    return rows_ < experts_;
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
    const T *first = params_ + begin, *x = first + i * stride_;
    if (steps > 0) add(Tile<T>{first, x, stride_, steps, ahead}, int64_t{0});
    if (rest == 0) return;
    const int64_t done = steps * kLaneCount;
    alignas(64) T padded[kGroup + 1][kLaneCount] = {};
    std::memcpy(padded[0], first + done, rest * sizeof(T));
    for (int64_t row = 0; row < count; ++row)
      std::memcpy(padded[row + 1], x + row * stride_ + done, rest * sizeof(T));
    add(Tile<T>{padded[0], padded[1], kLaneCount, 1, 0}, steps);
  }

  void add_few(int64_t begin, int64_t columns) {
    if (rows_ == 0) return;
    Few<T> call{{}, share_, block_.data(), {}};
    for (int64_t j = 0; j < rows_; ++j)
      for (int64_t i = 0; i <= j; ++i) call.products[i][j] = &block_[product_index(rows_, i, j)];
    for_steps(1, rows_, begin, columns, [&](const Tile<T>& tile, int64_t) {
      call.tile = tile;
      kernels_.few[rows_ - 1](call);
    });
  }

  // Offsets of a tile, the last step filled up with zeros, and then their products.
  void add_many(int64_t begin, int64_t columns) {
    const int64_t steps = (columns + kLaneCount - 1) / kLaneCount;
    std::fill_n(row(experts_ - 1), kTileSteps, Lanes<A>{});
    std::fill(total_.begin(), total_.end(), Lanes<A>{});
    for (int64_t i = 1; i < experts_; i += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, experts_ - i);
      for_steps(i, count, begin, columns, [&](const Tile<T>& tile, int64_t step) {
        kernels_.differences[count - 1]({tile, row(i - 1) + step, total_.data() + step});
      });
    }
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

  const T* params_;
  int64_t stride_, columns_, experts_, rows_;
  A share_;
  const Kernels<T>& kernels_;
  std::vector<Lanes<A>> tile_;
  std::vector<Lanes<A>> total_;
  std::vector<Lanes<A>> block_;
  std::vector<Lanes<double>> totals_;
};

template <typename T>
void run(const Tensor& params, const Segments& segments, const BlendShape& shape, double* sums,
         double* gram) {
  static const Kernels<T> kernels(cpu_level());
  const int64_t n = shape.experts, rows = rows_of(n), entries = count_totals(rows);
  const std::vector<Item> items = cut_items(segments, kItem);
  std::vector<double> parts(items.size() * entries), totals(segments.count * entries, 0.0);
  for_each_item(items.size(), n * shape.columns, [&](int64_t i) {
    Accumulation<T> accumulation(static_cast<const T*>(params.const_data_ptr()), params.stride(0),
                                 shape, kernels);
    accumulation.run(items[i], parts.data() + i * entries);
  });
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t e = 0; e < entries; ++e)
      totals[items[i].segment * entries + e] += parts[i * entries + e];
  for (int64_t s = 0; s < segments.count; ++s) {
    const OffsetTotals found{totals.data() + s * entries, rows, n};
    for (int64_t i = 0; i < n; ++i) {
      sums[s * n + i] = found.sum(i);
      for (int64_t j = 0; j < n; ++j) gram[(s * n + i) * n + j] = found.product(i, j);
    }
  }
}

std::tuple<Tensor, Tensor> offset_gram(const Tensor& params, std::optional<Tensor> segments) {
  const BlendShape shape = check_offset_gram(params, segments);
  const int64_t whole[2] = {0, shape.columns};
  const Segments view = segments_view("offset_gram", segments, whole, shape);
  const int64_t n = shape.experts;
  Tensor sums = torch::stable::new_empty(params, {shape.segments, n}, ScalarType::Double);
  Tensor gram = torch::stable::new_empty(params, {shape.segments, n, n}, ScalarType::Double);
  visit_dtype(params.scalar_type(), [&](auto element) {
    run<decltype(element)>(params, view, shape, static_cast<double*>(sums.mutable_data_ptr()),
                           static_cast<double*>(gram.mutable_data_ptr()));
  });
  return {sums, gram};
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("offset_gram", TORCH_BOX(&neulig_fast::offset_gram));
}
