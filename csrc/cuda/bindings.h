// What the files that register CUDA kernels share: element types, device, stream, launch errors.
// An op's kernels are in <op>.cu, which no torch header enters; its checks, allocation and
// registration are in bind_<op>.cpp; <op>.h, which needs neither CUDA nor torch, joins the two.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/checks.h"
#include "cuda/launch.h"

// Null in a torch without CUDA, where nothing is ever dispatched to these files.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace neulig_fast {

constexpr int64_t kMaxExperts = 64;

inline Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kHalf;
    case ScalarType::Float8_e4m3fn: return Element::kFloat8E4M3;
    case ScalarType::Float8_e5m2: return Element::kFloat8E5M2;
    default: return Element::kFloat;  // check_params has refused all others
  }
}

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": launching the CUDA kernel failed: ", error);
}

// What launching adds to the common checks: one device, 64 experts, and a segment for every column.
inline void check_device_call(const char* op, const char* name, const Tensor& other,
                              const Tensor& params, const std::optional<Tensor>& segments,
                              const BlendShape& shape) {
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

inline const int64_t* bounds_of(const std::optional<Tensor>& segments) {
  return segments.has_value() ? static_cast<const int64_t*>(segments->const_data_ptr()) : nullptr;
}

}  // namespace neulig_fast
