// gram[s, i, j] = sum over p in segment s of d_i[p] * d_j[p], d_i = params_i - base       (gram,
// CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; base (P,) likewise or
// none; segments (S + 1,) boundaries; gram (S, N, N) contiguous fp64, symmetric. Differences in the
// accumulation type, fp32 (fp64 for fp64), products summed as gram_totals.h says: the bits do not
// depend on threads or instruction set.
//
// Bytes: (N + 1) * P * itemsize.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "cpu/gram_totals.h"

namespace neulig_fast {
namespace {

template <typename T>
void run(const Tensor& params, const std::optional<Tensor>& base, const Segments& segments,
         double* gram) {
  Arena<T> arena = {static_cast<const T*>(params.const_data_ptr()), nullptr, params.stride(0),
                    params.size(0), params.size(1)};
  arena.first = base ? static_cast<const T*>(base->const_data_ptr()) : arena.params;
  const std::vector<double> totals = base ? totals_of<T, From::kBase>(arena, segments)
                                          : totals_of<T, From::kZero>(arena, segments);
  const int64_t n = arena.experts, entries = count_totals(n);
  for (int64_t s = 0; s < segments.count; ++s)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        *gram++ = totals[s * entries + product_index(n, std::min(i, j), std::max(i, j))];
}

Tensor gram(const Tensor& params, std::optional<Tensor> base, std::optional<Tensor> segments) {
  check_params("gram", params);
  if (base) check_exact("gram", "base", *base, params.scalar_type(), {params.size(1)});
  const int64_t count = check_segments("gram", segments), n = params.size(0);
  const BlendShape shape{1, count, n, params.size(1), false, segments.has_value()};
  const int64_t whole[2] = {0, shape.columns};
  const Segments view = segments_view("gram", segments, whole, shape);
  Tensor products = torch::stable::new_empty(params, {count, n, n}, ScalarType::Double);
  visit_dtype(params.scalar_type(), [&](auto element) {
    run<decltype(element)>(params, base, view, static_cast<double*>(products.mutable_data_ptr()));
  });
  return products;
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("gram", TORCH_BOX(&neulig_fast::gram));
}
