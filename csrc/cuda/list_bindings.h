// What launching adds to the checks of tables of addresses.
#pragma once

#include "common/list_checks.h"
#include "cuda/bindings.h"

namespace neulig_fast {

inline void check_list_device(const char* op, const Tensor& table, const Tensor& other) {
  const int32_t device = table.get_device_index();
  STD_TORCH_CHECK(other.is_cuda() && other.get_device_index() == device, op,
                  ": everything must be on the table's device, CUDA ", device);
}

inline void check_list_launch(const char* op, const ListTable& lists) {
  STD_TORCH_CHECK(lists.experts <= kMaxExperts, op, ": ", lists.experts, " experts, more than ",
                  kMaxExperts);
  STD_TORCH_CHECK(lists.chunks <= 0x7FFFFFFF && lists.tensors * lists.experts <= 0x7FFFFFFF, op,
                  ": too many chunks for one launch: ", lists.chunks);
  STD_TORCH_CHECK(lists.chunk % 16 == 0, op, ": a chunk must be a multiple of 16 elements, got ",
                  lists.chunk);
}

}  // namespace neulig_fast
