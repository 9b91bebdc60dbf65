// The gradients of NeuLig's loss                                      (neulig_loss_backward, CPU)
//
// neulig_fast/ops/neulig_loss_backward.py has the formulas. Everything is in the accumulation type,
// fp32 (fp64 for fp64 features). First, blocks of 16 samples: logits again, in tiles of 16 classes,
// and from them dL/de, dL/da and the gradient of the features. Then, where they are needed, pieces
// of dW and tiles of dH, each over all samples in order: no two threads add to one sum, and the
// bits do not depend on threads or instruction set.
//
// From memory: the features once or, for dW, twice; the head's C D values once per block (from the
// caches, where they hold it), in three passes for the entropy. For the Portland's gradients
// 2 B (N N D + 2 N D + 2 D C) flops.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/neulig_loss_block.h"

namespace neulig_fast {
namespace {

constexpr int64_t kPiece = 256;  // columns of dW of an item

// By name; null where a gradient is not needed.
template <typename A>
struct LossGradients {
  A *features, *weight, *bias, *head, *head_bias, *alignment;
};

template <typename A>
struct LossIncoming {
  const A *w, *grad_w;    // (B, N): CoopVecs, and their own gradient or null
  A boosting, alignment;  // what the gradients of the terms, summed over samples, come times
};

template <typename T>
class LossBackward {
 public:
  using A = Acc<T>;
  LossBackward(const LossArguments& a, const LossIncoming<A>& in, const LossGradients<A>& out)
      : batch_(a),
        in_(in),
        out_(out),
        n_(a.experts()),
        stride_(padded_stride(a.width())),
        both_(symmetric_sum(data_of<A>(a.alignment), n_)),
        origin_(origin_of(in.w, a.batch(), n_, a.centered)),
        weight_(data_of<A>(a.portland_weight)),
        pieces_(out.weight == nullptr ? 0 : (batch_.layout.inputs + kPiece - 1) / kPiece),
        tiles_(out.head == nullptr && out.head_bias == nullptr
                   ? 0
                   : (batch_.head.classes + kBlock - 1) / kBlock),
        workers_(workers_for(
            batch_.batch * (batch_.layout.inputs * n_ + batch_.head.classes * batch_.width),
            std::max(batch_.blocks(), pieces_ + tiles_))),
        kept_(tiles_ > 0 ? batch_.blocks() : workers_),
        unit_(kept_ * kBlock * stride_),
        turned_(kept_ * kBlock * batch_.width),
        softmax_(kept_),
        da_(batch_.batch * n_) {}

  void run() {
    std::vector<Worker> workers;
    for (int64_t k = 0; k < workers_; ++k) workers.emplace_back(batch_);
    PhaseQueue queue;
    queue.add_phase(batch_.blocks());
    queue.add_phase(pieces_ + tiles_);
    queue.run(workers_, [&](int64_t worker, int64_t phase, int64_t item) {
      if (phase == 0) return block(workers[worker], item, tiles_ > 0 ? item : worker);
      if (item < pieces_) return piece(workers[worker], item);
      tile(workers[worker], item - pieces_);
    });
    small_sums();
  }

 private:
  struct Worker {
    explicit Worker(const LossBatch<T>& batch)
        : block(batch),
          rows(std::max<int64_t>(kBlock, batch.layout.experts), batch.layout.inputs),
          unit(kBlock, batch.width),
          d(kBlock * padded_stride(batch.width)),
          lanes(whole_steps(batch.layout.experts) * kStep),
          sums(std::max(batch.layout.experts * std::max(kPiece, whole_steps(batch.width)),
                        kBlock * padded_stride(batch.width))) {}
    LossBlock<T> block;
    Rows<A> rows, unit;  // of W; of a block's ensembled features
    Lines<A> d, lanes, sums;
  };

  void block(Worker& worker, int64_t item, int64_t kept);
  void sample(Worker& worker, int64_t b, int64_t k, const A* d);
  void features_of(Worker& worker, int64_t b, const A* d);
  void piece(Worker& worker, int64_t item);
  void tile(Worker& worker, int64_t item);
  void small_sums();

