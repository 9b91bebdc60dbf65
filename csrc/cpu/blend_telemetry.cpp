// theta[k, p] = sum_i weights[k, s(p), i] * params[i, p], and what it did      (blend_telemetry,
// CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; weights (K, S, N)
// contiguous in the accumulation type A, fp32 (fp64 for fp64); segments (S + 1,) boundaries.
//   theta (K, P), `out_dtype`  blend's bits: w_0 x_0, then + w_i x_i in expert order, multiplied
//                              then added in A, rounded once
//   counts (2, K, S) int64     entries of theta that are not finite; those whose sum in A was
//   expert_squares (S, N)      sum_p xi_i[p]^2, fp64; xi_i = (x_i - o) - m in A: o is expert `base`
//                              and m = 0, or o is expert 0 and m the mean of all x_j - o
//   merged_squares (K, S)      the same of the sums in A
//   conflicts (S,) int64       columns with an xi_i > 0 and an xi_j < 0
// Squares are added in fp64: 16 lanes (column of the item modulo 16; the last columns, fewer than
// 16, have lanes of their own) over items of 65536 columns counted from the segment's start, then
// lanes, then items, each in order. The bits do not depend on threads, K or instruction set. Bytes:
// N * P values read once and K * P written once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/segments.h"
#include "common/stream.h"
#include "cpu/blend_telemetry.h"

namespace neulig_fast {
namespace {

constexpr int kMaxExperts = 8;  // kernels of their own, for the reason that blend.cpp gives
constexpr int64_t kItem = 65536;
constexpr int64_t kStreamBytes = 32 << 20;  // as blend.cpp

template <typename T>
using Kernels = std::array<KernelFn<Steps<T>>, kMaxExperts + 1>;  // [0]: any number of experts

template <typename T, int... kExperts>
Kernels<T> make_kernels(CpuLevel level, std::integer_sequence<int, kExperts...>) {
  return {kernel_at<TelemetrySteps<T, kExperts>, Steps<T>>(level)...};
}

// What an item, or a segment, adds up to; ordered as Steps' lanes are.
struct Totals {
  std::vector<double> squares;
  std::vector<int64_t> counts;
};

template <typename T>
struct Telemetry {
  Steps<T> all;   // what all items share
  int64_t width;  // bytes of an element of theta
  const Kernels<T>& kernels;

  // Runs the steps and adds the first `lanes` lanes, in order.
  void run(Steps<T> g, int lanes, Totals& totals) const {
    std::vector<double> squares(totals.squares.size() * kStep);
    std::vector<Count<T>> counts(totals.counts.size() * kStep);
    g.squares = squares.data();
    g.counts = counts.data();
    kernels[g.experts <= kMaxExperts ? g.experts : 0](g);
    for (size_t entry = 0; entry < totals.squares.size(); ++entry)
      for (int lane = 0; lane < lanes; ++lane)
        totals.squares[entry] += squares[entry * kStep + lane];
    for (size_t entry = 0; entry < totals.counts.size(); ++entry)
      for (int lane = 0; lane < lanes; ++lane) totals.counts[entry] += counts[entry * kStep + lane];
  }

  // Fewer columns than a step: the same kernel on zero-padded copies, whose lanes are left out.
  void part_of_step(Steps<T> g, Totals& totals) const {
    const int64_t columns = g.columns;
    std::vector<T> x(g.experts * kStep);
    for (int64_t i = 0; i < g.experts; ++i)
      std::memcpy(x.data() + i * kStep, g.x + i * g.row_stride, columns * sizeof(T));
    std::vector<char> theta(g.outputs * kStep * width);
    char* const to = g.theta;
    const int64_t to_stride = g.theta_stride;
    g.x = x.data();
    g.row_stride = kStep;
    g.theta = theta.data();
    g.theta_stride = kStep * width;
    g.stream = false;
    g.columns = kStep;
    run(g, static_cast<int>(columns), totals);
    for (int64_t k = 0; k < g.outputs; ++k)
      std::memcpy(to + k * to_stride, theta.data() + k * kStep * width, columns * width);
  }

