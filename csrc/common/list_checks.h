// What every backend checks of tables of addresses (see neulig_fast/tensor_lists.py). The addresses
// themselves nobody can check: these twins of the operators are for neulig_fast alone.
#pragma once

#include "common/checks.h"
#include "common/lists.h"

namespace neulig_fast {

inline void check_list_dtype(const char* op, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  op, ": ", name, " must be float32, bfloat16, float16 or float64, got ",
                  toString(dtype));
}

inline void check_addresses(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), op,
      ": ", name, " must be one contiguous row of int64, got ", shape_text(tensor), " ",
      toString(tensor.scalar_type()));
}

// table (T + 1 + 2 T + T N,); others (T,).
inline ListTable check_lists(const char* op, const Tensor& table, const Tensor& others,
                             int64_t experts, int64_t chunk, int64_t chunks) {
  check_addresses(op, "table", table);
  check_addresses(op, "addresses", others);
  const int64_t tensors = others.size(0);
  STD_TORCH_CHECK(tensors >= 1 && experts >= 1 && chunk >= 1 && chunks >= 1, op,
                  ": tensors, experts, chunk and chunks must be positive, got ", tensors, ", ",
                  experts, ", ", chunk, ", ", chunks);
  STD_TORCH_CHECK(table.size(0) == tensors * (experts + 3) + 1, op, ": table must have ",
                  tensors * (experts + 3) + 1, " entries for ", tensors, " tensors and ", experts,
                  " experts, got ", table.size(0));
  return make_list_table(static_cast<const int64_t*>(table.const_data_ptr()),
                         static_cast<const int64_t*>(others.const_data_ptr()), tensors, experts,
                         chunk, chunks);
}

// weights (N,) or (R, N), contiguous, in the accumulation type.
inline void check_list_weights(const char* op, const Tensor& weights, ScalarType dtype) {
  const int64_t dims = weights.dim();
  STD_TORCH_CHECK((dims == 1 || dims == 2) && weights.is_contiguous(), op,
                  ": weights must be contiguous, (N,) or (R, N), got ", shape_text(weights));
  STD_TORCH_CHECK(weights.scalar_type() == acc_dtype(dtype), op, ": weights must be ",
                  toString(acc_dtype(dtype)), " for ", toString(dtype), " experts, got ",
                  toString(weights.scalar_type()));
}

// Readable tables only (CPU): chunks and rows are what the lengths and weights say.
inline void check_list_values(const char* op, const ListTable& lists, int64_t rows) {
  bool right = lists.bounds[0] == 0 && lists.bounds[lists.tensors] == lists.chunks;
  for (int64_t t = 0; t < lists.tensors; ++t) {
    const int64_t chunks = (lists.lengths[t] + lists.chunk - 1) / lists.chunk;
    right &= lists.lengths[t] >= 0 && lists.bounds[t + 1] - lists.bounds[t] == chunks;
    right &= lists.rows[t] >= 0 && (rows < 0 || lists.rows[t] < rows);
  }
  STD_TORCH_CHECK(right, op, ": the table does not fit its lengths, chunks or weights");
}

}  // namespace neulig_fast
