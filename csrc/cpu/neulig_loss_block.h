// What neulig_loss and its backward share: their arguments, and the ensembled features of a block.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "cpu/neulig_loss_head.h"
#include "cpu/neulig_portland.h"
#include "cpu/neulig_queue.h"

namespace neulig_fast {

struct LossArguments {
  const char* op;
  const Tensor &features, &portland_weight, &head_weight;
  const std::optional<Tensor>&head_bias, &targets;
  const Tensor& alignment;
  const std::string& boosting;
  double scaling;
  bool normalize, centered;

  bool entropy() const {
    return boosting == "entropy";
  }
  int64_t batch() const {
    return features.size(0);
  }
  int64_t experts() const {
    return features.size(1);
  }
  int64_t width() const {
    return features.size(2);
  }
  int64_t classes() const {
    return head_weight.size(0);
  }

  void check(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes) const {
    check_exact(op, name, tensor, acc_dtype(features.scalar_type()), sizes);
  }
  void check(const char* name, const std::optional<Tensor>& tensor,
             const std::vector<int64_t>& sizes) const {
    if (tensor.has_value()) check(name, *tensor, sizes);
  }

  void check() const {
    STD_TORCH_CHECK(features.dim() == 3 && features.numel() > 0 && experts() <= kMaxExperts, op,
                    ": features must be (B, N, D) with N <= ", kMaxExperts, ", got ",
                    shape_text(features));
    const int64_t n = experts(), d = width();
    STD_TORCH_CHECK((d == 1 || features.stride(2) == 1) && (n == 1 || features.stride(1) == d), op,
                    ": a sample's (N, D) features must be contiguous");
    const ScalarType dtype = features.scalar_type(), acc = acc_dtype(dtype);
    check_float(op, "features", dtype);
    STD_TORCH_CHECK(head_weight.dim() == 2 && head_weight.size(1) == d && classes() >= 1 &&
                        head_weight.scalar_type() == acc && (d == 1 || head_weight.stride(1) == 1),
                    op, ": head_weight must be ", toString(acc), " (C, D) with D = ", d,
                    " and stride 1 along it, got ", shape_text(head_weight), " ",
                    toString(head_weight.scalar_type()));
    check("portland_weight", portland_weight, {n, n * d});
    check("alignment", alignment, {n, n});
    check("head_bias", head_bias, {classes()});
    STD_TORCH_CHECK(entropy() || boosting == "supervised", op,
                    ": boosting must be supervised or entropy, got ", boosting);
    if (entropy()) return;
    STD_TORCH_CHECK(targets.has_value(), op, ": targets are needed for boosting='supervised'");
    check_exact(op, "targets", *targets, ScalarType::Long, {batch()});
    const auto* target = static_cast<const int64_t*>(targets->const_data_ptr());
    for (int64_t b = 0; b < batch(); ++b)
      STD_TORCH_CHECK(target[b] >= 0 && target[b] < classes(), op, ": targets must be in [0, ",
                      classes(), "), got ", target[b]);
  }
};

template <typename A>
const A* data_of(const Tensor& tensor) {
  return static_cast<const A*>(tensor.const_data_ptr());
}

template <typename A>
const A* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data_of<A>(*tensor) : nullptr;
}

// A + A', (N, N).
template <typename A>
std::vector<A> symmetric_sum(const A* matrix, int64_t n) {
  std::vector<A> both(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) both[i * n + j] = matrix[i * n + j] + matrix[j * n + i];
  return both;
}

// The mean of w (B, N) over samples where `centered`, else zeros.
template <typename A>
std::vector<A> origin_of(const A* w, int64_t batch, int64_t n, bool centered) {
  std::vector<A> mean(n, A(0));
  if (!centered) return mean;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) mean[i] += w[b * n + i];
  for (A& m : mean) m /= A(batch);
  return mean;
}

// The alignment term of one sample: v = w - origin, slopes = (A + A') v, and v' A v.
template <typename A>
A align_sample(const std::vector<A>& both, const std::vector<A>& origin, const A* w, A* v,
               A* slopes) {
  const int64_t n = origin.size();
  std::fill(slopes, slopes + n, A(0));
  for (int64_t i = 0; i < n; ++i) {
    v[i] = w[i] - origin[i];
    for (int64_t j = 0; j < n; ++j) slopes[j] += both[i * n + j] * v[i];
  }
  A square = 0;
  for (int64_t i = 0; i < n; ++i) square += slopes[i] * v[i];
  return square / 2;
}

// e = e / |e|, and |e|.
template <typename A>
struct UnitRow {
  A* e;
  int64_t columns;
  A* norm;
};

