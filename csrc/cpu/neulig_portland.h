// The Portland on blocks of samples: softmax(W u + c).
#pragma once

#include "cpu/neulig_rows.h"

namespace neulig_fast {

// Where things are in a row of parameters or gradients: W (N, stride), then c; zero-padded.
struct PortlandLayout {
  PortlandLayout(int64_t n, int64_t width)
      : experts(n),
        inputs(n * width),
        stride(padded_stride(inputs)),
        bias(n * stride),
        size(bias + whole_steps(n)) {}
  int64_t experts, inputs, stride, bias, size;
};

// Of contiguous W (N, N D) and c (N,).
template <typename A>
Lines<A> portland_parameters(const PortlandLayout& at, const A* weight, const A* bias) {
  Lines<A> parameters(at.size);
  for (int64_t i = 0; i < at.experts; ++i)
    std::copy(weight + i * at.inputs, weight + (i + 1) * at.inputs,
              parameters.data() + i * at.stride);
  std::copy(bias, bias + at.experts, parameters.data() + at.bias);
  return parameters;
}

template <typename T>
class Portland {
 public:
  using A = Acc<T>;
  explicit Portland(const PortlandLayout& layout)
      : at_(layout), lanes_(kBlock * layout.experts * kStep) {}

  // w (N, kBlock): the CoopVecs of up to kBlock rows u.
  void weigh(Rows<T>& u, const A* parameters, A* w) {
    const int64_t n = at_.experts;
    row_dots(u, parameters, at_.stride, n, lanes_.data());
    A top[kBlock], total[kBlock] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < kBlock; ++k) {
        const A a = sum_lanes(lanes_.data() + (k * n + i) * kStep) + parameters[at_.bias + i];
        w[i * kBlock + k] = a;
        top[k] = i == 0 || a > top[k] ? a : top[k];
      }
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < kBlock; ++k) w[i * kBlock + k] -= top[k];
    run_kernel<Exp<A>>(Exponents<A>{w, n * kBlock});
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < kBlock; ++k) total[k] += w[i * kBlock + k];
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < kBlock; ++k) w[i * kBlock + k] /= total[k];
  }

 private:
  const PortlandLayout& at_;
  Lines<A> lanes_;  // (kBlock, N, kStep): logits before the sum over lanes
};

}  // namespace neulig_fast
