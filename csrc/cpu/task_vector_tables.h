// The rules of merge_task_vectors and magnitude_sums as their callers give them.
#pragma once

#include <limits>
#include <optional>

#include "common/checks.h"
#include "cpu/task_vector_rules.h"

namespace neulig_fast {

inline void check_within(const char* op, const char* name, int64_t value, int64_t least,
                         int64_t most) {
  STD_TORCH_CHECK(value >= least && value <= most, op, ": ", name, " must be ", least, " to ", most,
                  ", got ", value);
}

inline void check_rule(const char* op, const Tensor& params, const Tensor& numbers,
                       const std::optional<Tensor>& places, int64_t rule, int64_t start) {
  const int64_t experts = params.size(0);
  STD_TORCH_CHECK(experts <= kMostExperts, op, ": params must have at most ", kMostExperts,
                  " rows, got ", experts);
  check_exact(op, "numbers", numbers, acc_dtype(params.scalar_type()), {5, experts});
  const bool named = rule & (kLowerBound | kUpperBound | kDraws);
  STD_TORCH_CHECK(places.has_value() || !named, op, ": rule ", rule, " needs places");
  if (places) check_exact(op, "places", *places, ScalarType::Long, {4, experts});
  check_within(op, "rule", rule, 0, 15);
  check_within(op, "start", start, 0, std::numeric_limits<int64_t>::max() - params.size(1));
}

template <typename A>
Rules<A> rules_of(const Tensor& numbers, const std::optional<Tensor>& places, int64_t rule,
                  int64_t seed, int64_t start) {
  const auto* place = places ? static_cast<const int64_t*>(places->const_data_ptr()) : nullptr;
  const auto* table = static_cast<const A*>(numbers.const_data_ptr());
  const KernelFn<DrawCall> draw = kernel_at<DrawColumns, DrawCall>(cpu_level());
  return {numbers.size(1), rule, seed, start, table, place, draw};
}

}  // namespace neulig_fast
