// What every backend checks of the arguments of ops on an arena: torch.ops can be called
// without the Python door. Every error names the op, the argument, what it must be and what it is.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

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

// Contiguous, of a type and of these sizes; -1 is any.
inline void check_exact(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                        const std::vector<int64_t>& sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() &&
              tensor.scalar_type() == dtype;
  std::string wanted;
  for (size_t d = 0; d < sizes.size(); ++d) {
    fits = fits && (sizes[d] < 0 || tensor.size(d) == sizes[d]);
    wanted += (d ? ", " : "") + (sizes[d] < 0 ? "*" : std::to_string(sizes[d]));
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must be contiguous ", toString(dtype), " (", wanted,
                  "), got ", shape_text(tensor), " ", toString(tensor.scalar_type()));
}

// A type that sums are formed of as it is.
inline void check_float(const char* op, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  op, ": ", name, " must be float32, bfloat16, float16 or float64, got ",
                  toString(dtype));
}

inline bool is_fp8(ScalarType dtype) {
  return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2;
}

inline bool is_narrow(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || is_fp8(dtype);
}

inline void check_params(const char* op, const Tensor& params, bool fp8 = false) {
  const ScalarType dtype = params.scalar_type();
  STD_TORCH_CHECK(params.dim() == 2 && params.size(0) >= 1, op,
                  ": params must be (N, P) with N >= 1, got ", shape_text(params));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      (fp8 && is_fp8(dtype)),
                  op, ": params must be float32, bfloat16, float16 or float64",
                  fp8 ? " or fp8" : "", ", got ", toString(dtype));
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

// theta (P,) or (K, P), in any type that params may have; contiguous columns, rows apart.
inline void check_theta(const Tensor& theta, const BlendShape& shape,
                        const std::optional<int64_t>& seed) {
  const ScalarType dtype = theta.scalar_type();
  const int64_t dims = shape.many_outputs ? 2 : 1;
  STD_TORCH_CHECK(theta.dim() == dims && theta.size(dims - 1) == shape.columns &&
                      (dims == 1 || theta.size(0) == shape.outputs),
                  "blend: out must be (P,) or (K, P) with P = ", shape.columns,
                  ", K = ", shape.outputs, ", got ", shape_text(theta));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || is_narrow(dtype),
                  "blend: out must be float32, bfloat16, float16, float64 or fp8, got ",
                  toString(dtype));
  STD_TORCH_CHECK(!seed.has_value() || is_narrow(dtype),
                  "blend: nothing to round stochastically to ", toString(dtype));
  check_inner_stride("blend", "out", theta);
  STD_TORCH_CHECK(dims == 1 || shape.outputs == 1 || theta.stride(0) >= shape.columns,
                  "blend: the rows of out overlap");
}

// weights (N,), (K, N), (S, N) or (K, S, N); params (N, P); segments (S + 1,) or none.
inline BlendShape check_weighted(const char* op, const Tensor& weights, const Tensor& params,
                                 const std::optional<Tensor>& segments, bool fp8) {
  check_params(op, params, fp8);
  const int64_t count = check_segments(op, segments);
  const int64_t experts = params.size(0);
  const int64_t dims = weights.dim(), single = segments.has_value() ? 2 : 1;
  STD_TORCH_CHECK(
      (dims == single || dims == single + 1) && weights.size(dims - 1) == experts &&
          (single == 1 || weights.size(dims - 2) == count),
      op, ": weights must be ", segments.has_value() ? "(S, N) or (K, S, N)" : "(N,) or (K, N)",
      " with N = ", experts, segments.has_value() ? ", S = " + std::to_string(count) : "", ", got ",
      shape_text(weights));
  STD_TORCH_CHECK(weights.scalar_type() == acc_dtype(params.scalar_type()), op,
                  ": weights must be ", toString(acc_dtype(params.scalar_type())), " for ",
                  toString(params.scalar_type()), " params, got ", toString(weights.scalar_type()));
  STD_TORCH_CHECK(weights.is_contiguous(), op, ": weights must be contiguous");
  const bool many = dims == single + 1;
  return {many ? weights.size(0) : 1, count, experts, params.size(1), many, segments.has_value()};
}

inline BlendShape check_blend(const Tensor& theta, const Tensor& weights, const Tensor& params,
                              const std::optional<Tensor>& segments,
                              const std::optional<int64_t>& seed) {
  const BlendShape shape = check_weighted("blend", weights, params, segments, true);
  check_theta(theta, shape, seed);
  return shape;
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

// As blend, and a type of the result and a row that offsets start from.
inline BlendShape check_blend_telemetry(const Tensor& weights, const Tensor& params,
                                        const std::optional<Tensor>& segments,
                                        std::optional<ScalarType> out_dtype,
                                        std::optional<int64_t> base) {
  const BlendShape shape = check_weighted("blend_telemetry", weights, params, segments, false);
  const ScalarType out = out_dtype.value_or(ScalarType::Float);
  STD_TORCH_CHECK(out == ScalarType::Float || out == ScalarType::Double ||
                      out == ScalarType::BFloat16 || out == ScalarType::Half,
                  "blend_telemetry: out_dtype must be float32, bfloat16, float16 or float64, got ",
                  toString(out));
  STD_TORCH_CHECK(!base.has_value() || (*base >= 0 && *base < shape.experts),
                  "blend_telemetry: base must be a row of params, 0 to ", shape.experts - 1,
                  ", got ", base.value_or(0));
  return shape;
}

// The sizes of blend_telemetry's results.
struct TelemetrySizes {
  std::vector<int64_t> theta, counts, expert_squares, merged_squares, conflicts;
};

inline TelemetrySizes telemetry_sizes(const BlendShape& shape) {
  TelemetrySizes sizes;
  sizes.counts.push_back(2);
  if (shape.many_outputs)
    for (auto* size : {&sizes.theta, &sizes.counts, &sizes.merged_squares})
      size->push_back(shape.outputs);
  if (shape.has_segments)
    for (auto* size :
         {&sizes.counts, &sizes.expert_squares, &sizes.merged_squares, &sizes.conflicts})
      size->push_back(shape.segments);
  sizes.theta.push_back(shape.columns);
  sizes.expert_squares.push_back(shape.experts);
  return sizes;
}

// The smallest magnitude of an fp32 number that rounds to infinity in a type: half a step of the
// type beyond its largest number. (fp64 numbers are rounded to fp32 first.)
inline double overflow_limit(ScalarType dtype) {
  if (dtype == ScalarType::Half) return 65520.0;
  if (dtype == ScalarType::BFloat16) return 0x1.FFp127;
  return std::numeric_limits<double>::infinity();
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

// The same with fp8.
template <typename Body>
void visit_stored(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float8_e4m3fn: return body(Float8E4M3{});
    case ScalarType::Float8_e5m2: return body(Float8E5M2{});
    default: return visit_dtype(dtype, body);
  }
}

}  // namespace neulig_fast
