// The CUDA kernels as operators: checks, allocation, device and stream. Kernels and launchers are
// in the .cu files, which no torch header enters.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/checks.h"
#include "cuda/launch.h"

// Null in a torch without CUDA, where nothing is ever dispatched to this file.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace neulig_fast {
namespace {

constexpr int64_t kMaxExperts = 64;

Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kHalf;
    default: return Element::kFloat;  // check_params has refused all others
  }
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": launching the CUDA kernel failed: ", error);
}

// What launching adds to the common checks: one device, 64 experts, and a segment for every column.
void check_device_call(const char* op, const char* name, const Tensor& other, const Tensor& params,
                       const std::optional<Tensor>& segments, const BlendShape& shape) {
  const int32_t device = params.get_device_index();
  STD_TORCH_CHECK(other.is_cuda() && other.get_device_index() == device, op, ": ", name,
                  " must be on params' device, CUDA ", device);
  STD_TORCH_CHECK(
      !segments.has_value() || (segments->is_cuda() && segments->get_device_index() == device), op,
      ": segments must be on params' device, CUDA ", device);
  STD_TORCH_CHECK(shape.experts <= kMaxExperts, op, ": ", shape.experts, " experts, more than ",
                  kMaxExperts);
  STD_TORCH_CHECK(shape.segments > 0 || shape.columns == 0, op, ": segments have no segment for ",
                  shape.columns, " columns");
}

const int64_t* bounds_of(const std::optional<Tensor>& segments) {
  return segments.has_value() ? static_cast<const int64_t*>(segments->const_data_ptr()) : nullptr;
}

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
  m.impl("blend", TORCH_BOX(&neulig_fast::blend));
  m.impl("blend_weight_grad", TORCH_BOX(&neulig_fast::blend_weight_grad));
}
