// How totals of offset_gram are stored. No torch headers.
//
// Offsets are formed from differences to expert 0, which are exact where experts are close:
// d_i = theta_i - theta_0, xi_i = d_i - mean d. `totals` holds the N sums of xi_i, then the
// N (N + 1) / 2 sums of xi_i xi_j with i <= j.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NF_HOST_DEVICE inline
#endif

namespace neulig_fast {

// How many totals there are for N experts.
NF_HOST_DEVICE int64_t count_totals(int64_t experts) {
  return experts * (experts + 3) / 2;
}

// Where the product of experts i <= j is.
NF_HOST_DEVICE int64_t product_index(int64_t experts, int64_t i, int64_t j) {
  return experts + j * (j + 1) / 2 + i;
}

}  // namespace neulig_fast
