// g[k, s, i] = sum over p in segment s of grad[k, p] * params[i, p]        (blend_weight_grad, CPU)
//
// grad (K, P) and params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64 alike;
// segments (S + 1,) boundaries; g (K, S, N) in the accumulation type, fp32 (fp64 for fp64).
// Sums in a fixed order: blocks of 4096 columns counted from the segment's start; in each, 16 lanes
// (column modulo 16; the last columns, fewer than 16, have lanes of their own) summed in the
// accumulation type, multiplied then added; then lanes, blocks, and items of 16 blocks, each in
// order, in fp64. The bits do not depend on threads, K or instruction set.
// Bytes: (N + K) * P * itemsize, all read once from memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/segments.h"

namespace neulig_fast {
namespace {

constexpr int kLaneCount = 16;  // columns of one step, and partial sums of one block
// Experts one kernel reads side by side, each with a load instruction and lanes of its own. 16
// would double the code.
constexpr int kMaxExperts = 8;
constexpr int64_t kBlock = 4096;
constexpr int64_t kItem = 16 * kBlock;  // columns a thread takes at a time

// One block of one gradient row against up to 8 experts.
template <typename T>
struct Dots {
  const T* x;      // first expert, first column
  int64_t stride;  // elements from one expert to the next
  const T* grad;
  double* sums;     // one per expert, added to
  int64_t columns;  // a multiple of kLaneCount
  const T* ahead;   // gradients to fetch into the cache meanwhile
};

template <typename T, int kExperts>
struct DotBlock {
  template <int kBytes>
  static NF_INLINE void run(const Dots<T>& d) {
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    constexpr int kParts = kLaneCount / kLanes;
    Vec<Acc<T>, kLanes> acc[kExperts][kParts] = {};
    for (int64_t p = 0; p < d.columns; p += kLaneCount) {
      __builtin_prefetch(d.ahead + p);
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = p + part * kLanes;
        const auto grad = load<kLanes>(d.grad + at);
#pragma GCC unroll 8
        for (int i = 0; i < kExperts; ++i)
          acc[i][part] = acc[i][part] + grad * load<kLanes>(d.x + i * d.stride + at);
      }
    }
    for (int i = 0; i < kExperts; ++i) {
      double sum = 0;
      for (int lane = 0; lane < kLaneCount; ++lane) sum += acc[i][lane / kLanes][lane % kLanes];
      d.sums[i] += sum;
    }
  }
};

template <typename T>
using Kernels = std::array<KernelFn<Dots<T>>, kMaxExperts>;

template <typename T, int... kIndex>
Kernels<T> make_kernels(CpuLevel level, std::integer_sequence<int, kIndex...>) {
  return {kernel_at<DotBlock<T, kIndex + 1>, Dots<T>>(level)...};
}

template <typename T>
struct WeightGrad {
  const T* grad;
  int64_t grad_stride;
  const T* params;
  int64_t row_stride;
  BlendShape shape;
  const Kernels<T>& kernels;

  // Fewer columns than a step: the same kernel on zero-padded copies.
  void part_of_step(const Dots<T>& d, int64_t experts, int64_t columns) const {
    alignas(64) T x[kMaxExperts * kLaneCount] = {};
    alignas(64) T grad[kLaneCount] = {};
    for (int64_t i = 0; i < experts; ++i)
      std::memcpy(x + i * kLaneCount, d.x + i * d.stride, columns * sizeof(T));
    std::memcpy(grad, d.grad, columns * sizeof(T));
    kernels[experts - 1]({x, kLaneCount, grad, d.sums, kLaneCount, grad});
  }

