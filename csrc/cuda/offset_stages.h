// How a thread of offset_gram.cu adds a piece for many experts, up to 16: each pack of every row on
// its way through shared memory while the thread multiplies others.
#pragma once

#include "cuda/offset_group.h"
#include "cuda/stages.h"

namespace neulig_fast {

// All experts, a pack of 8 bytes of each. `stage` points at a thread's first pack of a block's
// kStages * kSize.
template <typename T, int kExperts>
struct OffsetStages {
  using D = Offsets<T, kExperts - 1, 0, 8 / sizeof(T), 1, true>;
  using A = typename D::A;
  using Row = typename D::Row;
  static constexpr int kSize = kExperts * kStageThreads;

  static NF_DEVICE void copy_rows(const T* from, int64_t stride, Row* stage) {
    NF_UNROLL
    for (int i = 0; i < kExperts; ++i, from += stride) copy_async(stage + i * kStageThreads, from);
  }

  static NF_DEVICE void add_stage(const D& rows, const Row* stage, A (&sums)[D::kSums]) {
    Row x[kExperts];
    NF_UNROLL
    for (int i = 0; i < kExperts; ++i) x[i] = stage[i * kStageThreads];
    NF_UNROLL
    for (int lane = 0; lane < D::kLanes; ++lane) {
      A d[D::kRows], none[1] = {};
      rows.subtract(
          widen_lane(x[0], lane), 0, [&](int i) { return widen_lane(x[i + 1], lane); }, d);
      D::multiply(d, none, sums);
    }
  }

  // Thread t's share of a piece.
  static NF_DEVICE void add_piece(const D& rows, const Piece& piece, int thread, Row* stage,
                                  A (&sums)[D::kSums]) {
    add_in_stages<D::kLanes>(
        piece, rows.wide, thread,
        [&](int64_t p, int to) { copy_rows(rows.first + p, rows.stride, stage + to * kSize); },
        [&](int of) { add_stage(rows, stage + of * kSize, sums); },
        [&](int64_t begin, int64_t end) { rows.add_columns(begin, end, sums); });
  }
};

}  // namespace neulig_fast
