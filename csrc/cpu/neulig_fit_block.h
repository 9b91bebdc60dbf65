// What a worker of neulig_fit does with one block of samples: CoopVecs, loss, gradients.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/neulig_fit_head.h"
#include "cpu/neulig_portland.h"

namespace neulig_fast {

template <typename T>
struct FitTask {
  const T* features;         // (M, N, D)
  const Acc<T>* products;    // (M, N, C)
  const Acc<T>* grams;       // (M, N, N), or null: no normalisation
  std::vector<Acc<T>> bias;  // (whole steps of C,), -inf beyond C
  const int64_t* labels;     // (M,), or null: entropy
  const int64_t* rows;       // of one call, in the order of use
  int64_t count, classes;    // of rows; C
};

template <typename A>
struct FitSettings {
  int64_t experts, width;    // N, D
  std::vector<A> alignment;  // (N, N): A + A'
  int64_t step, batch;
  double lr, scaling;
  bool centered;
};

template <typename T>
class FitBlock {
 public:
  using A = Acc<T>;

  // classes: the most that any task has.
  FitBlock(const FitSettings<A>& settings, const PortlandLayout& layout, int64_t classes)
      : s_(settings),
        at_(layout),
        n_(layout.experts),
        x_(kBlock, layout.inputs),
        portland_(layout),
        rest_(n_ * kStep),
        y_(whole_steps(classes)),
        g_(whole_steps(classes)),
        slopes_(n_ * kBlock),
        da_(kBlock * n_),
        w_(n_),
        image_(n_),
        origin_(n_) {}

  // The block becomes `count` samples, 1 to kBlock, of these rows of a task.
  void take(const FitTask<T>& task, const int64_t* rows, int64_t count);
  // w (N, kBlock) = softmax(W u + c), and their sums added to `sums` (N,).
  void weigh(const A* parameters, A* w, A* sums);
  // Adds the gradient of the mean over `batch` samples to `gradient`, or begins it, and the two
  // loss terms, summed over samples, to `losses`. mean (N,): what centred CoopVecs are less.
  void differentiate(const A* w, const A* mean, int64_t batch, bool begin, A* gradient,
                     double* losses);

 private:
  void align(const A* w, const A* mean, double* loss);
  void boost(int k, A* q, double* loss);

  const FitSettings<A>& s_;
  const PortlandLayout& at_;
  const int64_t n_;
  const FitTask<T>* task_ = nullptr;
  int count_ = 0;
  int64_t row_[kBlock];
  Rows<T> x_;
  Portland<T> portland_;
  Lines<A> rest_;                // (N, kStep): products after whole steps
  Lines<A> y_, g_;               // (C,)
  Lines<A> slopes_;              // (N, kBlock), of the alignment term
  Lines<A> da_;                  // (kBlock, N)
  Lines<A> w_, image_, origin_;  // (N,), of one sample; image: K w
};

template <typename T>
void FitBlock<T>::take(const FitTask<T>& task, const int64_t* rows, int64_t count) {
  task_ = &task;
  count_ = static_cast<int>(count);
  std::copy(rows, rows + count, row_);
  x_.take(count, [&](int64_t k) { return task.features + rows[k] * at_.inputs; });
}

template <typename T>
void FitBlock<T>::weigh(const A* parameters, A* w, A* sums) {
  portland_.weigh(x_, parameters, w);
  for (int64_t i = 0; i < n_; ++i)
    for (int k = 0; k < count_; ++k) sums[i] += w[i * kBlock + k];
}

template <typename T>
void FitBlock<T>::differentiate(const A* w, const A* mean, int64_t batch, bool begin, A* gradient,
                                double* losses) {
  align(w, mean, losses + 1);
  A* bias = gradient + at_.bias;
  if (begin) std::fill(bias, bias + whole_steps(n_), A(0));
  const A weight = A(1 / s_.scaling);
  for (int k = 0; k < count_; ++k) {
    A *one = w_.data(), *q = da_.data() + k * n_;
    for (int64_t i = 0; i < n_; ++i) one[i] = w[i * kBlock + k];
    boost(k, q, losses);
    A along = 0;
    for (int64_t i = 0; i < n_; ++i) {
      q[i] += weight * slopes_.data()[i * kBlock + k];
      along += one[i] * q[i];
    }
    for (int64_t i = 0; i < n_; ++i) {
      q[i] = one[i] * (q[i] - along) / A(batch);
      bias[i] += q[i];
    }
  }
  outer_sums(x_, da_.data(), n_, 0, x_.columns(), gradient, at_.stride, n_, begin);
}

// slopes = (A + A') v for v = w - mean.
template <typename T>
void FitBlock<T>::align(const A* w, const A* mean, double* loss) {
  for (int64_t i = 0; i < n_; ++i) {
    A* slope = slopes_.data() + i * kBlock;
    std::fill(slope, slope + kBlock, A(0));
    for (int64_t j = 0; j < n_; ++j)
      for (int k = 0; k < kBlock; ++k)
        slope[k] += s_.alignment[i * n_ + j] * (w[j * kBlock + k] - mean[j]);
    for (int k = 0; k < count_; ++k) *loss += 0.5 * slope[k] * (w[i * kBlock + k] - mean[i]);
  }
}

// Sample k's boosting term, and q (N,), its gradient with respect to w.
template <typename T>
void FitBlock<T>::boost(int k, A* q, double* loss) {
  const FitTask<T>& task = *task_;
  const int64_t row = row_[k], c = task.classes, whole = c / kStep * kStep;
  const A *products = task.products + row * n_ * c, *w = w_.data();
  if (whole < c)
    for (int64_t i = 0; i < n_; ++i)
      std::memcpy(rest_.data() + i * kStep, products + i * c + whole, (c - whole) * sizeof(A));
  A *image = image_.data(), square = 0;
  if (task.grams != nullptr)
    for (int64_t i = 0; i < n_; ++i) {
      image[i] = 0;
      for (int64_t j = 0; j < n_; ++j) image[i] += task.grams[(row * n_ + i) * n_ + j] * w[j];
      square += image[i] * w[i];
    }
  const A inverse = task.grams == nullptr ? A(1) : A(1) / std::sqrt(square);
  run_kernel<Head<A>>(
      HeadSample<A>{{{products, c, 0, whole}, {rest_.data(), kStep, whole, whole_steps(c)}},
                    n_,
                    w,
                    inverse,
                    task.bias.data(),
                    task.labels == nullptr ? -1 : task.labels[row],
                    y_.data(),
                    g_.data(),
                    whole_steps(c),
                    origin_.data(),
                    q,
                    loss});
  if (task.grams == nullptr) return;
  A along = 0;  // <e, H' dL/dy>
  for (int64_t i = 0; i < n_; ++i) along += w[i] * q[i];
  for (int64_t i = 0; i < n_; ++i) q[i] = (q[i] - image[i] * (along / square)) * inverse;
}

}  // namespace neulig_fast
