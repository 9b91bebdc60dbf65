// blend as an operator of CUDA tensors: checks, allocation, launch.
#include "cuda/bindings.h"
#include "cuda/blend.h"

#include <torch/csrc/stable/library.h>

namespace neulig_fast {
namespace {

Tensor blend(const Tensor& weights, const Tensor& params, std::optional<Tensor> segments) {
  const BlendShape shape = check_blend(weights, params, segments);
  check_device_call("blend", "weights", weights, params, segments, shape);
  std::vector<int64_t> size;
  if (shape.many_outputs) size.push_back(shape.outputs);
  size.push_back(shape.columns);
  const torch::stable::accelerator::DeviceGuard guard(params.get_device_index());
  Tensor theta = torch::stable::new_empty(params, size);
  if (theta.numel() == 0) return theta;
  const BlendCall call = {weights.const_data_ptr(),
                          params.const_data_ptr(),
                          bounds_of(segments),
                          theta.mutable_data_ptr(),
                          shape.outputs,
                          shape.segments,
                          shape.experts,
                          shape.columns,
                          params.stride(0)};
  check_launch("blend",
               launch_blend(element_of(params.scalar_type()), call, current_stream(params)));
  return theta;
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CUDA, m) {
  m.impl("blend", TORCH_BOX(&neulig_fast::blend));
}