  const LossBatch<T> batch_;
  const LossIncoming<A> in_;
  const LossGradients<A> out_;
  const int64_t n_, stride_;
  const std::vector<A> both_, origin_;
  const A* weight_;
  const int64_t pieces_, tiles_, workers_;
  // Of every block where tiles of dH come after them, else of every worker's present block.
  const int64_t kept_;
  Lines<A> unit_, turned_;           // (kept, kBlock, stride), (kept, D, kBlock)
  std::vector<Softmax<A>> softmax_;  // (kept,)
  Lines<A> da_;                      // (B, N)
};

template <typename T>
void LossBackward<T>::block(Worker& worker, int64_t item, int64_t kept) {
  const int64_t first = item * kBlock, count = batch_.block_size(item);
  A* unit = unit_.data() + kept * kBlock * stride_;
  A* turned = turned_.data() + kept * kBlock * batch_.width;
  A *d = worker.d.data(), norms[kBlock];
  Softmax<A>& s = softmax_[kept];
  worker.block.take(item);
  worker.block.ensemble(in_.w + first * n_, unit, turned, norms, s);
  worker.block.passes.gradient(turned, count, s, d);
  for (int64_t k = 0; k < count; ++k) {
    const A divisor = batch_.head.entropy ? norms[k] : norms[k] * s.total[k];
    run_kernel<ProjectSlope<A>>(SlopeRow<A>{batch_.normalize ? unit + k * stride_ : nullptr,
                                            d + k * stride_, whole_steps(batch_.width),
                                            in_.boosting / divisor});
    sample(worker, first + k, k, d + k * stride_);
  }
}

// da of sample b, the block's k-th; d = dL/de.
template <typename T>
void LossBackward<T>::sample(Worker& worker, int64_t b, int64_t k, const A* d) {
  const A* w = in_.w + b * n_;
  A v[kMaxExperts], q[kMaxExperts], along = 0, *lanes = worker.lanes.data();
  align_sample(both_, origin_, w, v, q);
  worker.block.take_experts(k);
  row_dots(worker.block.z, d, stride_, 1, lanes);
  for (int64_t i = 0; i < n_; ++i) {
    q[i] = sum_lanes(lanes + i * kStep) + in_.alignment * q[i];
    if (in_.grad_w != nullptr) q[i] += in_.grad_w[b * n_ + i];
    along += w[i] * q[i];
  }
  for (int64_t i = 0; i < n_; ++i) da_.data()[b * n_ + i] = w[i] * (q[i] - along);
  if (out_.features != nullptr) features_of(worker, b, d);
}

// w_i d + (W' da)_i
template <typename T>
void LossBackward<T>::features_of(Worker& worker, int64_t b, const A* d) {
  A *sums = worker.sums.data(), *out = out_.features + b * batch_.layout.inputs;
  worker.rows.take(n_, [&](int64_t i) { return weight_ + i * batch_.layout.inputs; });
  outer_sums(worker.rows, da_.data() + b * n_, 1, 0, worker.rows.columns(), sums, 0, 1, true);
  for (int64_t i = 0; i < n_; ++i)
    for (int64_t p = 0; p < batch_.width; ++p)
      out[i * batch_.width + p] = sums[i * batch_.width + p] + in_.w[b * n_ + i] * d[p];
}

// Some columns of dW.
template <typename T>
void LossBackward<T>::piece(Worker& worker, int64_t item) {
  const int64_t begin = item * kPiece, inputs = batch_.layout.inputs;
  const int64_t end = std::min(begin + kPiece, inputs);
  A* sums = worker.sums.data();
  for (int64_t block = 0; block < batch_.blocks(); ++block) {
    worker.block.take(block);
    outer_sums(worker.block.u, da_.data() + block * kBlock * n_, n_, begin, whole_steps(end), sums,
               kPiece, n_, block == 0);
  }
  for (int64_t i = 0; i < n_; ++i)
    std::copy(sums + i * kPiece, sums + i * kPiece + (end - begin),
              out_.weight + i * inputs + begin);
}

// dH and dh of some classes.
template <typename T>
void LossBackward<T>::tile(Worker& worker, int64_t item) {
  const int64_t begin = item * kBlock;
  const int64_t classes = std::min<int64_t>(kBlock, batch_.head.classes - begin);
  A *sums = worker.sums.data(), slopes[kBlock * kBlock], bias[kBlock] = {};
  for (int64_t block = 0; block < batch_.blocks(); ++block) {
    const int64_t count = batch_.block_size(block);
    const A* unit = unit_.data() + block * kBlock * stride_;
    const A* turned = turned_.data() + block * kBlock * batch_.width;
    const A* y = worker.block.passes.slopes(begin, turned, softmax_[block]);
    for (int64_t k = 0; k < count; ++k)
      for (int64_t c = 0; c < classes; ++c) {
        slopes[k * kBlock + c] = y[c * kBlock + k] * in_.boosting;
        bias[c] += slopes[k * kBlock + c];
      }
    if (out_.head == nullptr) continue;
    worker.unit.take(count, [&](int64_t k) { return unit + k * stride_; });
    outer_sums(worker.unit, slopes, kBlock, 0, worker.unit.columns(), sums, stride_, classes,
               block == 0);
  }
  if (out_.head_bias != nullptr) std::copy(bias, bias + classes, out_.head_bias + begin);
  if (out_.head != nullptr)
    for (int64_t c = 0; c < classes; ++c)
      std::copy(sums + c * stride_, sums + c * stride_ + batch_.width,
                out_.head + (begin + c) * batch_.width);
}

// dc and dA.
template <typename T>
void LossBackward<T>::small_sums() {
  if (out_.bias != nullptr) std::fill(out_.bias, out_.bias + n_, A(0));
  if (out_.alignment != nullptr) std::fill(out_.alignment, out_.alignment + n_ * n_, A(0));
  for (int64_t b = 0; b < batch_.batch; ++b)
    for (int64_t i = 0; i < n_; ++i) {
      if (out_.bias != nullptr) out_.bias[i] += da_.data()[b * n_ + i];
      if (out_.alignment == nullptr) continue;
      const A v = in_.alignment * (in_.w[b * n_ + i] - origin_[i]);
      for (int64_t j = 0; j < n_; ++j)
        out_.alignment[i * n_ + j] += v * (in_.w[b * n_ + j] - origin_[j]);
    }
}

using Optional = std::optional<Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The sum of gradients that are there, none or one number each.
template <typename A>
A incoming(const Optional& one, const Optional& other) {
  A sum = 0;
  for (const Optional* grad : {&one, &other})
    if (grad->has_value()) sum += *data_of<A>(*grad);
  return sum;
}

template <typename T>
void run(const LossArguments& a, const std::vector<bool>& needs, std::vector<Tensor>& results,
         const LossIncoming<Acc<T>>& in) {
  cpu_level();  // one that cannot be is an error here, not where threads wait for each other
  const auto data = [&](int k) {
    return needs[k] ? static_cast<Acc<T>*>(results[k].mutable_data_ptr()) : nullptr;
  };
  LossBackward<T>(a, in, {data(0), data(1), data(2), data(3), data(4), data(5)}).run();
}

// Empty where they are not needed.
std::vector<Tensor> new_gradients(const LossArguments& a, const Tensor& like,
                                  const std::vector<bool>& needs) {
  const int64_t n = a.experts(), d = a.width(), c = a.classes();
  const std::vector<int64_t> sizes[6] = {{a.batch(), n, d}, {n, n * d}, {n}, {c, d}, {c}, {n, n}};
  std::vector<Tensor> results;
  for (int k = 0; k < 6; ++k)
    results.push_back(
        torch::stable::new_empty(like, needs[k] ? sizes[k] : std::vector<int64_t>{0}));
  return results;
}

SixTensors neulig_loss_backward(Optional grad_loss, Optional grad_boosting, Optional grad_alignment,
                                Optional grad_coopvec, const Tensor& coopvec,
                                const Tensor& features, const Tensor& portland_weight,
                                const Tensor& head_weight, Optional head_bias, Optional targets,
                                const Tensor& alignment, std::string boosting, double scaling,
                                bool normalize, bool centered, std::vector<bool> needs) {
  const LossArguments a{"neulig_loss_backward",
                        features,
                        portland_weight,
                        head_weight,
                        head_bias,
                        targets,
                        alignment,
                        boosting,
                        scaling,
                        normalize,
                        centered};
  a.check();
  const int64_t n = a.experts();
  a.check("coopvec", coopvec, {a.batch(), n});
  a.check("grad_coopvec", grad_coopvec, {a.batch(), n});
  a.check("grad_loss", grad_loss, {});
  a.check("grad_boosting", grad_boosting, {});
  a.check("grad_alignment", grad_alignment, {});
  STD_TORCH_CHECK(needs.size() == 6, "neulig_loss_backward: needs must be 6 flags, got ",
                  needs.size());
  std::vector<Tensor> results = new_gradients(a, coopvec, needs);
  visit_dtype(features.scalar_type(), [&](auto element) {
    using A = Acc<decltype(element)>;
    const A batch = static_cast<A>(a.batch());
    run<decltype(element)>(a, needs, results,
                           {data_of<A>(coopvec), data_of<A>(grad_coopvec),
                            incoming<A>(grad_loss, grad_boosting) / batch,
                            incoming<A>(grad_loss, grad_alignment) / (A(scaling) * batch)});
  });
  return {results[0], results[1], results[2], results[3], results[4], results[5]};
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("neulig_loss_backward", TORCH_BOX(&neulig_fast::neulig_loss_backward));
}
