#pragma once

#include "cuda/launch.h"

namespace neulig_fast {

// theta[k, p] = sum_i weights[k, s(p), i] * params[i, p]; K, S, N, P >= 1
struct BlendCall {
  const void* weights;                          // (K, S, N) contiguous, accumulation type
  const void* params;                           // (N, P), column stride 1
  const int64_t* bounds;                        // (S + 1,); not read when S = 1
  void* theta;                                  // (K, P), column stride 1
  int64_t outputs, segments, experts, columns;  // K, S, N, P
  int64_t row_stride, theta_stride;             // elements between rows of params, of theta
  uint64_t seed;                                // of stochastic rounding
  Element out;                                  // theta's type
  bool stochastic;
};

// element: params' type
const char* launch_blend(Element element, const BlendCall& call, void* stream);

}  // namespace neulig_fast
