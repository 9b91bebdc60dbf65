#pragma once

#include "cuda/launch.h"

namespace neulig_fast {

// result[k, s, i] = sum over p in segment s of grad[k, p] * params[i, p]; K, S, N, P >= 1
struct BlendWeightGradCall {
  const void* grad;       // (K, P), column stride 1
  const void* params;     // (N, P), column stride 1
  const int64_t* bounds;  // (S + 1,); not read when S = 1
  void* partials;         // (K, N, slots), accumulation type: scratch
  void* result;           // (K, S, N) contiguous, accumulation type
  int64_t outputs, segments, experts, columns, grad_stride, row_stride, slots;
};

int64_t blend_weight_grad_slots(int64_t columns, int64_t segments);
const char* launch_blend_weight_grad(Element element, const BlendWeightGradCall& call,
                                     void* stream);

}  // namespace neulig_fast
