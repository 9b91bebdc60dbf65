// How totals of offset_gram are stored. No torch headers.
//
// Offsets are formed from differences to expert 0, which are exact where experts are close:
// d_i = theta_i - theta_0, xi_i = d_i - mean d. Row r stands for expert r + 1, and row N - 1, if it
// is there, for expert 0. Few experts need no such row: offsets sum to zero, so that its totals
// follow from the others', with at most N times their rounding errors.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NF_HOST_DEVICE inline
#endif

namespace neulig_fast {

// Totals of R rows: R sums of offsets, then R (R + 1) / 2 sums of products of rows i <= j.
NF_HOST_DEVICE int64_t count_totals(int64_t rows) {
  return rows * (rows + 3) / 2;
}

NF_HOST_DEVICE int64_t product_index(int64_t rows, int64_t i, int64_t j) {
  return rows + j * (j + 1) / 2 + i;
}

// What they say of experts.
struct OffsetTotals {
  const double* totals;
  int64_t rows, experts;  // rows: N, or N - 1

  struct Rows {
    int64_t begin, end;
    bool negative;
  };

  // The rows that add up to an expert's offset, or to its negative.
  NF_HOST_DEVICE Rows of(int64_t expert) const {
    if (expert > 0) return {expert - 1, expert, false};
    if (rows == experts) return {rows - 1, rows, false};
    return {0, rows, true};
  }

  NF_HOST_DEVICE double sum(int64_t expert) const {
    const Rows a = of(expert);
    double total = 0;
    for (int64_t i = a.begin; i < a.end; ++i) total += totals[i];
    return a.negative ? 0 - total : total;
  }

  NF_HOST_DEVICE double product(int64_t expert, int64_t other) const {
    const Rows a = of(expert), b = of(other);
    double total = 0;
    for (int64_t i = a.begin; i < a.end; ++i)
      for (int64_t j = b.begin; j < b.end; ++j)
        total += totals[i < j ? product_index(rows, i, j) : product_index(rows, j, i)];
    return a.negative != b.negative ? 0 - total : total;
  }
};

}  // namespace neulig_fast
