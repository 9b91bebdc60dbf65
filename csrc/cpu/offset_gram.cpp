// sums[s, i] = sum over p in segment s of xi_i[p], gram[s, i, j] = sum of xi_i[p] * xi_j[p],
// xi_i = theta_i - mean_j theta_j                                               (offset_gram, CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; segments (S + 1,)
// boundaries; sums (S, N) and gram (S, N, N) contiguous fp64.
// Per tile of columns, kept in the L1 cache: first the differences d_i = theta_i - theta_0, i >= 1,
// rounded to the accumulation type, fp32 (fp64 for fp64); then their products, four rows at a time
// against four or two, so that all accumulators are registers. The totals over a segment are
// centred last (common/offsets.h). Each expert is read once from memory, however many there are.
// Sums in a fixed order: blocks of 4096 columns counted from the segment's start; in each, 16 lanes
// (column modulo 16) summed in the accumulation type, multiplied then added; blocks are added lane
// by lane, then lanes and items of 16 blocks, each in order, in fp64. The bits do not depend on
// threads or instruction set.
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

// At most kItem columns of one segment, starting a whole number of items after its start.
struct Item {
  int64_t segment, begin, end;
};

std::vector<Item> cut_items(const Segments& segments) {
  std::vector<Item> items;
  for (int64_t s = 0; s < segments.count; ++s)
    for (int64_t p = segments.bounds[s]; p < segments.bounds[s + 1]; p += kItem)
      items.push_back({s, p, std::min(p + kItem, segments.bounds[s + 1])});
  return items;
}

// What one item is computed in. rows = N - 1; totals as in common/offsets.h.
template <typename T>
class Accumulation {
  using A = Acc<T>;

 public:
  Accumulation(const T* params, int64_t row_stride, int64_t rows, const Kernels<T>& kernels)
      : params_(params),
        stride_(row_stride),
        rows_(rows),
        kernels_(kernels),
        tile_(rows * kTileSteps),
        block_(count_totals(rows + 1)),
        totals_(count_totals(rows + 1)) {}

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
  void add_block(int64_t begin, int64_t end) {
    std::fill(block_.begin(), block_.end(), Lanes<A>{});
    for (int64_t p = begin; p < end; p += kTile) {
      const int64_t columns = std::min(kTile, end - p);
      subtract_tile(p, columns, p + 2 * kTile <= end ? kTile : 0);
      multiply_tile((columns + kLaneCount - 1) / kLaneCount);
    }
    for (size_t entry = 0; entry < block_.size(); ++entry)
      for (int lane = 0; lane < kLaneCount; ++lane)
        totals_[entry].lane[lane] += block_[entry].lane[lane];
  }

  void subtract_tile(int64_t begin, int64_t columns, int64_t ahead) {
    const int64_t steps = columns / kLaneCount, rest = begin + steps * kLaneCount;
    const int64_t end = begin + columns;
    for (int64_t i = 0; i < rows_; i += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, rows_ - i);
      const T* x = params_ + (i + 1) * stride_;
      Lanes<A>* tile = tile_.data() + i * kTileSteps;
      Lanes<A>* sums = block_.data() + i;
      if (steps > 0)
        kernels_.subtract[count - 1](
            {params_ + begin, x + begin, stride_, tile, sums, steps, ahead});
      if (rest < end) part_of_step(x + rest, params_ + rest, count, end - rest, tile + steps, sums);
    }
  }

  // Fewer columns than a step: the same kernel on zero-padded copies.
  void part_of_step(const T* x, const T* first, int64_t count, int64_t columns, Lanes<A>* tile,
                    Lanes<A>* sums) {
    alignas(64) T padded[kGroup + 1][kLaneCount] = {};
    std::memcpy(padded[0], first, columns * sizeof(T));
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(padded[i + 1], x + i * stride_, columns * sizeof(T));
    kernels_.subtract[count - 1]({padded[0], padded[1], kLaneCount, tile, sums, 1, 0});
  }

  void multiply_tile(int64_t steps) {
    for (int64_t i = 0; i < rows_; i += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, rows_ - i);
      kernels_.triangle[count - 1](pairs(i, i, count, count, steps));
      for (int64_t j = i + kGroup; j < rows_; j += 2) {
        const int64_t others = std::min<int64_t>(2, rows_ - j);
        kernels_.rectangle[others - 1](pairs(i, j, count, others, steps));
      }
    }
  }

  Multiply<A> pairs(int64_t first, int64_t other, int64_t rows, int64_t others, int64_t steps) {
    Multiply<A> m{tile_.data() + first * kTileSteps, tile_.data() + other * kTileSteps, {}, steps};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < others; ++j)
        if (first + i <= other + j)
          m.products[i][j] = block_.data() + product_index(rows_ + 1, first + i + 1, other + j + 1);
    return m;
  }

  const T* params_;
  int64_t stride_, rows_;
  const Kernels<T>& kernels_;
  std::vector<Lanes<A>> tile_;
  std::vector<Lanes<A>> block_;
  std::vector<Lanes<double>> totals_;
};

// sums (N,) and gram (N, N) of one segment.
void centre(const double* totals, int64_t n, double* sums, double* gram) {
  std::vector<double> means(n);
  for (int64_t i = 0; i < n; ++i) means[i] = mean_product(totals, n, i);
  const double mean = mean_of(means.data(), n), mean_offset = mean_sum(totals, n);
  for (int64_t i = 0; i < n; ++i) {
    sums[i] = total_sum(totals, i) - mean_offset;
    for (int64_t j = 0; j < n; ++j)
      gram[i * n + j] = total_product(totals, n, i, j) - (means[i] + means[j] - mean);
  }
}

template <typename T>
void run(const Tensor& params, const Segments& segments, const BlendShape& shape, double* sums,
         double* gram) {
  static const Kernels<T> kernels(cpu_level());
  const int64_t rows = shape.experts - 1, entries = count_totals(rows + 1), n = shape.experts;
  const std::vector<Item> items = cut_items(segments);
  std::vector<double> parts(items.size() * entries), totals(segments.count * entries, 0.0);
  for_each_item(items.size(), rows * shape.columns, [&](int64_t i) {
    Accumulation<T> accumulation(static_cast<const T*>(params.const_data_ptr()), params.stride(0),
                                 rows, kernels);
    accumulation.run(items[i], parts.data() + i * entries);
  });
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t e = 0; e < entries; ++e)
      totals[items[i].segment * entries + e] += parts[i * entries + e];
  for (int64_t s = 0; s < segments.count; ++s)
    centre(totals.data() + s * entries, n, sums + s * n, gram + s * n * n);
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
