// The per-thread code of the CUDA kernels over lists of tensors, run on the CPU one thread after
// the other, as in cuda_on_cpu.cpp. test_cuda_lists_on_cpu.py compiles it and calls it.
#include "cuda/blend_lists.cu"
#include "cuda/blend_lists_weight_grad.cu"

using namespace neulig_fast;

namespace {

template <typename T, int kExperts>
void blend_chunk(const BlendListsCall& call, int64_t chunk, int thread, bool many) {
  if (many) return blend_chunk_many<T>(call, chunk, thread);
  if constexpr (kExperts > 1) {
    if (call.lists.experts < kExperts)
      return blend_chunk<T, kExperts - 1>(call, chunk, thread, many);
  }
  blend_chunk_few<T, kExperts>(call, chunk, thread);
}

template <typename T, int kExperts>
void sum_group(const BlendListsWeightGradCall& call, int64_t chunk, int64_t first) {
  using A = Accumulator<T>;
  if constexpr (kExperts > 1) {
    if (call.lists.experts - first < kExperts)
      return sum_group<T, kExperts - 1>(call, chunk, first);
  }
  A total[kExperts] = {};
  for (int thread = 0; thread < kThreads; ++thread) {
    A sums[kExperts] = {};
    add_chunk<T, kExperts>(call, chunk, first, thread, sums);
    for (int i = 0; i < kExperts; ++i) total[i] += sums[i];
  }
  for (int i = 0; i < kExperts; ++i)
    static_cast<A*>(call.partials)[(first + i) * call.lists.chunks + chunk] = total[i];
}

template <typename T>
void weight_grad(const BlendListsWeightGradCall& call) {
  for (int64_t chunk = 0; chunk < call.lists.chunks; ++chunk)
    for (int64_t first = 0; first < call.lists.experts; first += 8)
      sum_group<T, 8>(call, chunk, first);
  const int64_t rows = call.per_tensor ? call.lists.tensors : 1;
  for (int64_t entry = 0; entry < rows * call.lists.experts; ++entry) {
    double sum = 0;
    for (int thread = 0; thread < kThreads; ++thread)
      sum += add_partials<Accumulator<T>>(call, entry, thread);
    call.result[entry] = sum;
  }
}

ListTable lists_of(const int64_t* table, const int64_t* others, const int64_t (&sizes)[4]) {
  return make_list_table(table, others, sizes[0], sizes[1], sizes[2], sizes[3]);
}

// body(a value of the element's type)
template <typename Body>
void with_type(Element element, const Body& body) {
  switch (element) {
    case Element::kFloat: return body(float{});
    case Element::kDouble: return body(double{});
    case Element::kBFloat16: return body(__nv_bfloat16{});
    case Element::kHalf: return body(__half{});
    default: return;  // no fp8
  }
}

}  // namespace

extern "C" {

// sizes: T, N, elements of a chunk, chunks. Chunks first .. last - 1.
void blend_lists(int element, int out, const void* weights, int64_t weight_stride,
                 const int64_t* table, const int64_t* outputs, int64_t base,
                 const int64_t (*sizes)[4], int64_t first, int64_t last, bool many) {
  const BlendListsCall call = {weights, weight_stride, base, lists_of(table, outputs, *sizes),
                               static_cast<Element>(out)};
  with_type(static_cast<Element>(element), [&](auto value) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      for (int thread = 0; thread < kThreads; ++thread)
        blend_chunk<decltype(value), 8>(call, chunk, thread, many);
  });
}

void blend_lists_weight_grad(int element, int grad, const int64_t* table, const int64_t* grads,
                             const int64_t (*sizes)[4], void* partials, double* result,
                             bool per_tensor) {
  const BlendListsWeightGradCall call = {lists_of(table, grads, *sizes), static_cast<Element>(grad),
                                         partials, result, per_tensor};
  with_type(static_cast<Element>(element), [&](auto value) { weight_grad<decltype(value)>(call); });
}

}  // extern "C"
