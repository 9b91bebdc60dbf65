// blend_weight_grad as an operator of CUDA tensors: checks, allocation, launch.
#include "cuda/bindings.h"
#include "cuda/blend_weight_grad.h"

#include <torch/csrc/stable/library.h>

namespace neulig_fast {
namespace {

Tensor blend_weight_grad(const Tensor& grad, const Tensor& params, std::optional<Tensor> segments) {
  const BlendShape shape = check_blend_weight_grad(grad, params, segments);
  check_device_call("blend_weight_grad", "grad", grad, params, segments, shape);
  const ScalarType dtype = acc_dtype(params.scalar_type());
  std::vector<int64_t> size;
  if (shape.many_outputs) size.push_back(shape.outputs);
  if (shape.has_segments) size.push_back(shape.segments);
  size.push_back(shape.experts);
  const torch::stable::accelerator::DeviceGuard guard(params.get_device_index());
  Tensor result = torch::stable::new_empty(params, size, dtype);
  if (result.numel() == 0) return result;
  if (shape.columns == 0) return torch::stable::zero_(result);
  const int64_t slots = blend_weight_grad_slots(shape.columns, shape.segments);
  Tensor partials =
      torch::stable::new_empty(params, {shape.outputs * shape.experts * slots}, dtype);
  const BlendWeightGradCall call = {grad.const_data_ptr(),
                                    params.const_data_ptr(),
                                    bounds_of(segments),
                                    partials.mutable_data_ptr(),
                                    result.mutable_data_ptr(),
                                    shape.outputs,
                                    shape.segments,
                                    shape.experts,
                                    shape.columns,
                                    shape.many_outputs ? grad.stride(0) : 0,
                                    params.stride(0),
                                    slots};
  check_launch("blend_weight_grad", launch_blend_weight_grad(element_of(params.scalar_type()), call,
                                                             current_stream(params)));
  return result;
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CUDA, m) {
  m.impl("blend_weight_grad", TORCH_BOX(&neulig_fast::blend_weight_grad));
}
