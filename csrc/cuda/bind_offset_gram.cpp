// offset_gram as an operator of CUDA tensors: checks, allocation, launch.
#include "common/offsets.h"
#include "cuda/bindings.h"
#include "cuda/offset_gram.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace neulig_fast {
namespace {

std::tuple<Tensor, Tensor> offset_gram(const Tensor& params, std::optional<Tensor> segments) {
  const BlendShape shape = check_offset_gram(params, segments);
  check_device_call("offset_gram", "params", params, params, segments, shape);
  const int64_t n = shape.experts;
  const Element element = element_of(params.scalar_type());
  const int64_t rows = offset_gram_rows(n, element), count = count_totals(rows);
  STD_TORCH_CHECK(shape.segments * count < int64_t{1} << 31, "offset_gram: ", shape.segments,
                  " segments of ", n, " experts are more than one launch can total");
  const torch::stable::accelerator::DeviceGuard guard(params.get_device_index());
  const auto doubles = [&](std::vector<int64_t> size) {
    return torch::stable::new_empty(params, size, ScalarType::Double);
  };
  Tensor sums = doubles({shape.segments, n}), gram = doubles({shape.segments, n, n});
  if (shape.segments == 0) return {sums, gram};
  if (shape.columns == 0 || n == 1) return {torch::stable::zero_(sums), torch::stable::zero_(gram)};
  const int64_t width = offset_gram_width(shape.columns, n, element);
  const int64_t slots = offset_gram_slots(shape.columns, shape.segments, width);
  Tensor partials =
      torch::stable::new_empty(params, {count * slots}, acc_dtype(params.scalar_type()));
  Tensor totals = doubles({shape.segments * count});
  const OffsetGramCall call = {params.const_data_ptr(),
                               bounds_of(segments),
                               partials.mutable_data_ptr(),
                               static_cast<double*>(totals.mutable_data_ptr()),
                               static_cast<double*>(sums.mutable_data_ptr()),
                               static_cast<double*>(gram.mutable_data_ptr()),
                               shape.segments,
                               n,
                               shape.columns,
                               params.stride(0),
                               slots,
                               width,
                               rows};
  check_launch("offset_gram", launch_offset_gram(element, call, current_stream(params)));
  return {sums, gram};
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CUDA, m) {
  m.impl("offset_gram", TORCH_BOX(&neulig_fast::offset_gram));
}
