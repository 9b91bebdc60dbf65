// Layer norm with sum_i w_bi g_i and sum_i w_bi b_i for sample b        (mixture_layer_norm, CPU)
//
// coef (B, N) contiguous in the accumulation type; the rest as in layer_norm.h.
#include <torch/csrc/stable/library.h>

#include "cpu/layer_norm.h"

namespace neulig_fast {
namespace {

void mixture_layer_norm(Tensor y, Tensor s, const Tensor& x, const Tensor& weight,
                        std::optional<Tensor> bias, const Tensor& coef, double eps,
                        std::optional<Tensor> residual) {
  const NormTensors norm{"mixture_layer_norm", y, s, x, weight, bias, residual, eps};
  norm.check();
  STD_TORCH_CHECK(coef.dim() == 2 && coef.size(0) == x.size(0) && coef.size(1) == weight.size(0) &&
                      coef.is_contiguous() && coef.scalar_type() == acc_dtype(x.scalar_type()),
                  "mixture_layer_norm: coef must be (B, N), contiguous and ",
                  toString(acc_dtype(x.scalar_type())), ", got ", shape_text(coef));
  visit_dtype(x.scalar_type(), [&](auto element) {
    norm.all<decltype(element)>(static_cast<const Acc<decltype(element)>*>(coef.const_data_ptr()));
  });
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("mixture_layer_norm", TORCH_BOX(&neulig_fast::mixture_layer_norm));
}
