// g[t, i] = <grad_t, x[i, t]>, or their sum over t        (blend_lists_weight_grad, CUDA)
//
// A table of the addresses of N lists of T tensors of one dtype, fp32 | bf16 | fp16 | fp64, and of
// T gradients, any of the four (address 0: no gradient, all zeros); g in fp64.
// Two stages in a fixed order, without atomics. One block sums a chunk: each thread its packs, in
// fp32 (fp64 for fp64), products and additions fused; then lanes of a warp, then warps. The second
// stage adds the chunks of a tensor, or all of them, in fp64. The bits depend on the input and on
// whether the tensors are aligned to 16 bytes, nothing else.
// Bytes: (N + 1) values read per element; beyond 8 experts the gradient again for every 8 more.
#include "cuda/blend_lists_weight_grad.h"
#include "cuda/dispatch.h"
#include "cuda/list_chunks.h"
#include "cuda/reduce.h"

namespace neulig_fast {
namespace {

constexpr int kWarps = kThreads / 32;

// Packs of each expert that a thread has in flight: two, unless their values would spill.
template <typename T, int kExperts>
constexpr int kDotPacks = kExperts > (sizeof(T) == 4 ? kGroup : 4) ? 1 : 2;

// sums[i] += grad[q] * x[i][q] over kPackCount packs of kLanes columns, `step` columns apart, from
// p on and before `end`. The experts are loaded first: what the gradient's type is decided upon
// then hides behind them.
template <int kLanes, int kPackCount, typename T, int kExperts>
NF_DEVICE void add_packs(const T* const (&x)[kExperts], Element element, int64_t grad, int64_t p,
                         int64_t step, int64_t end, Accumulator<T> (&sums)[kExperts]) {
  Pack<T, kLanes> held[kPackCount][kExperts];
  Accumulator<T> factor[kPackCount][kLanes];
  NF_UNROLL
  for (int pack = 0; pack < kPackCount; ++pack) {
    if (p + pack * step >= end) continue;
    NF_UNROLL
    for (int i = 0; i < kExperts; ++i) held[pack][i] = load_global<kLanes>(x[i] + p + pack * step);
  }
  NF_UNROLL
  for (int pack = 0; pack < kPackCount; ++pack)
    if (p + pack * step < end) load_values(element, grad, p + pack * step, factor[pack]);
  NF_UNROLL
  for (int pack = 0; pack < kPackCount; ++pack) {
    if (p + pack * step >= end) continue;
    NF_UNROLL
    for (int i = 0; i < kExperts; ++i) {
      NF_UNROLL
      for (int lane = 0; lane < kLanes; ++lane)
        sums[i] = multiply_add(factor[pack][lane], widen(held[pack][i].lane[lane]), sums[i]);
    }
  }
}

// Thread t's share of the sums of kExperts experts, from number `first` on, over a chunk.
template <typename T, int kExperts>
NF_DEVICE void add_chunk(const BlendListsWeightGradCall& call, int64_t chunk, int64_t first,
                         int thread, Accumulator<T> (&sums)[kExperts]) {
  const ListTable& lists = call.lists;
  const ListChunk piece = find_list_chunk(lists, chunk);
  const int64_t* addresses = lists.addresses + piece.tensor * lists.experts + first;
  const int64_t grad = lists.others[piece.tensor];
  if (grad == 0) return;
  const T* x[kExperts];
  NF_UNROLL
  for (int i = 0; i < kExperts; ++i) x[i] = at_address<const T>(addresses[i]);
  constexpr int kLanes = kWideLanes<T>, kCount = kDotPacks<T, kExperts>,
                kStride = kThreads * kLanes;
  int64_t whole = piece.begin;
  if (is_wide(addresses, kExperts, grad)) whole += (piece.end - piece.begin) / kLanes * kLanes;
  NF_NO_UNROLL
  for (int64_t p = piece.begin + thread * kLanes; p < whole; p += kCount * kStride)
    add_packs<kLanes, kCount>(x, call.grad, grad, p, kStride, whole, sums);
  NF_NO_UNROLL
  for (int64_t p = whole + thread; p < piece.end; p += kCount * kThreads)
    add_packs<1, kCount>(x, call.grad, grad, p, kThreads, piece.end, sums);
}

// Thread t's share of the total of entry (t, i) of the result.
template <typename A>
NF_DEVICE double add_partials(const BlendListsWeightGradCall& call, int64_t entry, int thread) {
  const int64_t tensor = entry / call.lists.experts, expert = entry % call.lists.experts;
  const int64_t begin = call.per_tensor ? call.lists.bounds[tensor] : 0;
  const int64_t end = call.per_tensor ? call.lists.bounds[tensor + 1] : call.lists.chunks;
  const A* partials = static_cast<const A*>(call.partials) + expert * call.lists.chunks;
  double sum = 0;
  for (int64_t c = begin + thread; c < end; c += kThreads) sum += partials[c];
  return sum;
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <typename T, int kExperts>
__global__ void __launch_bounds__(kThreads, 2)
    blend_lists_weight_grad_partial_kernel(const __grid_constant__ BlendListsWeightGradCall call,
                                           int64_t first) {
  using A = Accumulator<T>;
  __shared__ A warps[kWarps][kExperts];
  const int thread = threadIdx.x;
  A sums[kExperts] = {};
  add_chunk<T, kExperts>(call, blockIdx.x, first, thread, sums);
  NF_UNROLL
  for (int i = 0; i < kExperts; ++i) {
    const A sum = add_warp(sums[i]);
    if (thread % 32 == 0) warps[thread / 32][i] = sum;
  }
  __syncthreads();
  if (thread >= kExperts) return;
  A total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += warps[warp][thread];
  static_cast<A*>(call.partials)[(first + thread) * call.lists.chunks + blockIdx.x] = total;
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    blend_lists_weight_grad_total_kernel(const __grid_constant__ BlendListsWeightGradCall call) {
  __shared__ double warps[kWarps];
  const double sum = add_warp(add_partials<A>(call, blockIdx.x, threadIdx.x));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += warps[warp];
  call.result[blockIdx.x] = total;
}

// The last group has as many experts as are left.
template <typename T, int kExperts>
void launch_group(const BlendListsWeightGradCall& call, int64_t first, cudaStream_t stream) {
  if constexpr (kExperts > 1) {
    if (call.lists.experts - first < kExperts)
      return launch_group<T, kExperts - 1>(call, first, stream);
  }
  const auto blocks = grid_of(call.lists.chunks);
  blend_lists_weight_grad_partial_kernel<T, kExperts><<<blocks, kThreads, 0, stream>>>(call, first);
}

template <typename T>
void launch(const BlendListsWeightGradCall& call, cudaStream_t stream) {
  for (int64_t first = 0; first < call.lists.experts; first += kGroup)
    launch_group<T, kGroup>(call, first, stream);
  const int64_t rows = call.per_tensor ? call.lists.tensors : 1;
  const auto entries = grid_of(rows * call.lists.experts);
  blend_lists_weight_grad_total_kernel<Accumulator<T>><<<entries, kThreads, 0, stream>>>(call);
}

}  // namespace

const char* launch_blend_lists_weight_grad(Element element, const BlendListsWeightGradCall& call,
                                           void* stream) {
  return launch_for<float, double, __nv_bfloat16, __half>(
      element, [&](auto zero) { launch<decltype(zero)>(call, static_cast<cudaStream_t>(stream)); });
}
#endif

}  // namespace neulig_fast
