#pragma once

#include "cuda/launch.h"

namespace neulig_fast {

// sums[s, i], gram[s, i, j] of the offsets from the experts' mean; S, P >= 1, N >= 2
struct OffsetGramCall {
  const void* params;     // (N, P), column stride 1
  const int64_t* bounds;  // (S + 1,); not read when S = 1
  void* partials;         // (totals, slots), accumulation type: scratch; rows, totals: offsets.h
  double* totals;         // (S, totals): scratch
  double* sums;           // (S, N) contiguous
  double* gram;           // (S, N, N) contiguous
  int64_t segments, experts, columns, row_stride, slots, width, rows;
};

// How many rows there are, columns of a block of threads, and slots that they make: functions of
// the shape and type alone.
int64_t offset_gram_rows(int64_t experts, Element element);
int64_t offset_gram_width(int64_t columns, int64_t experts, Element element);
int64_t offset_gram_slots(int64_t columns, int64_t segments, int64_t width);
const char* launch_offset_gram(Element element, const OffsetGramCall& call, void* stream);

}  // namespace neulig_fast
