// sums[s, i] = sum over p in segment s of xi_i[p], gram[s, i, j] = sum of xi_i[p] * xi_j[p],
// xi_i = theta_i - mean_j theta_j                                               (offset_gram, CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; segments (S + 1,)
// boundaries; sums (S, N) and gram (S, N, N) contiguous fp64.
// Per tile of columns, kept in the L1 cache, while the next one comes from memory: the differences
// d_i = theta_i - theta_0, i >= 1, rounded to the accumulation type, fp32 (fp64 for fp64), and the
// products of four rows at a time with each other; then those of four rows with two of another
// four. The totals over a segment are centred last (common/offsets.h).
// Each expert is read once from memory, however many there are.
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

// What one item is computed in. Rows are experts 1 to N - 1, counted from 0; totals as in
// common/offsets.h.
template <typename T>
class Accumulation {
  using A = Acc<T>;

 public:
  Accumulation(const T* params, int64_t row_stride, const BlendShape& shape,
               const Kernels<T>& kernels)
      : params_(params),
        stride_(row_stride),
        columns_(shape.columns),
        rows_(shape.experts - 1),
        kernels_(kernels),
        tile_(rows_ * kTileSteps),
        block_(count_totals(shape.experts)),
        totals_(count_totals(shape.experts)) {}

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
      add_triangles(p, columns);
      add_rectangles((columns + kLaneCount - 1) / kLaneCount);
    }
    for (size_t entry = 0; entry < block_.size(); ++entry)
      for (int lane = 0; lane < kLaneCount; ++lane)
        totals_[entry].lane[lane] += block_[entry].lane[lane];
  }

  // Each group of rows with itself; its differences are kept if there are other groups.
  void add_triangles(int64_t begin, int64_t columns) {
    const int64_t steps = columns / kLaneCount, rest = columns % kLaneCount;
    const int64_t ahead = begin + 2 * kTile <= columns_ ? kTile : 0;
    for (int64_t i = 0; i < rows_; i += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, rows_ - i);
      const auto kernel = kernels_.triangle[rows_ > kGroup][count - 1];
      const T* x = params_ + (i + 1) * stride_ + begin;
      Triangle<T> t{params_ + begin, x, stride_, steps, ahead, row(i), &block_[i], {}};
      for (int64_t b = 0; b < count; ++b)
        for (int64_t a = 0; a <= b; ++a) t.products[a][b] = product(i + a, i + b);
      if (steps > 0) kernel(t);
      if (rest > 0) part_of_step(t, kernel, count, rest);
    }
  }

  // The columns after whole steps, fewer than one: the same kernel on zero-padded copies.
  void part_of_step(Triangle<T> t, KernelFn<Triangle<T>> kernel, int64_t count, int64_t columns) {
    const int64_t done = t.steps * kLaneCount;
    alignas(64) T padded[kGroup + 1][kLaneCount] = {};
    std::memcpy(padded[0], t.first + done, columns * sizeof(T));
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(padded[i + 1], t.x + i * stride_ + done, columns * sizeof(T));
    t.first = padded[0], t.x = padded[1], t.stride = kLaneCount, t.tile += t.steps;
    t.steps = 1, t.ahead = 0;
    kernel(t);
  }

  // Each group of rows with all rows after it.
  void add_rectangles(int64_t steps) {
    for (int64_t i = 0; i + kGroup < rows_; i += kGroup)
      for (int64_t j = i + kGroup; j < rows_; j += kOthers) {
        const int64_t others = std::min<int64_t>(kOthers, rows_ - j);
        Rectangle<A> r{row(i), row(j), steps, {}};
        for (int64_t a = 0; a < kGroup; ++a)
          for (int64_t b = 0; b < others; ++b) r.products[a][b] = product(i + a, j + b);
        kernels_.rectangle[others - 1](r);
      }
  }

  Lanes<A>* row(int64_t i) {
    return tile_.data() + i * kTileSteps;
  }

  Lanes<A>* product(int64_t i, int64_t j) {
    return &block_[product_index(rows_ + 1, i + 1, j + 1)];
  }

  const T* params_;
  int64_t stride_, columns_, rows_;
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
  const int64_t n = shape.experts, entries = count_totals(n);
  const std::vector<Item> items = cut_items(segments);
  std::vector<double> parts(items.size() * entries), totals(segments.count * entries, 0.0);
  for_each_item(items.size(), n * shape.columns, [&](int64_t i) {
    Accumulation<T> accumulation(static_cast<const T*>(params.const_data_ptr()), params.stride(0),
                                 shape, kernels);
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
