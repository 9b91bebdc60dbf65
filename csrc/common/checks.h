// What every backend checks of blend's and blend_weight_grad's arguments: torch.ops can be called
// without the Python door. Every error names the op, the argument, what it must be and what it is.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

#include "common/dtype.h"
#include "common/segments.h"

namespace neulig_fast {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  const auto sizes = tensor.sizes();
  text << "(";
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline ScalarType acc_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The common shape of a blend: K outputs (or gradients), S segments, N experts, P columns.
struct BlendShape {
  int64_t outputs, segments, experts, columns;
  bool many_outputs, has_segments;  // whether K and S are dimensions of the tensors
};

inline void check_inner_stride(const char* op, const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, op, ": ", name,
                  " must have stride 1 along columns, got ", tensor.stride(last));
}

inline void check_params(const char* op, const Tensor& params) {
  const ScalarType dtype = params.scalar_type();
  STD_TORCH_CHECK(params.dim() == 2 && params.size(0) >= 1, op,
                  ": params must be (N, P) with N >= 1, got ", shape_text(params));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  op, ": params must be float32, bfloat16, float16 or float64, got ",
                  toString(dtype));
  check_inner_stride(op, "params", params);
}

inline int64_t check_segments(const char* op, const std::optional<Tensor>& segments) {
  if (!segments.has_value()) return 1;
  STD_TORCH_CHECK(segments->dim() == 1 && segments->size(0) >= 1 && segments->is_contiguous(), op,
                  ": segments must be contiguous boundaries (S + 1,), got ", shape_text(*segments));
  STD_TORCH_CHECK(segments->scalar_type() == ScalarType::Long, op, ": segments must be int64, got ",
                  toString(segments->scalar_type()));
  return segments->size(0) - 1;
}

// weights (N,), (K, N), (S, N) or (K, S, N); params (N, P); segments (S + 1,) or none.
inline BlendShape check_blend(const Tensor& weights, const Tensor& params,
                              const std::optional<Tensor>& segments) {
  check_params("blend", params);
  const int64_t count = check_segments("blend", segments);
  const int64_t experts = params.size(0);
  const int64_t dims = weights.dim(), single = segments.has_value() ? 2 : 1;
  STD_TORCH_CHECK(
      (dims == single || dims == single + 1) && weights.size(dims - 1) == experts &&
          (single == 1 || weights.size(dims - 2) == count),
      "blend: weights must be ", segments.has_value() ? "(S, N) or (K, S, N)" : "(N,) or (K, N)",
      " with N = ", experts, segments.has_value() ? ", S = " + std::to_string(count) : "", ", got ",
      shape_text(weights));
  STD_TORCH_CHECK(weights.scalar_type() == acc_dtype(params.scalar_type()),
                  "blend: weights must be ", toString(acc_dtype(params.scalar_type())), " for ",
                  toString(params.scalar_type()), " params, got ", toString(weights.scalar_type()));
  STD_TORCH_CHECK(weights.is_contiguous(), "blend: weights must be contiguous");
  const bool many = dims == single + 1;
  return {many ? weights.size(0) : 1, count, experts, params.size(1), many, segments.has_value()};
}

// grad (P,) or (K, P); params (N, P); segments (S + 1,) or none.
inline BlendShape check_blend_weight_grad(const Tensor& grad, const Tensor& params,
                                          const std::optional<Tensor>& segments) {
  check_params("blend_weight_grad", params);
  const int64_t count = check_segments("blend_weight_grad", segments);
  const int64_t columns = params.size(1), dims = grad.dim();
  STD_TORCH_CHECK((dims == 1 || dims == 2) && grad.size(dims - 1) == columns,
                  "blend_weight_grad: grad must be (P,) or (K, P) with P = ", columns, ", got ",
                  shape_text(grad));
  STD_TORCH_CHECK(grad.scalar_type() == params.scalar_type(),
                  "blend_weight_grad: grad must have params' dtype ",
                  toString(params.scalar_type()), ", got ", toString(grad.scalar_type()));
  check_inner_stride("blend_weight_grad", "grad", grad);
  const bool many = dims == 2;
  return {many ? grad.size(0) : 1, count, params.size(0), columns, many, segments.has_value()};
}

// params (N, P); segments (S + 1,) or none.
inline BlendShape check_offset_gram(const Tensor& params, const std::optional<Tensor>& segments) {
  check_params("offset_gram", params);
  const int64_t count = check_segments("offset_gram", segments);
  return {1, count, params.size(0), params.size(1), false, segments.has_value()};
}

// Readable boundaries only (CPU): they must ascend from 0 to the width of a row.
inline void check_bounds(const char* op, const int64_t* bounds, int64_t count, int64_t columns) {
  bool ascending = true;
  for (int64_t s = 0; s < count; ++s) ascending &= bounds[s] <= bounds[s + 1];
  STD_TORCH_CHECK(ascending && bounds[0] == 0 && bounds[count] == columns, op,
                  ": segments must ascend from 0 to P = ", columns, ", got ", bounds[0], " to ",
                  bounds[count], ascending ? "" : ", not ascending");
}

// The boundaries to walk: those given, or `whole` = {0, P}.
inline Segments segments_view(const char* op, const std::optional<Tensor>& segments,
                              const int64_t* whole, const BlendShape& shape) {
  if (!segments.has_value()) return {whole, 1};
  const auto* bounds = static_cast<const int64_t*>(segments->const_data_ptr());
  check_bounds(op, bounds, shape.segments, shape.columns);
  return {bounds, shape.segments};
}

// Calls body with a value of the C++ element type; check_params has refused all others.
template <typename Body>
void visit_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: return body(Half{});
  }
}

}  // namespace neulig_fast
