// What a worker of neulig_fit does with one block of samples: CoopVecs, loss, gradients.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "common/cpu_level.h"
#include "cpu/neulig_fit_head.h"
#include "cpu/neulig_fit_kernels.h"

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

// Where things are in a row of parameters or gradients: W (N, stride), then c; zero-padded. Rows of
// W are an odd number of steps apart: with powers of two, all would compete for a few cache lines.
struct FitLayout {
  explicit FitLayout(int64_t n, int64_t width)
      : experts(n),
        inputs(n * width),
        whole(inputs / kStep * kStep),
        stride((whole_steps(inputs) / kStep | 1) * kStep),
        bias(n * stride),
        size(bias + whole_steps(n)) {}
  int64_t experts, inputs, whole, stride, bias, size;

  // Calls body(i, rows) for the rows of W in as few and as equal groups as kernels take.
  template <typename Body>
  void for_row_groups(const Body& body) const {
    const int64_t groups = (experts + kMaxRows - 1) / kMaxRows;
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t begin = k * experts / groups;
      body(begin, (k + 1) * experts / groups - begin);
    }
  }
};

// Zeros that start at a cache line.
template <typename A>
class Lines {
 public:
  explicit Lines(int64_t count) : lines_((count * sizeof(A) + 63) / 64) {}
  A* data() {
    return reinterpret_cast<A*>(lines_.data());
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;
};

template <typename T>
struct FitKernels {
  using A = Acc<T>;
  std::array<KernelFn<RowDots<T>>, kMaxRows> dots;
  std::array<KernelFn<OuterSums<T>>, kMaxRows> outer;
  KernelFn<Exponents<A>> exp;
  KernelFn<HeadSample<A>> head;
  KernelFn<AdamStep<A>> adam;
};

template <typename T, int... kIndex>
FitKernels<T> make_fit_kernels(CpuLevel level, std::integer_sequence<int, kIndex...>) {
  using A = Acc<T>;
  return {{kernel_at<Dots<T, kIndex + 1>, RowDots<T>>(level)...},
          {kernel_at<Outer<T, kIndex + 1>, OuterSums<T>>(level)...},
          kernel_at<Exp<A>, Exponents<A>>(level),
          kernel_at<Head<A>, HeadSample<A>>(level),
          kernel_at<Adam<A>, AdamStep<A>>(level)};
}

template <typename T>
class FitBlock {
 public:
  using A = Acc<T>;

  // classes: the most that any task has.
  FitBlock(const FitSettings<A>& settings, const FitLayout& layout, const FitKernels<T>& kernels,
           int64_t classes)
      : s_(settings),
        at_(layout),
        n_(layout.experts),
        kernels_(kernels),
        tails_(kBlock * kStep),
        lanes_(kBlock * n_ * kStep),
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
  void sum_lanes_of(const A* parameters);
  void align(const A* w, const A* mean, double* loss);
  void boost(int k, A* q, double* loss);
  void add_outer(A* gradient, bool begin);

  const FitSettings<A>& s_;
  const FitLayout& at_;
  const int64_t n_;
  const FitKernels<T>& kernels_;
  const FitTask<T>* task_ = nullptr;
  int count_ = 0;
  int64_t row_[kBlock];
  const T* x_[kBlock];     // whole rows; beyond count_, the last again
  const T* tail_[kBlock];  // what is left of them after whole steps
  Lines<T> tails_;
  Lines<A> lanes_;               // (kBlock, N, kStep): logits before the sum over lanes
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
  for (int k = 0; k < count_; ++k) {
    row_[k] = rows[k];
    x_[k] = task.features + rows[k] * at_.inputs;
    T* tail = tails_.data() + k * kStep;
    std::memcpy(tail, x_[k] + at_.whole, (at_.inputs - at_.whole) * sizeof(T));
    tail_[k] = tail;
  }
  std::fill(x_ + count_, x_ + kBlock, x_[count_ - 1]);
  std::fill(tail_ + count_, tail_ + kBlock, tail_[count_ - 1]);
}

// W u, before the sums over lanes.
template <typename T>
void FitBlock<T>::sum_lanes_of(const A* parameters) {
  constexpr int64_t kColumns = 512;  // so that these of W and of x stay in the first-level cache
  A* lanes = lanes_.data();
  std::fill(lanes, lanes + kBlock * n_ * kStep, A(0));
  const auto add = [&](const T* const* x, int64_t column, int64_t columns) {
    at_.for_row_groups([&](int64_t i, int64_t rows) {
      kernels_.dots[rows - 1]({x, parameters + i * at_.stride + column, at_.stride, columns,
                               lanes + i * kStep, n_ * kStep, count_});
    });
  };
  for (int64_t p = 0; p < at_.whole; p += kColumns) {
    const T* x[kBlock];
    for (int k = 0; k < kBlock; ++k) x[k] = x_[k] + p;
    add(x, p, std::min(kColumns, at_.whole - p));
  }
  if (at_.whole < at_.inputs) add(tail_, at_.whole, kStep);
}

template <typename T>
void FitBlock<T>::weigh(const A* parameters, A* w, A* sums) {
  sum_lanes_of(parameters);
  A top[kBlock], total[kBlock] = {};
  for (int64_t i = 0; i < n_; ++i)
    for (int k = 0; k < kBlock; ++k) {
      const A a = sum_lanes(lanes_.data() + (k * n_ + i) * kStep) + parameters[at_.bias + i];
      w[i * kBlock + k] = a;
      top[k] = i == 0 || a > top[k] ? a : top[k];
    }
  for (int64_t i = 0; i < n_; ++i)
    for (int k = 0; k < kBlock; ++k) w[i * kBlock + k] -= top[k];
  kernels_.exp({w, n_ * kBlock});
  for (int64_t i = 0; i < n_; ++i)
    for (int k = 0; k < kBlock; ++k) total[k] += w[i * kBlock + k];
  for (int64_t i = 0; i < n_; ++i) {
    for (int k = 0; k < kBlock; ++k) w[i * kBlock + k] /= total[k];
    for (int k = 0; k < count_; ++k) sums[i] += w[i * kBlock + k];
  }
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
  add_outer(gradient, begin);
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
  kernels_.head({{{products, c, 0, whole}, {rest_.data(), kStep, whole, whole_steps(c)}},
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

template <typename T>
void FitBlock<T>::add_outer(A* gradient, bool begin) {
  const auto add = [&](const T* const* x, int64_t column, int64_t columns) {
    at_.for_row_groups([&](int64_t i, int64_t rows) {
      kernels_.outer[rows - 1]({x, da_.data() + i, n_, count_, gradient + i * at_.stride + column,
                                at_.stride, columns, begin});
    });
  };
  if (at_.whole > 0) add(x_, 0, at_.whole);
  if (at_.whole < at_.inputs) add(tail_, at_.whole, kStep);
}

}  // namespace neulig_fast
