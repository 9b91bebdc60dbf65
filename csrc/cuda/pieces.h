// Where columns, segments and blocks of columns meet. 64-bit throughout; bounds are only ever read
// at 0 .. S, and whatever they hold, every answer stays inside [0, S) and [0, P].
//
// Columns are cut at every multiple of `width`, the columns of a block, and at every bound. The
// piece in column block c and segment s has slot c + s: slots ascend with the columns, no two
// pieces share one, and the slots of a segment are consecutive, so nobody has to count pieces
// first. A slot may have no piece.
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

// The last segment s < count that begins at or before column p, or 0. Reads bounds 1 .. count - 1.
NF_DEVICE int64_t find_segment(const int64_t* bounds, int64_t count, int64_t p) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (bounds[middle] <= p) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The last segment whose first slot is at or before `slot`, or 0.
NF_DEVICE int64_t find_segment_of_slot(const int64_t* bounds, int64_t count, int64_t slot,
                                       int64_t width) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_slot(bounds, middle, width) <= slot) low = middle;
    else high = middle - 1;
  }
  return low;
}

inline int64_t count_slots(int64_t columns, int64_t segments, int64_t width) {
  return (columns + width - 1) / width + segments - 1;
}

// Columns [begin, end) of the block that starts at column `block`; none if begin >= end.
struct Piece {
  int64_t block, begin, end;
};

NF_DEVICE Piece find_piece(const int64_t* bounds, int64_t count, int64_t columns, int64_t slot,
                           int64_t width) {
  const int64_t segment = count > 1 ? find_segment_of_slot(bounds, count, slot, width) : 0;
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
