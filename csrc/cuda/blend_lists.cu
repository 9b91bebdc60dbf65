// theta_t = sum_i weights[t, i] * x[i, t]        (blend_lists, CUDA)
//
// A table of the addresses of N lists of T tensors of one dtype, fp32 | bf16 | fp16 | fp64, and of
// T outputs, any of the four; weights (N,) or (R, N) contiguous, fp32 (fp64 for fp64).
// Accumulates in weights' type: w_0 x_0, then + w_i x_i in expert order, multiplied then added, one
// rounding at the end: the bits are those of blend.
// Bytes: each expert is read once and each output written once.
//
// One block per chunk, whatever the tensors' sizes. Where all addresses of its tensor are multiples
// of 16, a thread takes packs of 16 bytes of each expert, else single columns. Up to 8 experts are
// loaded together, and two packs each of few experts in a 2-byte type; beyond, by eights.
#include "cuda/blend_lists.h"
#include "cuda/dispatch.h"
#include "cuda/list_chunks.h"

namespace neulig_fast {
namespace {

// Packs of each expert that a thread has in flight.
template <typename T, int kExperts>
constexpr int kBlendPacks = sizeof(T) == 2 && kExperts <= 4 ? 2 : 1;

// What a thread keeps of a chunk's tensor in registers.
template <typename T, int kExperts>
struct Sources {
  const T* x[kExperts];
  Accumulator<T> weights[kExperts];
  int64_t theta;
  Element out;
};

template <typename T, int kExperts>
NF_DEVICE Sources<T, kExperts> make_sources(const BlendListsCall& call, int64_t tensor) {
  Sources<T, kExperts> sources;
  const int64_t* addresses = call.lists.addresses + tensor * kExperts;
  const auto* weights = static_cast<const Accumulator<T>*>(call.weights) +
                        call.lists.rows[tensor] * call.weight_stride;
  NF_UNROLL
  for (int i = 0; i < kExperts; ++i) {
    sources.x[i] = at_address<const T>(addresses[i]);
    sources.weights[i] = weights[i];
  }
  sources.theta = call.base + call.lists.others[tensor];
  sources.out = call.out;
  return sources;
}

// kPackCount packs of kLanes columns, `step` columns apart, from p on and before `end`.
template <int kLanes, int kPackCount, typename T, int kExperts>
NF_DEVICE void blend_few(const Sources<T, kExperts>& sources, int64_t p, int64_t step,
                         int64_t end) {
  using A = Accumulator<T>;
  Pack<T, kLanes> x[kPackCount][kExperts];
  NF_UNROLL
  for (int pack = 0; pack < kPackCount; ++pack) {
    if (p + pack * step >= end) continue;
    NF_UNROLL
    for (int i = 0; i < kExperts; ++i)
      x[pack][i] = load_global<kLanes>(sources.x[i] + p + pack * step);
  }
  NF_UNROLL
  for (int pack = 0; pack < kPackCount; ++pack) {
    if (p + pack * step >= end) continue;
    A sums[kLanes];
    NF_UNROLL
    for (int lane = 0; lane < kLanes; ++lane)
      sums[lane] = multiply(sources.weights[0], widen(x[pack][0].lane[lane]));
    NF_UNROLL
    for (int i = 1; i < kExperts; ++i) {
      NF_UNROLL
      for (int lane = 0; lane < kLanes; ++lane)
        sums[lane] = add(sums[lane], multiply(sources.weights[i], widen(x[pack][i].lane[lane])));
    }
    store_sums(sources.out, sources.theta, p + pack * step, sums);
  }
}

// Thread t's share of a chunk: whole packs, then the rest by columns; or columns alone.
template <typename T, int kExperts>
NF_DEVICE void blend_chunk_few(const BlendListsCall& call, int64_t chunk, int thread) {
  const ListChunk piece = find_list_chunk(call.lists, chunk);
  const Sources<T, kExperts> sources = make_sources<T, kExperts>(call, piece.tensor);
  constexpr int kLanes = kWideLanes<T>, kCount = kBlendPacks<T, kExperts>,
                kStride = kThreads * kLanes;
  int64_t whole = piece.begin;
  if (is_wide(call.lists.addresses + piece.tensor * kExperts, kExperts, sources.theta))
    whole += (piece.end - piece.begin) / kLanes * kLanes;
  NF_NO_UNROLL
  for (int64_t p = piece.begin + thread * kLanes; p < whole; p += kCount * kStride)
    blend_few<kLanes, kCount>(sources, p, kStride, whole);
  NF_NO_UNROLL
  for (int64_t p = whole + thread; p < piece.end; p += kThreads)
    blend_few<1, 1>(sources, p, 0, piece.end);
}

// The pack of kLanes columns from p on, any number of experts.
template <int kLanes, typename T>
NF_DEVICE void blend_many(const int64_t* addresses, const Accumulator<T>* weights, int experts,
                          Element out, int64_t theta, int64_t p) {
  using A = Accumulator<T>;
  A sums[kLanes] = {};
  NF_NO_UNROLL
  for (int first = 0; first < experts; first += kGroup) {
    Pack<T, kLanes> x[kGroup];
    NF_UNROLL
    for (int j = 0; j < kGroup; ++j)
      if (first + j < experts)
        x[j] = load_global<kLanes>(at_address<const T>(addresses[first + j]) + p);
    NF_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (first + j >= experts) continue;
      NF_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        const A term = multiply(weights[first + j], widen(x[j].lane[lane]));
        sums[lane] = first + j == 0 ? term : add(sums[lane], term);
      }
    }
  }
  store_sums(out, theta, p, sums);
}

