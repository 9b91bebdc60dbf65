// blend_lists' twin of CUDA tensors: checks, launch.
#include "cuda/blend_lists.h"
#include "cuda/list_bindings.h"

#include <torch/csrc/stable/library.h>

namespace neulig_fast {
namespace {

void blend_lists(const Tensor& weights, const Tensor& table, const Tensor& outputs, int64_t base,
                 int64_t chunk, int64_t chunks, ScalarType dtype, ScalarType out_dtype) {
  const char* op = "blend_lists";
  check_list_dtype(op, "experts", dtype);
  check_list_dtype(op, "outputs", out_dtype);
  check_list_weights(op, weights, dtype);
  const int64_t experts = weights.size(weights.dim() - 1);
  const ListTable lists = check_lists(op, table, outputs, experts, chunk, chunks);
  check_list_device(op, table, weights);
  check_list_device(op, table, outputs);
  check_list_launch(op, lists);
  const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  const BlendListsCall call = {weights.const_data_ptr(), weights.dim() == 2 ? experts : 0, base,
                               lists, element_of(out_dtype)};
  check_launch(op, launch_blend_lists(element_of(dtype), call, current_stream(table)));
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CUDA, m) {
  m.impl("blend_lists", TORCH_BOX(&neulig_fast::blend_lists));
}
