// blend as an operator of CUDA tensors: checks and launch.
#include "cuda/bindings.h"
#include "cuda/blend.h"

#include <torch/csrc/stable/library.h>

namespace neulig_fast {
namespace {

void blend(Tensor theta, const Tensor& weights, const Tensor& params,
           std::optional<Tensor> segments, std::optional<int64_t> seed) {
  const BlendShape shape = check_blend(theta, weights, params, segments, seed);
  check_device_call("blend", "weights", weights, params, segments, shape);
  check_device_call("blend", "out", theta, params, segments, shape);
  if (theta.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(params.get_device_index());
  const BlendCall call = {weights.const_data_ptr(),
                          params.const_data_ptr(),
                          bounds_of(segments),
                          theta.mutable_data_ptr(),
                          shape.outputs,
                          shape.segments,
                          shape.experts,
                          shape.columns,
                          params.stride(0),
                          shape.many_outputs ? theta.stride(0) : 0,
                          static_cast<uint64_t>(seed.value_or(0)),
                          element_of(theta.scalar_type()),
                          seed.has_value()};
  check_launch("blend",
               launch_blend(element_of(params.scalar_type()), call, current_stream(params)));
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CUDA, m) {
  m.impl("blend", TORCH_BOX(&neulig_fast::blend));
}
