// The launchers of the CUDA kernels, as bindings.cpp calls them: no CUDA and no torch header. All
// pointers are device memory; arguments are checked by the caller. `stream` is a cudaStream_t. Each
// returns null, or CUDA's words for why a launch failed.
#pragma once

#include <cstdint>

namespace neulig_fast {

enum class Element { kFloat, kDouble, kBFloat16, kHalf };

// theta[k, p] = sum_i weights[k, s(p), i] * params[i, p]; K, S, N, P >= 1
struct BlendCall {
  const void* weights;    // (K, S, N) contiguous, accumulation type
  const void* params;     // (N, P), column stride 1
  const int64_t* bounds;  // (S + 1,); not read when S = 1
  void* theta;            // (K, P) contiguous
  int64_t outputs, segments, experts, columns, row_stride;  // K, S, N, P; elements between rows
};

const char* launch_blend(Element element, const BlendCall& call, void* stream);

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
