// What drops elements of task vectors: bounds, places that decide ties with them, draws. No torch
// headers.
// neulig_fast/ops/_task_vectors.py says what a rule may ask.
//
// Ties with a bound are decided by place, so columns are cut where a place is named: in between, a
// bound that includes its ties is another number, and kernels know nothing of places.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/draw_columns.h"

namespace neulig_fast {

constexpr int64_t kMostExperts = 64;

enum Rule : int64_t { kLowerBound = 1, kUpperBound = 2, kDraws = 4, kScales = 8 };

// The largest number below a magnitude; below zero all negative numbers do.
template <typename A>
A below(A bound) {
  if (bound <= A(0)) return A(-1);
  return std::nextafter(bound, A(0));
}

// numbers (5, N): weights, scales, lower, upper, lam; places (4, N): lower_cut, upper_cut,
// thresholds, streams, or null where the rule asks for none.
template <typename A>
struct Rules {
  int64_t experts, rule, seed, start;
  const A* numbers;
  const int64_t* places;
  KernelFn<DrawCall> draw;

  // Where after column `from` a bound changes, at most `end`.
  int64_t next_cut(int64_t from, int64_t end) const {
    for (int64_t i = 0; i < 2 * experts; ++i) {
      if (!(rule & (i < experts ? kLowerBound : kUpperBound))) continue;
      if (places[i] > start + from && places[i] < start + end) end = places[i] - start;
    }
    return end;
  }

  // All |d| up to this are dropped from column `from` on.
  A lower_at(int64_t i, int64_t from) const {
    if (!(rule & kLowerBound)) return std::numeric_limits<A>::quiet_NaN();
    const A bound = numbers[2 * experts + i];
    return start + from < places[i] ? below(bound) : bound;
  }

  // All |d| beyond this are dropped from column `from` on.
  A upper_at(int64_t i, int64_t from) const {
    if (!(rule & kUpperBound)) return std::numeric_limits<A>::quiet_NaN();
    const A bound = numbers[3 * experts + i];
    return start + from < places[experts + i] ? below(bound) : bound;
  }

  // Columns before this one that its group begins with.
  int64_t ahead(int64_t column) const {
    return (start + column) % kDrawnGroup;
  }

  // Draws columns [begin, end) of expert i, after those ahead, into drawn_room(end - begin)
  // entries.
  void draw_columns(int64_t i, int64_t begin, int64_t end, uint16_t* drawn) const {
    draw({static_cast<uint64_t>(seed), static_cast<uint64_t>((start + begin) / kDrawnGroup),
          static_cast<uint64_t>(places[3 * experts + i]),
          static_cast<uint64_t>(places[2 * experts + i]),
          (ahead(begin) + end - begin + kDrawnGroup - 1) / kDrawnGroup, drawn});
  }

  // A group that begins before the first column, and a register's worth.
  static constexpr int64_t drawn_room(int64_t columns) {
    return columns + 3 * kDrawnGroup;
  }
};

}  // namespace neulig_fast
