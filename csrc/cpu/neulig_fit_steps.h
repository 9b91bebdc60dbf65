// The steps of neulig_fit as items of work: groups of samples, then pieces of the parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/neulig_fit_block.h"
#include "cpu/neulig_queue.h"

namespace neulig_fast {

// Adam, as torch.optim.Adam writes it, with a gradient that is the sum of `groups` in order.
template <typename A>
struct AdamStep {
  const A* gradients;  // of group 0
  int64_t groups, stride;
  A *parameters, *mean, *square;
  int64_t count;  // a multiple of kStep
  A rate;         // lr / (1 - beta1^step)
  A root;         // sqrt(1 - beta2^step)
};

constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;

template <typename A>
struct Adam {
  template <int kBytes>
  static NF_INLINE void run(const AdamStep<A>& a) {
    constexpr int kLanes = kBytes / sizeof(A);
    using V = Vec<A, kLanes>;
    for (int64_t p = 0; p < a.count; p += kLanes) {
      V g = load<kLanes>(a.gradients + p);
      for (int64_t k = 1; k < a.groups; ++k) g = g + load<kLanes>(a.gradients + k * a.stride + p);
      V m = load<kLanes>(a.mean + p), v = load<kLanes>(a.square + p);
      m = m + (g - m) * A(1 - kBeta1);
      v = v * A(kBeta2) + g * g * A(1 - kBeta2);
      const V root = square_root<kLanes>(v) / a.root + A(kEpsilon);
      store<kLanes>(a.mean + p, m);
      store<kLanes>(a.square + p, v);
      store<kLanes>(a.parameters + p, load<kLanes>(a.parameters + p) - m / root * a.rate);
    }
  }
};

constexpr int kGroup = 32;        // samples of an item; gradients of groups are added in order
constexpr int64_t kPiece = 1024;  // parameters of an item

template <typename T>
class FitSteps {
 public:
  using A = Acc<T>;

  // terms (steps, 2).
  FitSteps(const std::vector<FitTask<T>>& tasks, const FitSettings<A>& settings, A* terms)
      : tasks_(tasks),
        s_(settings),
        at_(s_.experts, s_.width),
        terms_(terms),
        groups_((s_.batch + kGroup - 1) / kGroup),
        state_(3 * at_.size),
        gradients_(groups_ * at_.size),
        coopvecs_(groups_ * kGroup * s_.experts),
        sums_(groups_ * s_.experts),
        losses_(2 * groups_) {}

  void run(int64_t rounds);

  // Between (3, N N D + N) outside and the padded rows in here.
  void copy_state(A* outside, bool out);

 private:
  struct Step {
    const FitTask<T>& task;
    int64_t index;
    const int64_t* rows;
    int64_t count, groups;  // count: of rows
  };

  Step step_at(int64_t index) const;
  void group(const Step& step, int64_t group, bool weigh, bool differentiate, FitBlock<T>& block);
  void piece(const Step& step, int64_t piece);

