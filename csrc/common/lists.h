// N lists of T tensors of one dtype, as addresses. No torch headers.
#pragma once

#include <cstdint>

namespace neulig_fast {

// Tensor t is cut into chunks of `chunk` elements, its last one shorter; the chunks of all tensors
// are numbered in order, those of tensor t from bounds[t] on.
struct ListTable {
  const int64_t* bounds;     // (T + 1,)
  const int64_t* lengths;    // (T,): elements
  const int64_t* rows;       // (T,): of weights (R, N)
  const int64_t* addresses;  // (T, N)
  const int64_t* others;     // (T,): of the outputs, from a base on, or of the gradients; 0: none
  int64_t tensors, experts, chunk, chunks;
};

inline ListTable make_list_table(const int64_t* table, const int64_t* others, int64_t tensors,
                                 int64_t experts, int64_t chunk, int64_t chunks) {
  const int64_t* lengths = table + tensors + 1;
  return {table, lengths, lengths + tensors, lengths + 2 * tensors, others, tensors, experts,
          chunk, chunks};
}

}  // namespace neulig_fast
