// s = x + residual, then (s - mean s) / sqrt(var s + eps) * gain + shift, row by row, for groups of
// rows that have a gain and a shift each: experts, or samples with a mix of the experts' ones.
//
// x, residual, s and y (G, R, D) contiguous, weight and bias (N, D) of any row stride, all fp32 |
// bf16 | fp16 | fp64. s is rounded to their type; all else in fp32 (fp64 for fp64), the variance
// from deviations. Bytes: x and residual read once, s and y written once.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/vector_math.h"
#include "cpu/layer_tiles.h"

namespace neulig_fast {

constexpr int64_t kNormRows = 64;  // rows a thread takes at a time: mixing costs as much as a few
constexpr int kNormStep = 16;      // columns of one step, and partial sums of a row

template <typename T>
struct NormRows {
  const T *x, *residual;  // residual or null
  T *y, *s;               // s or null, as residual
  const Acc<T>*gain, *shift;
  int64_t rows, width;  // width padded: gain, shift and row hold whole steps
  Acc<T> eps;
  Acc<T>* row;

  template <int kBytes>
  static NF_INLINE void run(const NormRows& args) {
    NormRows n = args;
    for (int64_t r = 0; r < args.rows; ++r) {
      n.template one<kBytes>();
      n.x += n.width;
      n.y += n.width;
      if (n.residual != nullptr) n.residual += n.width, n.s += n.width;
    }
  }

  template <int kBytes>
  NF_INLINE void one() const {
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    using V = Vec<Acc<T>, kLanes>;
    const int64_t steps = width / kNormStep * kNormStep, padded = steps + kNormStep;
    const bool two = residual != nullptr;
    read<kBytes>(x, residual, s, row, steps);
    T tail[3][kNormStep] = {};
    std::copy_n(x + steps, width - steps, tail[0]);
    if (two) std::copy_n(residual + steps, width - steps, tail[1]);
    read<kBytes>(tail[0], two ? tail[1] : nullptr, tail[2], row + steps, kNormStep);
    if (two) std::copy_n(tail[2], width - steps, s + steps);

    // The mean of large values is rounded like them; that of what is left of them is not.
    for (int pass = 0; pass < 2; ++pass) {
      const Acc<T> mean = total<kBytes, false>(padded) / width;
      for (int64_t k = 0; k < width; ++k) row[k] -= mean;  // not the padding
    }
    const Acc<T> variance = total<kBytes, true>(padded) / width;
    const Acc<T> scale = 1 / std::sqrt(variance + eps);
    const V scales = broadcast<kBytes, V>(scale);
    alignas(64) T end[kNormStep];
    for (int64_t k = 0; k < padded; k += kLanes) {
      const V value = product_sum<kBytes>(load<kLanes>(row + k) * scales, load<kLanes>(gain + k),
                                          load<kLanes>(shift + k));
      store<kLanes>(k < steps ? y + k : end + k - steps, value);
    }
    std::copy_n(end, width - steps, y + steps);
  }

  // to = from + beside, rounded to T if there is one.
  template <int kBytes>
  static NF_INLINE void read(const T* from, const T* beside, T* sum, Acc<T>* to, int64_t count) {
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    for (int64_t k = 0; k < count; k += kLanes) {
      if (beside == nullptr) {
        store<kLanes>(to + k, load<kLanes>(from + k));
        continue;
      }
      store<kLanes>(sum + k, load<kLanes>(from + k) + load<kLanes>(beside + k));
      store<kLanes>(to + k, load<kLanes>(sum + k));
    }
  }

  template <int kBytes, bool kSquares>
  NF_INLINE Acc<T> total(int64_t count) const {
    constexpr int kLanes = kBytes / sizeof(Acc<T>), kParts = kNormStep / kLanes;
    using V = Vec<Acc<T>, kLanes>;
    V sums[kParts] = {};
    for (int64_t k = 0; k < count; k += kNormStep)
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const V value = load<kLanes>(row + k + part * kLanes);
        sums[part] = kSquares ? product_sum<kBytes>(value, value, sums[part]) : sums[part] + value;
      }
    Acc<T> sum = 0;
    for (int part = 0; part < kParts; ++part)
      for (int lane = 0; lane < kLanes; ++lane) sum += sums[part][lane];
    return sum;
  }
};

// Rows of weight (N, D), mixed: sum_i w_i weight_i over the experts that take part, padded with
// zeros.
template <typename T>
void mix_vectors(const T* weight, int64_t stride, const Acc<T>* w, int64_t experts, int64_t width,
                 std::vector<Acc<T>>& mixed) {
  mixed.assign(width / kNormStep * kNormStep + kNormStep, 0);
  for (int64_t i = 0; i < experts; ++i)
    for (int64_t k = 0; k < width && w[i] != 0; ++k)
      mixed[k] += w[i] * load<1>(weight + i * stride + k)[0];
}

struct NormTensors {
  const char* op;
  Tensor y, s, x, weight;
  std::optional<Tensor> bias, residual;
  double eps;

  void check() const {
    const auto whole = [&](const char* name, const Tensor& t) {
      STD_TORCH_CHECK(t.dim() == 3 && t.is_contiguous() && t.numel() == x.numel() &&
                          t.scalar_type() == x.scalar_type(),
                      op, ": ", name, " must be (G, R, D), contiguous and like x, got ",
                      shape_text(t));
    };
    whole("x", x);
    whole("y", y);
    if (residual.has_value()) whole("residual", *residual), whole("s", s);
    const auto vectors = [&](const char* name, const Tensor& t) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == weight.size(0) && t.size(1) == x.size(2) &&
                          t.scalar_type() == x.scalar_type(),
                      op, ": ", name, " must be (N, D) in x's dtype, got ", shape_text(t));
      check_inner_stride(op, name, t);
    };
    vectors("weight", weight);
    if (bias.has_value()) vectors("bias", *bias);
  }

  // coef (G, N): the experts' shares in the gain and shift of every group.
  template <typename T>
  void all(const Acc<T>* coef) const {
    const int64_t groups = x.size(0), rows = x.size(1), width = x.size(2);
    const int64_t experts = weight.size(0), pieces = (rows + kNormRows - 1) / kNormRows;
    const auto kernel = kernel_at<NormRows<T>, NormRows<T>>(cpu_level());
    for_each_item(groups * pieces, x.numel(), [&](int64_t item) {
      static thread_local std::vector<Acc<T>> gain, shift, row;
      const int64_t group = item / pieces, first = item % pieces * kNormRows;
      const int64_t start = (group * rows + first) * width;
      const Acc<T>* w = coef + group * experts;
      mix_vectors(data<const T>(weight), weight.stride(0), w, experts, width, gain);
      if (bias.has_value())
        mix_vectors(data<const T>(*bias), bias->stride(0), w, experts, width, shift);
      else shift.assign(gain.size(), 0);
      row.resize(gain.size());
      const bool two = residual.has_value();
      kernel({data<const T>(x) + start, two ? data<const T>(*residual) + start : nullptr,
              data<T>(y) + start, two ? data<T>(s) + start : nullptr, gain.data(), shift.data(),
              std::min(kNormRows, rows - first), width, static_cast<Acc<T>>(eps), row.data()});
    });
  }

  template <typename T>
  static T* data(const Tensor& t) {
    if constexpr (std::is_const_v<T>) return static_cast<T*>(t.const_data_ptr());
    else return static_cast<T*>(t.mutable_data_ptr());
  }
};

}  // namespace neulig_fast
