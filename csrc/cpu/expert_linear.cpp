// y_ir = f(W_i x_r + b_i), or of x_ir        (expert_linear, CPU)
//
// x (R, I) or (N, R, I) contiguous in the accumulation type; weight (N, O, I) and bias (N, O), any
// strides but 1 within a row; y (N, R, O) contiguous; weight, bias and y alike fp32 | bf16 | fp16 |
// fp64. Sums in fp32 (fp64 for fp64), one rounding at the end. A mix of one expert for each of N
// samples.
#include <torch/csrc/stable/library.h>

#include "cpu/mixed_layer.h"

namespace neulig_fast {
namespace {

LayerShape check(const Tensor& y, const Tensor& x, const Tensor& weight,
                 const std::optional<Tensor>& bias, int64_t activation) {
  const char* op = "expert_linear";
  check_layer(op, weight, bias, activation);
  const int64_t dims = x.dim(), experts = weight.size(0);
  STD_TORCH_CHECK((dims == 2 || (dims == 3 && x.size(0) == experts)) &&
                      x.size(dims - 1) == weight.size(2) && x.is_contiguous(),
                  op, ": x must be (R, I) or (N, R, I) with I = ", weight.size(2),
                  " and contiguous, got ", shape_text(x));
  const LayerShape shape = {experts, x.size(dims - 2), weight.size(2), experts, weight.size(1)};
  STD_TORCH_CHECK(y.dim() == 3 && y.size(0) == experts && y.size(1) == shape.rows &&
                      y.size(2) == shape.outputs && y.is_contiguous(),
                  op, ": y must be (N, R, O) and contiguous, got ", shape_text(y));
  const ScalarType acc = acc_dtype(weight.scalar_type());
  STD_TORCH_CHECK(x.scalar_type() == acc && y.scalar_type() == weight.scalar_type(), op,
                  ": x must be ", toString(acc), " and y ", toString(weight.scalar_type()));
  return shape;
}

void expert_linear(Tensor y, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                   int64_t activation) {
  const LayerShape shape = check(y, x, weight, bias, activation);
  if (y.numel() == 0) return;
  visit_dtype(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto layer = mixed_layer<T>(shape, y, x, weight, bias, activation);
    std::vector<Acc<T>> one_hot(shape.experts * shape.experts);
    for (int64_t i = 0; i < shape.experts; ++i) one_hot[i * (shape.experts + 1)] = 1;
    layer.choose_experts(one_hot.data());
    layer.by_weights = true;
    layer.all();
  });
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("expert_linear", TORCH_BOX(&neulig_fast::expert_linear));
}
