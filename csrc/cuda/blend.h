#pragma once

#include "cuda/launch.h"

namespace neulig_fast {

// theta[k, p] = sum_i weights[k, s(p), i] * params[i, p]; K, S, N, P >= 1
struct BlendCall {
  const void* weights;    // (K, S, N) contiguous, accumulation type
  const void* params;     // (N, P), column stride 1
  const int64_t* bounds;  // (S + 1,); not read when S = 1
  void* theta;            // (K, P) contiguous
  int64_t outputs, segments, experts, columns, row_stride;  // K, S, N, P; elements between rows
};

const char* launch_blend(Element element, const BlendCall& call, void* stream);

}  // namespace neulig_fast
