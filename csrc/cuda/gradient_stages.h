// How a thread of blend_weight_grad.cu adds a piece for several gradients: each pack of every row
// on its way through shared memory while the thread multiplies others.
#pragma once

#include "cuda/gradient_group.h"
#include "cuda/stages.h"

namespace neulig_fast {

// Packs of 8 bytes: of kRows gradients, then of up to kExperts experts. `stage` points at a
// thread's first pack of a block's kStages * kSize.
template <typename T, int kRows, int kExperts>
struct GradientStages {
  using A = Accumulator<T>;
  using G = Group<T, kRows, kExperts, false>;
  static constexpr int kLanes = 8 / sizeof(T);
  using Row = Pack<T, kLanes>;
  static constexpr int kSize = (kRows + kExperts) * kStageThreads;

  static NF_DEVICE void copy_rows(const G& group, int64_t p, Row* stage) {
    const T *row = group.grad + p, *expert = group.params + p;
    NF_UNROLL
    for (int r = 0; r < kRows; ++r, row += group.grad_stride)
      if (group.has_row(r)) copy_async(stage + r * kStageThreads, row);
    NF_UNROLL
    for (int n = 0; n < kExperts; ++n, expert += group.row_stride)
      if (group.has_expert(n)) copy_async(stage + (kRows + n) * kStageThreads, expert);
  }

  static NF_DEVICE void add_stage(const G& group, const Row* stage, A (&sums)[kRows][kExperts]) {
    A grad[kRows][kLanes];
    NF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Row row = stage[r * kStageThreads];
      NF_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) grad[r][lane] = widen_lane(row, lane);
    }
    NF_UNROLL
    for (int n = 0; n < kExperts; ++n) {
      if (!group.has_expert(n)) continue;
      const Row expert = stage[(kRows + n) * kStageThreads];
      NF_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        const A x = widen_lane(expert, lane);
        NF_UNROLL
        for (int r = 0; r < kRows; ++r) sums[r][n] = multiply_add(grad[r][lane], x, sums[r][n]);
      }
    }
  }

  // Thread t's share of a piece.
  static NF_DEVICE void add_piece(const G& group, const Piece& piece, bool wide, int thread,
                                  Row* stage, A (&sums)[kRows][kExperts]) {
    add_in_stages<kLanes>(
        piece, wide, thread, [&](int64_t p, int to) { copy_rows(group, p, stage + to * kSize); },
        [&](int of) { add_stage(group, stage + of * kSize, sums); },
        [&](int64_t begin, int64_t end) { add_columns(group, begin, end, sums); });
  }
};

}  // namespace neulig_fast
