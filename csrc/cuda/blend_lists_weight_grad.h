#pragma once

#include "common/lists.h"
#include "cuda/launch.h"

namespace neulig_fast {

// result[t, i] = <grad_t, x[i, t]>, or their sum over t; T, N, chunks >= 1
struct BlendListsWeightGradCall {
  ListTable lists;  // in device memory; its others are the gradients, 0 for none
  Element grad;     // their type
  void* partials;   // (N, chunks), accumulation type: scratch
  double* result;   // (T, N) or (1, N)
  bool per_tensor;
};

const char* launch_blend_lists_weight_grad(Element element, const BlendListsWeightGradCall& call,
                                           void* stream);

}  // namespace neulig_fast
