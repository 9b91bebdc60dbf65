#pragma once

#include "cuda/launch.h"

namespace neulig_fast {

// theta[k, p] = sum_i weights[k, s(p), i] * params[i, p] and what it did; S, N, P >= 1
struct BlendTelemetryCall {
  const void* weights;      // (K, S, N) contiguous, accumulation type
  const void* params;       // (N, P), column stride 1
  const int64_t* bounds;    // (S + 1,); not read when S = 1
  void* theta;              // (K, P) contiguous, of type `out`
  double* square_partials;  // (N + K, slots): experts, outputs; scratch
  int32_t* count_partials;  // (1 + 2 K, slots): conflicts, nonfinite, saturated; scratch
  double* expert_squares;   // (S, N)
  double* merged_squares;   // (K, S)
  int64_t* conflicts;       // (S,)
  int64_t* counts;          // (2, K, S): nonfinite, saturated
  int64_t outputs, segments, experts, columns, row_stride, slots;
  int64_t base;         // the row that offsets start from; -1: the mean
  double share, limit;  // 1 / N; the smallest magnitude that `out` cannot hold
  Element out;
};

int64_t blend_telemetry_slots(int64_t columns, int64_t segments);
const char* launch_blend_telemetry(Element element, const BlendTelemetryCall& call, void* stream);

}  // namespace neulig_fast
