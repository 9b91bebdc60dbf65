// Rows of a piece of columns on their way through shared memory while a thread computes with
// others.
#pragma once

#include "cuda/copy_async.h"
#include "cuda/pieces.h"

namespace neulig_fast {

constexpr int kStageThreads = 128;  // of a block
constexpr int kStages = 3;          // at once: one in use, two on their way

// Calls copy(n, stage) for n = 0 .. count - 1, each long before use(stage), which needs what it
// copied. Stages are 0 .. kStages - 1.
template <typename Copy, typename Use>
NF_DEVICE void run_ahead(int count, const Copy& copy, const Use& use) {
  int copied = 0, stage = 0;  // the stage that is next to be copied to, and then to be used
  const auto next = [&] {
    if (copied < count) copy(copied, stage);
    end_copies();
    ++copied;
    stage = stage + 1 < kStages ? stage + 1 : 0;
  };
  NF_UNROLL
  for (int n = 0; n < kStages - 1; ++n) next();
  NF_NO_UNROLL
  for (int n = 0; n < count; ++n) {
    wait_for_copies<kStages - 2>();
    next();
    use(stage);
  }
}

// Thread t's share of a piece: pack t of every kStageThreads packs of its block of columns. Where
// packs are aligned and whole, copy(p, stage) and then use(stage); elsewhere columns(begin, end).
template <int kLanes, typename Copy, typename Use, typename Columns>
NF_DEVICE void add_in_stages(const Piece& piece, bool wide, int thread, const Copy& copy,
                             const Use& use, const Columns& columns) {
  constexpr int kStep = kLanes * kStageThreads;
  NF_NO_UNROLL
  for (int64_t p = piece.block + thread * kLanes; p < piece.end;) {
    if (wide && p >= piece.begin && p + kLanes <= piece.end) {
      const int packs = static_cast<int>((piece.end - p - kLanes) / kStep) + 1;
      run_ahead(packs, [&](int n, int stage) { copy(p + n * kStep, stage); }, use);
      p += packs * kStep;
    } else {
      columns(most(p, piece.begin), least(p + kLanes, piece.end));
      p += kStep;
    }
  }
}

}  // namespace neulig_fast
