// Sums across the threads of a warp, in a fixed order.
#pragma once

#ifdef __CUDACC__
namespace neulig_fast {

// The sum of a warp's values, the same in every lane.
template <typename A>
__device__ __forceinline__ A add_warp(A value) {
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

}  // namespace neulig_fast
#endif
