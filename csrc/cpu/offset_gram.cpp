// sums[s, i] = sum over p in segment s of xi_i[p], gram[s, i, j] = sum of xi_i[p] * xi_j[p],
// xi_i = theta_i - mean_j theta_j                                               (offset_gram, CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; segments (S + 1,)
// boundaries; sums (S, N) and gram (S, N, N) contiguous fp64.
// Offsets are formed as common/offsets.h says, in the accumulation type, fp32 (fp64 for fp64), and
// summed as gram_totals.h says: the bits do not depend on threads or instruction set.
//
// Bytes: N * P * itemsize.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/gram_totals.h"

namespace neulig_fast {
namespace {

template <typename T>
void run(const Tensor& params, const Segments& segments, double* sums, double* gram) {
  const auto* data = static_cast<const T*>(params.const_data_ptr());
  const int64_t n = params.size(0), rows = rows_of(n, From::kMean), entries = count_totals(rows);
  const std::vector<double> totals =
      totals_of<T, From::kMean>({data, data, params.stride(0), n, params.size(1)}, segments);
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
    run<decltype(element)>(params, view, static_cast<double*>(sums.mutable_data_ptr()),
                           static_cast<double*>(gram.mutable_data_ptr()));
  });
  return {sums, gram};
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("offset_gram", TORCH_BOX(&neulig_fast::offset_gram));
}