template <typename T>
NF_DEVICE void blend_chunk_many(const BlendListsCall& call, int64_t chunk, int thread) {
  const ListTable& lists = call.lists;
  const ListChunk piece = find_list_chunk(lists, chunk);
  const int64_t* addresses = lists.addresses + piece.tensor * lists.experts;
  const auto* weights = static_cast<const Accumulator<T>*>(call.weights) +
                        lists.rows[piece.tensor] * call.weight_stride;
  const int64_t theta = call.base + lists.others[piece.tensor];
  const int experts = static_cast<int>(lists.experts);
  constexpr int kLanes = kWideLanes<T>;
  int64_t whole = piece.begin;
  if (is_wide(addresses, experts, theta)) whole += (piece.end - piece.begin) / kLanes * kLanes;
  NF_NO_UNROLL
  for (int64_t p = piece.begin + thread * kLanes; p < whole; p += kThreads * kLanes)
    blend_many<kLanes, T>(addresses, weights, experts, call.out, theta, p);
  NF_NO_UNROLL
  for (int64_t p = whole + thread; p < piece.end; p += kThreads)
    blend_many<1, T>(addresses, weights, experts, call.out, theta, p);
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <typename T, int kExperts>
__global__ void __launch_bounds__(kThreads, 2)
    blend_lists_few_kernel(const __grid_constant__ BlendListsCall call) {
  blend_chunk_few<T, kExperts>(call, blockIdx.x, threadIdx.x);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    blend_lists_many_kernel(const __grid_constant__ BlendListsCall call) {
  blend_chunk_many<T>(call, blockIdx.x, threadIdx.x);
}

template <typename T, int kExperts>
void launch_few(const BlendListsCall& call, cudaStream_t stream) {
  if constexpr (kExperts > 1) {
    if (call.lists.experts < kExperts) return launch_few<T, kExperts - 1>(call, stream);
  }
  const auto blocks = grid_of(call.lists.chunks);
  blend_lists_few_kernel<T, kExperts><<<blocks, kThreads, 0, stream>>>(call);
}

template <typename T>
void launch(const BlendListsCall& call, cudaStream_t stream) {
  if (call.lists.experts <= kGroup) return launch_few<T, kGroup>(call, stream);
  const auto blocks = grid_of(call.lists.chunks);
  blend_lists_many_kernel<T><<<blocks, kThreads, 0, stream>>>(call);
}

}  // namespace

const char* launch_blend_lists(Element element, const BlendListsCall& call, void* stream) {
  return launch_for<float, double, __nv_bfloat16, __half>(
      element, [&](auto zero) { launch<decltype(zero)>(call, static_cast<cudaStream_t>(stream)); });
}
#endif

}  // namespace neulig_fast