  const std::vector<FitTask<T>>& tasks_;
  const FitSettings<A>& s_;
  const PortlandLayout at_;
  A* terms_;
  const int64_t groups_;  // of the largest batch
  Lines<A> state_;        // (3, size): parameters and their two moments
  Lines<A> gradients_;    // (groups, size)
  Lines<A> coopvecs_;     // (blocks, N, kBlock)
  Lines<A> sums_;         // (groups, N): of the CoopVecs
  Lines<double> losses_;  // (groups, 2)
};

template <typename T>
typename FitSteps<T>::Step FitSteps<T>::step_at(int64_t index) const {
  const int64_t count = tasks_.size();
  const FitTask<T>& task = tasks_[index % count];
  const int64_t first = index / count * s_.batch;
  const int64_t rows = std::min(s_.batch, task.count - first);
  return {task, index, task.rows + first, rows, (rows + kGroup - 1) / kGroup};
}

// Two phases a step; `centered` has one more, as no gradient is known before the mean of all
// CoopVecs.
template <typename T>
void FitSteps<T>::run(int64_t rounds) {
  const int64_t steps = rounds * static_cast<int64_t>(tasks_.size());
  const int64_t pieces = (at_.size + kPiece - 1) / kPiece;
  const int phases = s_.centered ? 3 : 2;
  PhaseQueue queue;
  for (int64_t k = 0; k < steps; ++k) {
    for (int phase = 1; phase < phases; ++phase) queue.add_phase(step_at(k).groups);
    queue.add_phase(pieces);
  }
  int64_t classes = 0;
  for (const FitTask<T>& task : tasks_) classes = std::max(classes, task.classes);
  const int64_t threads =
      workers_for(s_.batch * s_.experts * (at_.inputs + classes), std::max(groups_, pieces));
  std::vector<FitBlock<T>> blocks;
  blocks.reserve(threads);
  for (int64_t k = 0; k < threads; ++k) blocks.emplace_back(s_, at_, classes);
  queue.run(threads, [&](int64_t worker, int64_t phase, int64_t item) {
    const Step step = step_at(phase / phases);
    const int64_t part = phase % phases;
    if (part == phases - 1) return piece(step, item);
    group(step, item, part == 0, part == phases - 2, blocks[worker]);
  });
}

template <typename T>
void FitSteps<T>::group(const Step& step, int64_t group, bool weigh, bool differentiate,
                        FitBlock<T>& block) {
  const int64_t n = s_.experts, end = std::min((group + 1) * kGroup, step.count);
  A *sums = sums_.data() + group * n, mean[kMaxExperts] = {};
  double losses[2] = {};
  if (weigh) std::fill(sums, sums + n, A(0));
  if (differentiate && s_.centered)
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < step.groups; ++k) mean[i] += sums_.data()[k * n + i];
      mean[i] /= A(step.count);
    }
  for (int64_t k = group * kGroup; k < end; k += kBlock) {
    block.take(step.task, step.rows + k, std::min<int64_t>(kBlock, end - k));
    A* w = coopvecs_.data() + k * n;
    if (weigh) block.weigh(state_.data(), w, sums);
    if (differentiate)
      block.differentiate(w, mean, step.count, k == group * kGroup,
                          gradients_.data() + group * at_.size, losses);
  }
  if (differentiate) std::copy(losses, losses + 2, losses_.data() + 2 * group);
}

// Adam on some parameters; the first piece also writes the step's loss terms.
template <typename T>
void FitSteps<T>::piece(const Step& step, int64_t piece) {
  const int64_t begin = piece * kPiece, count = std::min(kPiece, at_.size - begin);
  const double done = static_cast<double>(s_.step + step.index + 1);
  A* state = state_.data() + begin;
  run_kernel<Adam<A>>(AdamStep<A>{gradients_.data() + begin, step.groups, at_.size, state,
                                  state + at_.size, state + 2 * at_.size, count,
                                  A(s_.lr / (1 - std::pow(kBeta1, done))),
                                  A(std::sqrt(1 - std::pow(kBeta2, done)))});
  if (piece > 0) return;
  double boosting = 0, alignment = 0;
  for (int64_t k = 0; k < step.groups; ++k) {
    boosting += losses_.data()[2 * k];
    alignment += losses_.data()[2 * k + 1];
  }
  terms_[2 * step.index] = A(boosting / static_cast<double>(step.count));
  terms_[2 * step.index + 1] = A(alignment / (s_.scaling * static_cast<double>(step.count)));
}

template <typename T>
void FitSteps<T>::copy_state(A* outside, bool out) {
  const auto copy = [&](A* inside, int64_t count) {
    if (out) std::copy(inside, inside + count, outside);
    else std::copy(outside, outside + count, inside);
    outside += count;
  };
  for (int64_t k = 0; k < 3; ++k) {
    A* row = state_.data() + k * at_.size;
    for (int64_t i = 0; i < s_.experts; ++i) copy(row + i * at_.stride, at_.inputs);
    copy(row + at_.bias, s_.experts);
  }
}

}  // namespace neulig_fast
