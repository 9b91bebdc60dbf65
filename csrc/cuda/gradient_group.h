// Gradients and experts whose dot products a block of threads of blend_weight_grad.cu sums.
#pragma once

#include "cuda/blend_weight_grad.h"
#include "cuda/pieces.h"

namespace neulig_fast {

// The rows that a block of threads sums: `rows` <= kRows gradients from k on and `experts` <=
// kExperts experts from i on; with kWhole, none is missing. Missing gradients are the last one
// again, and their sums are not kept. Missing experts are neither loaded nor multiplied, so that a
// kernel for 8 of them costs little more than it must for 5.
template <typename T, int kRows, int kExperts, bool kWhole>
struct Group {
  const T *grad, *params;
  int64_t grad_stride, row_stride, k, i;
  int rows, experts;

  NF_DEVICE bool has_row(int r) const {
    return kWhole || r < rows;
  }
  NF_DEVICE bool has_expert(int n) const {
    return kWhole || n < experts;
  }
};

template <typename T, int kRows, int kExperts, bool kWhole>
NF_DEVICE Group<T, kRows, kExperts, kWhole> make_group(const BlendWeightGradCall& call,
                                                       int64_t index) {
  const int64_t expert_groups = (call.experts + kExperts - 1) / kExperts;
  const int64_t k = index / expert_groups * kRows, i = index % expert_groups * kExperts;
  return {static_cast<const T*>(call.grad) + k * call.grad_stride,
          static_cast<const T*>(call.params) + i * call.row_stride,
          call.grad_stride,
          call.row_stride,
          k,
          i,
          static_cast<int>(least(call.outputs - k, kRows)),
          static_cast<int>(least(call.experts - i, kExperts))};
}

// sums[r][n] += grad[r, p] * params[n, p] over the columns p of begin .. end - 1.
template <typename T, int kRows, int kExperts, bool kWhole>
NF_DEVICE void add_columns(const Group<T, kRows, kExperts, kWhole>& group, int64_t begin,
                           int64_t end, Accumulator<T> (&sums)[kRows][kExperts]) {
  NF_NO_UNROLL
  for (int64_t p = begin; p < end; ++p) {
    Accumulator<T> grad[kRows];
    const T *row = group.grad + p, *expert = group.params + p;
    NF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      grad[r] = widen(*row);
      if (group.has_row(r + 1)) row += group.grad_stride;
    }
    NF_UNROLL
    for (int n = 0; n < kExperts; ++n) {
      if (!group.has_expert(n)) continue;
      const auto x = widen(*expert);
      expert += group.row_stride;
      NF_UNROLL
      for (int r = 0; r < kRows; ++r) sums[r][n] = multiply_add(grad[r], x, sums[r][n]);
    }
  }
}

}  // namespace neulig_fast
