// Where columns, segments and blocks of columns meet. 64-bit throughout; bounds are only ever read
// at 0 .. S, and whatever they hold, every answer stays inside [0, S) and [0, P].
//
// Columns are cut at every multiple of an op's block width and at every bound. The piece in column
// block c and segment s has slot c + s: slots ascend with the columns, no two pieces share one, and
// the slots of a segment are consecutive, so nobody has to count pieces first. A slot may have no
// piece.
#pragma once

#include "cuda/element.h"

namespace neulig_fast {

NF_DEVICE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
NF_DEVICE int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

NF_DEVICE int64_t first_slot(const int64_t* bounds, int64_t segment, int64_t width) {
  return bounds[segment] / width + segment;
}

// The last index s < count that has begun, or 0; begun(s), asked for s in 1 .. count - 1, is true
// up to some index and false from there on.
template <typename Begun>
NF_DEVICE int64_t find_last(int64_t count, const Begun& begun) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (begun(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The same by all lanes of a warp together, which must all be here and ask for the same: one load
// of 32 bounds, where halving would wait for five.
template <typename Begun>
NF_DEVICE int64_t find_last_by_warp(int64_t count, const Begun& begun) {
#ifdef __CUDA_ARCH__
  const int lane = threadIdx.x % 32;
  int64_t low = 0, more = count - 1;  // the answer is in low .. low + more
  while (more > 0) {
    const int64_t stride = (more + 31) / 32, ahead = (lane + 1) * stride;
    const bool passed = ahead <= more && begun(low + ahead);
    const int64_t steps = __popc(__ballot_sync(0xFFFFFFFFu, passed)) * stride;
    low += steps;
    more = least(more - steps, stride - 1);
  }
  return low;
#else
  return find_last(count, begun);
#endif
}

// The last segment s < count that begins at or before column p, or 0. Reads bounds 1 .. count - 1.
NF_DEVICE int64_t find_segment(const int64_t* bounds, int64_t count, int64_t p) {
  return find_last(count, [=](int64_t s) { return bounds[s] <= p; });
}

inline int64_t count_slots(int64_t columns, int64_t segments, int64_t width) {
  return (columns + width - 1) / width + segments - 1;
}

// Columns [begin, end) of the block that starts at column `block`; none if begin >= end.
struct Piece {
  int64_t block, begin, end;
};

// Asked for by whole warps.
NF_DEVICE Piece find_piece(const int64_t* bounds, int64_t count, int64_t columns, int64_t slot,
                           int64_t width) {
  const int64_t segment =
      find_last_by_warp(count, [=](int64_t s) { return first_slot(bounds, s, width) <= slot; });
  const int64_t block = (slot - segment) * width;
  Piece piece = {block, block, least(block + width, columns)};
  if (count > 1) {
    piece.begin = most(most(block, bounds[segment]), 0);
    piece.end = least(piece.end, bounds[segment + 1]);
  }
  return piece;
}

// The slots [begin, end) of a segment's pieces, in the order of their columns.
struct SlotRange {
  int64_t begin, end;
};

NF_DEVICE SlotRange find_slots(const int64_t* bounds, int64_t count, int64_t slots, int64_t segment,
                               int64_t width) {
  if (count == 1) return {0, slots};
  if (bounds[segment] >= bounds[segment + 1]) return {0, 0};
  const int64_t last = (bounds[segment + 1] - 1) / width + segment;
  return {most(first_slot(bounds, segment, width), 0), least(last + 1, slots)};
}

}  // namespace neulig_fast
