// What every launcher of a CUDA kernel has in common; no CUDA and no torch header. All pointers are
// device memory; arguments are checked by the caller. `stream` is a cudaStream_t. Each returns
// null, or CUDA's words for why a launch failed.
#pragma once

#include <cstdint>

namespace neulig_fast {

enum class Element { kFloat, kDouble, kBFloat16, kHalf, kFloat8E4M3, kFloat8E5M2 };

}  // namespace neulig_fast
