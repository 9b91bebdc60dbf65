// Layer norm with expert i's gain and shift for its own rows        (expert_layer_norm, CPU)
//
// A mix of one expert for each of N groups of rows; tensors as in layer_norm.h.
#include <torch/csrc/stable/library.h>

#include "cpu/layer_norm.h"

namespace neulig_fast {
namespace {

void expert_layer_norm(Tensor y, Tensor s, const Tensor& x, const Tensor& weight,
                       std::optional<Tensor> bias, double eps, std::optional<Tensor> residual) {
  const NormTensors norm{"expert_layer_norm", y, s, x, weight, bias, residual, eps};
  norm.check();
  const int64_t experts = weight.size(0);
  STD_TORCH_CHECK(x.size(0) == experts, "expert_layer_norm: x must be of N = ", experts,
                  " experts, got ", shape_text(x));
  visit_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    std::vector<Acc<T>> one_hot(experts * experts);
    for (int64_t i = 0; i < experts; ++i) one_hot[i * (experts + 1)] = 1;
    norm.all<T>(one_hot.data());
  });
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("expert_layer_norm", TORCH_BOX(&neulig_fast::expert_layer_norm));
}
