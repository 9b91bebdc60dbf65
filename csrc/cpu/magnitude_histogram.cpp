// counts[i, v] = how many magnitudes |params[i, p] - base[p]| have the digit v    (CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; base (P,) likewise or
// none; differences in fp32 (fp64 for fp64). A magnitude's bits without the sign are cut into the
// digits of magnitude_rows.h; counted are those whose bits above digit `digit` are prefix[i], NaN
// left out. counts (N, 2048) int64 are sums of integers: the same for all threads and levels.
//
// Bytes: (N + 1) P itemsize.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"
#include "cpu/magnitude_rows.h"

namespace neulig_fast {
namespace {

template <typename T>
void count_digits(const Magnitudes<T>& rows, const int64_t* prefix, Digit digit, int64_t* counts) {
  cpu_level();  // may throw, which a thread may not
  // All experts of a chunk before the next one: they find base in cache.
  for_each_item(rows.chunks() * rows.experts, rows.experts * rows.columns, [&](int64_t item) {
    const int64_t expert = item % rows.experts;
    rows.count_digit(expert, item / rows.experts, prefix[expert], digit, counts + expert * kBins);
  });
}

Tensor magnitude_histogram(const Tensor& params, const Tensor& prefix, int64_t digit,
                           std::optional<Tensor> base) {
  const char* op = "magnitude_histogram";
  check_magnitudes(op, params, base);
  check_exact(op, "prefix", prefix, ScalarType::Long, {params.size(0)});
  const std::vector<Digit> digits = digits_of(params.scalar_type() == ScalarType::Double ? 8 : 4);
  const int64_t last = static_cast<int64_t>(digits.size()) - 1;
  STD_TORCH_CHECK(digit >= 0 && digit <= last, op, ": digit must be 0 to ", last, ", got ", digit);
  Tensor counts = torch::stable::new_zeros(params, {params.size(0), kBins}, ScalarType::Long);
  visit_dtype(params.scalar_type(), [&](auto element) {
    count_digits<decltype(element)>(
        {params, base}, static_cast<const int64_t*>(prefix.const_data_ptr()), digits[digit],
        static_cast<int64_t*>(counts.mutable_data_ptr()));
  });
  return counts;
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("magnitude_histogram", TORCH_BOX(&neulig_fast::magnitude_histogram));
}
