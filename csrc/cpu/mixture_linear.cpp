// y_bt = f(sum_i w_bi (W_i x_bt + b_i))        (mixture_linear, CPU)
//
// x (B, T, I) and coef (B, N) contiguous in the accumulation type; weight (N, O, I) and bias (N,
// O), any strides but 1 within a row; y (B, T, O) contiguous; weight, bias and y alike fp32 | bf16
// | fp16 | fp64. Sums in fp32 (fp64 for fp64), one rounding at the end.
#include <torch/csrc/stable/library.h>

#include "cpu/mixed_layer.h"

namespace neulig_fast {
namespace {

LayerShape check(const Tensor& y, const Tensor& x, const Tensor& weight,
                 const std::optional<Tensor>& bias, const Tensor& coef, int64_t activation) {
  const char* op = "mixture_linear";
  check_layer(op, weight, bias, activation);
  STD_TORCH_CHECK(x.dim() == 3 && weight.size(2) == x.size(2) && x.is_contiguous(), op,
                  ": x must be (B, T, I) with I = ", weight.size(2), " and contiguous, got ",
                  shape_text(x));
  const LayerShape shape = {x.size(0), x.size(1), x.size(2), weight.size(0), weight.size(1)};
  STD_TORCH_CHECK(coef.dim() == 2 && coef.size(0) == shape.samples &&
                      coef.size(1) == shape.experts && coef.is_contiguous(),
                  op, ": coef must be (B, N) and contiguous, got ", shape_text(coef));
  STD_TORCH_CHECK(y.dim() == 3 && y.size(0) == shape.samples && y.size(1) == shape.rows &&
                      y.size(2) == shape.outputs && y.is_contiguous(),
                  op, ": y must be (B, T, O) and contiguous, got ", shape_text(y));
  const ScalarType acc = acc_dtype(weight.scalar_type());
  STD_TORCH_CHECK(x.scalar_type() == acc && coef.scalar_type() == acc &&
                      y.scalar_type() == weight.scalar_type(),
                  op, ": x and coef must be ", toString(acc), " and y ",
                  toString(weight.scalar_type()));
  return shape;
}

void mixture_linear(Tensor y, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                    const Tensor& coef, int64_t activation) {
  const LayerShape shape = check(y, x, weight, bias, coef, activation);
  if (y.numel() == 0) return;
  visit_dtype(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto layer = mixed_layer<T>(shape, y, x, weight, bias, activation);
    layer.choose_experts(static_cast<const Acc<T>*>(coef.const_data_ptr()));
    layer.all();
  });
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("mixture_linear", TORCH_BOX(&neulig_fast::mixture_linear));
}