  // One block: sums (up to kMaxExperts,) from expert i on.
  void block(int64_t k, int64_t i, int64_t begin, int64_t end, double* sums) const {
    const int64_t experts = std::min<int64_t>(kMaxExperts, shape.experts - i);
    const int64_t steps = (end - begin) / kLaneCount * kLaneCount;
    const T* row = grad + k * grad_stride + begin;
    const T* next_row = k + 1 < shape.outputs ? row + grad_stride : row;
    Dots<T> d{params + i * row_stride + begin, row_stride, row, sums, steps, next_row};
    if (steps > 0) kernels[experts - 1](d);
    d.x += steps;
    d.grad += steps;
    if (begin + steps < end) part_of_step(d, experts, end - begin - steps);
  }

  // sums (K, N). Each block is read once and serves all gradient rows from cache. With one row,
  // groups of experts take longer strides, which the hardware's prefetching likes better.
  void item(const Item& item, double* sums) const {
    const int64_t stretch = shape.outputs == 1 ? 4 * kBlock : kBlock;
    for (int64_t begin = item.begin; begin < item.end; begin += stretch)
      for (int64_t k = 0; k < shape.outputs; ++k)
        for (int64_t i = 0; i < shape.experts; i += kMaxExperts)
          for (int64_t p = begin; p < std::min(begin + stretch, item.end); p += kBlock)
            block(k, i, p, std::min(p + kBlock, item.end), sums + k * shape.experts + i);
  }

  // Sums of all items, (items, K, N).
  std::vector<double> all(const std::vector<Item>& items) const {
    const int64_t width = shape.outputs * shape.experts;
    std::vector<double> sums(items.size() * width, 0.0);
    const int64_t elements = (shape.experts + shape.outputs) * shape.columns;
    for_each_item(items.size(), elements,
                  [&](int64_t i) { item(items[i], sums.data() + i * width); });
    return sums;
  }
};

// Adds the items of each segment in order and rounds once: result (K, S, N).
template <typename A>
void reduce(const std::vector<Item>& items, const std::vector<double>& sums,
            const BlendShape& shape, A* result) {
  std::vector<double> total(shape.outputs * shape.segments * shape.experts, 0.0);
  const double* sum = sums.data();
  for (const Item& item : items)
    for (int64_t k = 0; k < shape.outputs; ++k) {
      double* row = total.data() + (k * shape.segments + item.segment) * shape.experts;
      for (int64_t i = 0; i < shape.experts; ++i) row[i] += *sum++;
    }
  std::copy(total.begin(), total.end(), result);
}

template <typename T>
void run(const Tensor& grad, const Tensor& params, const Segments& segments,
         const BlendShape& shape, const Tensor& result) {
  static const Kernels<T> kernels =
      make_kernels<T>(cpu_level(), std::make_integer_sequence<int, kMaxExperts>{});
  const WeightGrad<T> op{static_cast<const T*>(grad.const_data_ptr()),
                         shape.many_outputs ? grad.stride(0) : 0,
                         static_cast<const T*>(params.const_data_ptr()),
                         params.stride(0),
                         shape,
                         kernels};
  const std::vector<Item> items = cut_items(segments, kItem);
  reduce(items, op.all(items), shape, static_cast<Acc<T>*>(result.mutable_data_ptr()));
}

Tensor blend_weight_grad(const Tensor& grad, const Tensor& params, std::optional<Tensor> segments) {
  const BlendShape shape = check_blend_weight_grad(grad, params, segments);
  const int64_t whole[2] = {0, shape.columns};
  const Segments view = segments_view("blend_weight_grad", segments, whole, shape);
  std::vector<int64_t> size;
  if (shape.many_outputs) size.push_back(shape.outputs);
  if (shape.has_segments) size.push_back(shape.segments);
  size.push_back(shape.experts);
  Tensor result = torch::stable::new_empty(params, size, acc_dtype(params.scalar_type()));
  visit_dtype(params.scalar_type(),
              [&](auto element) { run<decltype(element)>(grad, params, view, shape, result); });
  return result;
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("blend_weight_grad", TORCH_BOX(&neulig_fast::blend_weight_grad));
}
