// NeuLig's loss of one batch                                                   (neulig_loss, CPU)
//
// neulig_fast/ops/neulig_loss.py has the formula. Everything is in the accumulation type, fp32
// (fp64 for fp64 features); loss terms are summed in fp64. A block of 16 samples goes from its
// features to its loss terms on one thread; the head is streamed past it in tiles of 16 classes
// with an online softmax. Sums have a fixed order: docs/ops/neulig_loss.md. The bits do not depend
// on threads or instruction set.
//
// From memory: B N D features once, the head's C D values once per block (from the caches, where
// they hold it). 2 B (N N D + N D + D C) flops, 2 B D C more for the entropy.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/neulig_loss_block.h"

namespace neulig_fast {
namespace {

template <typename A>
struct LossResults {
  A *loss, *boosting, *alignment, *coopvec;
};

template <typename T>
class LossForward {
 public:
  using A = Acc<T>;
  LossForward(const LossArguments& a, const Tensor& portland_bias, A* coopvec)
      : batch_(a),
        parameters_(portland_parameters(batch_.layout, data_of<A>(a.portland_weight),
                                        data_of<A>(portland_bias))),
        coopvec_(coopvec),
        losses_(batch_.blocks()) {}

  // Writes the CoopVecs; the boosting term.
  double run() {
    const int64_t products =
        batch_.layout.inputs * batch_.layout.experts + batch_.head.classes * batch_.head.width;
    const int64_t count = workers_for(batch_.batch * products, batch_.blocks());
    std::vector<Worker> workers;
    for (int64_t k = 0; k < count; ++k) workers.emplace_back(batch_);
    PhaseQueue queue;
    queue.add_phase(batch_.blocks());
    queue.run(count, [&](int64_t worker, int64_t, int64_t item) { block(workers[worker], item); });
    double total = 0;
    for (const double loss : losses_) total += loss;
    return total / static_cast<double>(batch_.batch);
  }

 private:
  struct Worker {
    explicit Worker(const LossBatch<T>& batch)
        : block(batch),
          portland(batch.layout),
          w(batch.layout.experts * kBlock),
          unit(kBlock * padded_stride(batch.width)),
          turned(kBlock * batch.width) {}
    LossBlock<T> block;
    Portland<T> portland;
    Lines<A> w, unit, turned;
  };

  void block(Worker& worker, int64_t item) {
    const int64_t n = batch_.layout.experts, count = batch_.block_size(item);
    A *w = coopvec_ + item * kBlock * n, norms[kBlock];
    worker.block.take(item);
    worker.portland.weigh(worker.block.u, parameters_.data(), worker.w.data());
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < n; ++i) w[k * n + i] = worker.w.data()[i * kBlock + k];
    Softmax<A> s;
    worker.block.ensemble(w, worker.unit.data(), worker.turned.data(), norms, s);
    worker.block.passes.statistics(worker.turned.data(), s);
    double loss = 0;
    for (int64_t k = 0; k < count; ++k)
      loss -= batch_.head.entropy ? s.plogp[k] : (s.at_target[k] - s.top[k]) - std::log(s.total[k]);
    losses_[item] = loss;
  }

  const LossBatch<T> batch_;
  Lines<A> parameters_;
  A* coopvec_;
  std::vector<double> losses_;
};

// v' A v / (scaling B), summed over samples.
template <typename A>
double alignment_term(const LossArguments& a, const A* w) {
  const int64_t n = a.experts();
  const auto both = symmetric_sum(data_of<A>(a.alignment), n);
  const auto origin = origin_of(w, a.batch(), n, a.centered);
  A v[kMaxExperts], slopes[kMaxExperts];
  double total = 0;
  for (int64_t b = 0; b < a.batch(); ++b) total += align_sample(both, origin, w + b * n, v, slopes);
  return total / (a.scaling * static_cast<double>(a.batch()));
}

template <typename T>
void run(const LossArguments& a, const Tensor& portland_bias, const Tensor (&results)[4]) {
  using A = Acc<T>;
  cpu_level();  // one that cannot be is an error here, not where threads wait for each other
  const auto data = [&](int k) { return static_cast<A*>(results[k].mutable_data_ptr()); };
  const double boosting = LossForward<T>(a, portland_bias, data(3)).run();
  const double alignment = alignment_term<A>(a, data(3));
  *data(0) = A(boosting + alignment);
  *data(1) = A(boosting);
  *data(2) = A(alignment);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> neulig_loss(
    const Tensor& features, const Tensor& portland_weight, const Tensor& portland_bias,
    const Tensor& head_weight, std::optional<Tensor> head_bias, std::optional<Tensor> targets,
    const Tensor& alignment, std::string boosting, double scaling, bool normalize, bool centered) {
  const LossArguments a{"neulig_loss", features, portland_weight, head_weight, head_bias, targets,
                        alignment,     boosting, scaling,         normalize,   centered};
  a.check();
  a.check("portland_bias", portland_bias, {a.experts()});
  const auto empty = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_empty(alignment, sizes);
  };
  const Tensor results[4] = {empty({}), empty({}), empty({}), empty({a.batch(), a.experts()})};
  visit_dtype(features.scalar_type(),
              [&](auto element) { run<decltype(element)>(a, portland_bias, results); });
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("neulig_loss", TORCH_BOX(&neulig_fast::neulig_loss));
}