  void item(const Item& item, Totals& totals) const {
    Steps<T> g = all;
    totals.squares.assign(g.experts + g.outputs, 0.0);
    totals.counts.assign(1 + 2 * g.outputs, 0);
    g.x += item.begin;
    g.weights += item.segment * g.experts;
    g.theta += item.begin * width;
    g.stream = g.stream && reinterpret_cast<uintptr_t>(g.theta) % 16 == 0;
    const int64_t columns = item.end - item.begin;
    g.columns = columns / kStep * kStep;
    if (g.columns > 0) run(g, kStep, totals);
    if (g.stream) stream_fence();
    g.x += g.columns;
    g.theta += g.columns * width;
    g.columns = columns - g.columns;
    if (g.columns > 0) part_of_step(g, totals);
  }
};

// The op's results after theta.
struct Results {
  Tensor counts, expert_squares, merged_squares, conflicts;
};

// Adds the items of each segment in order.
void reduce(const std::vector<Item>& items, const std::vector<Totals>& totals,
            const BlendShape& shape, const Results& results) {
  const int64_t K = shape.outputs, S = shape.segments, N = shape.experts;
  auto* counts = static_cast<int64_t*>(results.counts.mutable_data_ptr());
  auto* experts = static_cast<double*>(results.expert_squares.mutable_data_ptr());
  auto* merged = static_cast<double*>(results.merged_squares.mutable_data_ptr());
  auto* conflicts = static_cast<int64_t*>(results.conflicts.mutable_data_ptr());
  for (size_t n = 0; n < items.size(); ++n) {
    const int64_t s = items[n].segment;
    const Totals& item = totals[n];
    conflicts[s] += item.counts[0];
    for (int64_t i = 0; i < N; ++i) experts[s * N + i] += item.squares[i];
    for (int64_t k = 0; k < K; ++k) {
      merged[k * S + s] += item.squares[N + k];
      counts[k * S + s] += item.counts[1 + 2 * k];
      counts[(K + k) * S + s] += item.counts[2 + 2 * k];
    }
  }
}

template <typename T>
void run(const Tensor& weights, const Tensor& params, const Segments& segments,
         const BlendShape& shape, std::optional<int64_t> base, const Tensor& theta,
         const Results& results) {
  static const Kernels<T> kernels =
      make_kernels<T>(cpu_level(), std::make_integer_sequence<int, kMaxExperts + 1>{});
  const int64_t width = theta.element_size(), bytes = shape.columns * width;
  Telemetry<T> op{{}, width, kernels};
  op.all.x = static_cast<const T*>(params.const_data_ptr());
  op.all.row_stride = params.stride(0);
  op.all.experts = shape.experts;
  op.all.weights = static_cast<const Acc<T>*>(weights.const_data_ptr());
  op.all.weight_stride = shape.segments * shape.experts;
  op.all.outputs = shape.outputs;
  op.all.origin = base.value_or(0);
  op.all.centred = !base.has_value();
  op.all.share = static_cast<Acc<T>>(1.0 / shape.experts);
  op.all.limit = static_cast<Acc<T>>(overflow_limit(theta.scalar_type()));
  op.all.out = theta.scalar_type();
  op.all.theta = static_cast<char*>(theta.mutable_data_ptr());
  op.all.theta_stride = bytes;
  op.all.stream = shape.outputs * bytes >= kStreamBytes && (shape.outputs == 1 || bytes % 16 == 0);

  const std::vector<Item> items = cut_items(segments, kItem);
  std::vector<Totals> totals(items.size());
  const int64_t elements = (shape.experts + shape.outputs) * shape.columns;
  for_each_item(items.size(), elements, [&](int64_t i) { op.item(items[i], totals[i]); });
  reduce(items, totals, shape, results);
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors blend_telemetry(const Tensor& weights, const Tensor& params,
                            std::optional<Tensor> segments, std::optional<ScalarType> out_dtype,
                            std::optional<int64_t> base) {
  const BlendShape shape = check_blend_telemetry(weights, params, segments, out_dtype, base);
  const int64_t whole[2] = {0, shape.columns};
  const Segments view = segments_view("blend_telemetry", segments, whole, shape);
  const TelemetrySizes sizes = telemetry_sizes(shape);
  const auto zeros = [&](const std::vector<int64_t>& size, ScalarType dtype) {
    Tensor tensor = torch::stable::new_empty(params, size, dtype);
    return torch::stable::zero_(tensor);
  };
  const Tensor theta =
      torch::stable::new_empty(params, sizes.theta, out_dtype.value_or(params.scalar_type()));
  const Results results = {
      zeros(sizes.counts, ScalarType::Long), zeros(sizes.expert_squares, ScalarType::Double),
      zeros(sizes.merged_squares, ScalarType::Double), zeros(sizes.conflicts, ScalarType::Long)};
  visit_dtype(params.scalar_type(), [&](auto element) {
    run<decltype(element)>(weights, params, view, shape, base, theta, results);
  });
  return {theta, results.counts, results.expert_squares, results.merged_squares, results.conflicts};
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("blend_telemetry", TORCH_BOX(&neulig_fast::blend_telemetry));
}
