#pragma once

#include "common/lists.h"
#include "cuda/launch.h"

namespace neulig_fast {

// theta_t = sum_i weights[rows[t], i] * x[i, t]; T, N, chunks >= 1
struct BlendListsCall {
  const void* weights;    // (N,) or (R, N) contiguous, accumulation type
  int64_t weight_stride;  // 0 or N
  int64_t base;           // added to the outputs' addresses
  ListTable lists;        // in device memory; its others are the outputs
  Element out;            // their type
};

const char* launch_blend_lists(Element element, const BlendListsCall& call, void* stream);

}  // namespace neulig_fast
