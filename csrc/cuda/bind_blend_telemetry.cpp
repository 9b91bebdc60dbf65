// blend_telemetry as an operator of CUDA tensors: checks, allocation, launch.
#include "cuda/bindings.h"
#include "cuda/blend_telemetry.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace neulig_fast {
namespace {

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors blend_telemetry(const Tensor& weights, const Tensor& params,
                            std::optional<Tensor> segments, std::optional<ScalarType> out_dtype,
                            std::optional<int64_t> base) {
  const BlendShape shape = check_blend_telemetry(weights, params, segments, out_dtype, base);
  check_device_call("blend_telemetry", "weights", weights, params, segments, shape);
  const torch::stable::accelerator::DeviceGuard guard(params.get_device_index());
  const ScalarType out = out_dtype.value_or(params.scalar_type());
  const auto empty = [&](const std::vector<int64_t>& size, ScalarType dtype) {
    return torch::stable::new_empty(params, size, dtype);
  };
  const TelemetrySizes sizes = telemetry_sizes(shape);
  Tensor theta = empty(sizes.theta, out);
  Tensor counts = empty(sizes.counts, ScalarType::Long);
  Tensor expert_squares = empty(sizes.expert_squares, ScalarType::Double);
  Tensor merged_squares = empty(sizes.merged_squares, ScalarType::Double);
  Tensor conflicts = empty(sizes.conflicts, ScalarType::Long);
  if (shape.columns == 0) {
    for (Tensor* result : {&counts, &expert_squares, &merged_squares, &conflicts})
      torch::stable::zero_(*result);
    return {theta, counts, expert_squares, merged_squares, conflicts};
  }
  const int64_t slots = blend_telemetry_slots(shape.columns, shape.segments);
  Tensor square_partials = empty({(shape.experts + shape.outputs) * slots}, ScalarType::Double);
  Tensor count_partials = empty({(1 + 2 * shape.outputs) * slots}, ScalarType::Int);
  const BlendTelemetryCall call = {weights.const_data_ptr(),
                                   params.const_data_ptr(),
                                   bounds_of(segments),
                                   theta.mutable_data_ptr(),
                                   static_cast<double*>(square_partials.mutable_data_ptr()),
                                   static_cast<int32_t*>(count_partials.mutable_data_ptr()),
                                   static_cast<double*>(expert_squares.mutable_data_ptr()),
                                   static_cast<double*>(merged_squares.mutable_data_ptr()),
                                   static_cast<int64_t*>(conflicts.mutable_data_ptr()),
                                   static_cast<int64_t*>(counts.mutable_data_ptr()),
                                   shape.outputs,
                                   shape.segments,
                                   shape.experts,
                                   shape.columns,
                                   params.stride(0),
                                   slots,
                                   base.value_or(-1),
                                   1.0 / static_cast<double>(shape.experts),
                                   overflow_limit(out),
                                   element_of(out)};
  check_launch("blend_telemetry", launch_blend_telemetry(element_of(params.scalar_type()), call,
                                                         current_stream(params)));
  return {theta, counts, expert_squares, merged_squares, conflicts};
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CUDA, m) {
  m.impl("blend_telemetry", TORCH_BOX(&neulig_fast::blend_telemetry));
}
