// From differences to expert 0 to offsets from the mean. No torch headers.
//
// Kernels total d_i = theta_i - theta_0 (exact where experts are close; zeros where they are equal)
// and the products d_i d_j: `totals` holds the N - 1 sums, then the N (N - 1) / 2 products with
// i <= j, i and j in 1 .. N - 1. With D_i and K_ij those totals, and zeros for i or j = 0,
//
//     sum of xi_i = D_i - mean D        sum of xi_i xi_j = K_ij - (r_i + r_j - mean r), r = mean_j
//     K
//
// in fp64. Nothing is lost by it: K is as small as the experts are close, whatever their size.
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
  return (experts - 1) * (experts + 2) / 2;
}

// Where the product of experts i <= j is, both 1 or more.
NF_HOST_DEVICE int64_t product_index(int64_t experts, int64_t i, int64_t j) {
  return experts - 1 + j * (j - 1) / 2 + i - 1;
}

NF_HOST_DEVICE double total_sum(const double* totals, int64_t i) {
  return i == 0 ? 0.0 : totals[i - 1];
}

NF_HOST_DEVICE double total_product(const double* totals, int64_t experts, int64_t i, int64_t j) {
  if (i == 0 || j == 0) return 0.0;
  return totals[i < j ? product_index(experts, i, j) : product_index(experts, j, i)];
}

NF_HOST_DEVICE double mean_sum(const double* totals, int64_t experts) {
  double sum = 0;
  for (int64_t i = 1; i < experts; ++i) sum += totals[i - 1];
  return sum / static_cast<double>(experts);
}

// r_i
NF_HOST_DEVICE double mean_product(const double* totals, int64_t experts, int64_t i) {
  double sum = 0;
  for (int64_t j = 1; j < experts; ++j) sum += total_product(totals, experts, i, j);
  return sum / static_cast<double>(experts);
}

NF_HOST_DEVICE double mean_of(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum / static_cast<double>(count);
}

}  // namespace neulig_fast
