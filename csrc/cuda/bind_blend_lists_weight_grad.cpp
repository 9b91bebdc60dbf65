// blend_lists_weight_grad's twin of CUDA tensors: checks, allocation, launch.
#include "cuda/blend_lists_weight_grad.h"
#include "cuda/list_bindings.h"

#include <torch/csrc/stable/library.h>

namespace neulig_fast {
namespace {

Tensor blend_lists_weight_grad(const Tensor& table, const Tensor& grads, int64_t experts,
                               int64_t chunk, int64_t chunks, bool per_tensor, ScalarType dtype,
                               ScalarType grad_dtype) {
  const char* op = "blend_lists_weight_grad";
  check_list_dtype(op, "experts", dtype);
  check_list_dtype(op, "grads", grad_dtype);
  const ListTable lists = check_lists(op, table, grads, experts, chunk, chunks);
  check_list_device(op, table, grads);
  check_list_launch(op, lists);
  const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  Tensor result = torch::stable::new_empty(table, {per_tensor ? lists.tensors : 1, experts},
                                           ScalarType::Double);
  Tensor partials = torch::stable::new_empty(table, {experts * chunks}, acc_dtype(dtype));
  const BlendListsWeightGradCall call = {lists, element_of(grad_dtype), partials.mutable_data_ptr(),
                                         static_cast<double*>(result.mutable_data_ptr()),
                                         per_tensor};
  check_launch(op, launch_blend_lists_weight_grad(element_of(dtype), call, current_stream(table)));
  return result;
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CUDA, m) {
  m.impl("blend_lists_weight_grad", TORCH_BOX(&neulig_fast::blend_lists_weight_grad));
}