template <int kLanes, typename A>
NF_INLINE A product_of_rows(const A* x, const A* y, int64_t columns) {
  constexpr int kParts = kStep / kLanes;
  A lanes[kStep];
  Vec<A, kLanes> sum[kParts] = {};
  for (int64_t p = 0; p < columns; p += kStep)
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = p + part * kLanes;
      sum[part] = multiply_add<kLanes>(load<kLanes>(x + at), load<kLanes>(y + at), sum[part]);
    }
  for (int part = 0; part < kParts; ++part) store<kLanes>(lanes + part * kLanes, sum[part]);
  return sum_lanes(lanes);
}

template <typename A>
struct MakeUnit {
  template <int kBytes>
  static NF_INLINE void run(const UnitRow<A>& r) {
    constexpr int kLanes = kBytes / sizeof(A);
    *r.norm = std::sqrt(product_of_rows<kLanes>(r.e, r.e, r.columns));
    for (int64_t p = 0; p < r.columns; p += kLanes)
      store<kLanes>(r.e + p, load<kLanes>(r.e + p) / *r.norm);
  }
};

// d = scale (I - e e') d, or without the projection where e is null.
template <typename A>
struct SlopeRow {
  const A* e;
  A* d;
  int64_t columns;
  A scale;
};

template <typename A>
struct ProjectSlope {
  template <int kBytes>
  static NF_INLINE void run(const SlopeRow<A>& r) {
    constexpr int kLanes = kBytes / sizeof(A);
    const A along = r.e == nullptr ? A(0) : product_of_rows<kLanes>(r.e, r.d, r.columns);
    for (int64_t p = 0; p < r.columns; p += kLanes) {
      auto d = load<kLanes>(r.d + p);
      if (r.e != nullptr) d = d - load<kLanes>(r.e + p) * along;
      store<kLanes>(r.d + p, d * r.scale);
    }
  }
};

// A batch as the kernels read it.
template <typename T>
struct LossBatch {
  using A = Acc<T>;
  explicit LossBatch(const LossArguments& a)
      : features(data_of<T>(a.features)),
        stride(a.features.stride(0)),
        batch(a.batch()),
        width(a.width()),
        layout(a.experts(), a.width()),
        head{data_of<A>(a.head_weight),
             a.head_weight.stride(0),
             a.classes(),
             a.width(),
             data_of<A>(a.head_bias),
             a.entropy()},
        targets(a.entropy() ? nullptr : data_of<int64_t>(a.targets)),
        normalize(a.normalize) {}

  int64_t blocks() const {
    return (batch + kBlock - 1) / kBlock;
  }
  int64_t block_size(int64_t block) const {
    return std::min<int64_t>(kBlock, batch - block * kBlock);
  }

  const T* features;
  int64_t stride, batch, width;
  PortlandLayout layout;
  LossHead<A> head;
  const int64_t* targets;
  bool normalize;
};

// A worker's scratch for one block of samples.
template <typename T>
class LossBlock {
 public:
  using A = Acc<T>;
  Rows<T> u, z;  // the block's samples; the experts' features of one
  HeadPasses<A> passes;

  explicit LossBlock(const LossBatch<T>& batch)
      : u(kBlock, batch.layout.inputs),
        z(batch.layout.experts, batch.width),
        passes(batch.head),
        batch_(batch),
        stride_(padded_stride(batch.width)) {}

  void take(int64_t block) {
    first_ = block * kBlock;
    u.take(batch_.block_size(block),
           [&](int64_t k) { return batch_.features + (first_ + k) * batch_.stride; });
  }

  // z becomes the experts' features of the block's sample k.
  void take_experts(int64_t k) {
    z.take(batch_.layout.experts, [&](int64_t i) { return u[k] + i * batch_.width; });
  }

  // For CoopVecs w (count, N): unit (kBlock, stride), the ensembled features over their norms
  // (count,), the same as (D, kBlock) in `turned`, and the block's targets.
  void ensemble(const A* w, A* unit, A* turned, A* norms, Softmax<A>& s) {
    const int64_t n = batch_.layout.experts;
    for (int64_t k = 0; k < u.count(); ++k) {
      A* e = unit + k * stride_;
      take_experts(k);
      outer_sums(z, w + k * n, 1, 0, z.columns(), e, stride_, 1, true);
      norms[k] = 1;
      if (batch_.normalize) run_kernel<MakeUnit<A>>(UnitRow<A>{e, z.columns(), norms + k});
    }
    for (int64_t p = 0; p < batch_.width; ++p)
      for (int64_t k = 0; k < kBlock; ++k) turned[p * kBlock + k] = unit[k * stride_ + p];
    s.begin(batch_.targets == nullptr ? nullptr : batch_.targets + first_, u.count());
  }

 private:
  const LossBatch<T>& batch_;
  int64_t stride_, first_ = 0;
};

}  // namespace neulig_fast
