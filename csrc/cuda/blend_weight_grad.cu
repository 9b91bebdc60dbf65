// result[k, s, i] = sum over p in segment s of grad[k, p] * params[i, p]   (blend_weight_grad,
// CUDA)
//
// grad (K, P) and params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64 alike;
// bounds (S + 1,) int64; result (K, S, N) contiguous in the accumulation type, fp32 (fp64 for
// fp64). Accumulates over at most 4096 columns in the accumulation type, and those partial sums in
// fp64. Bytes: (N + K) * P * itemsize for K <= 4 and N <= 8. Beyond, a block of threads reads its
// 4096 columns again for the next 4 gradients or 8 experts, from cache.
//
// Two launches, no atomics, and an order that depends on nothing but the shapes and bounds: not
// even on alignment, because a thread owns the same columns whether or not it may load them as one
// pack. First, a block of threads per piece of columns (pieces.h): a partial sum per (k, i). Then a
// block of threads per result adds the partial sums of its segment.
#include "cuda/blend_weight_grad.h"
#include "cuda/pieces.h"
#include "cuda/reduce.h"

namespace neulig_fast {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int64_t kBlockColumns = 4096;
constexpr int kExperts = 8;  // experts whose sums a thread keeps

// The rows that a thread sums at once: `rows` gradients and `experts` experts, at their columns 0.
template <typename T>
struct Group {
  const T* grad;
  const T* params;
  int64_t grad_stride, row_stride;
  int rows, experts;
  bool wide;  // packs of 16 bytes are aligned
};

// sums[r][i] += grad[r, p] * params[i, p] over one pack of columns, loaded whole.
template <typename T, int kRows>
NF_DEVICE void add_pack(const Group<T>& group, int64_t p, Accumulator<T> (&sums)[kRows][kExperts]) {
  constexpr int kLanes = kWideLanes<T>;
  Pack<T, kLanes> grad[kRows], x[kExperts];
  NF_UNROLL
  for (int r = 0; r < kRows; ++r)
    if (r < group.rows) grad[r] = load_pack<kLanes>(group.grad + r * group.grad_stride + p);
  NF_UNROLL
  for (int i = 0; i < kExperts; ++i)
    if (i < group.experts) x[i] = load_pack<kLanes>(group.params + i * group.row_stride + p);
  NF_UNROLL
  for (int i = 0; i < kExperts; ++i) {
    if (i >= group.experts) continue;
    NF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      NF_UNROLL
      for (int lane = 0; lane < kLanes; ++lane)
        sums[r][i] = multiply_add(widen(grad[r].lane[lane]), widen(x[i].lane[lane]), sums[r][i]);
    }
  }
}

// The same over one column.
template <typename T, int kRows>
NF_DEVICE void add_column(const Group<T>& group, int64_t p,
                          Accumulator<T> (&sums)[kRows][kExperts]) {
  NF_UNROLL
  for (int i = 0; i < kExperts; ++i) {
    if (i >= group.experts) continue;
    const auto x = widen(group.params[i * group.row_stride + p]);
    NF_UNROLL
    for (int r = 0; r < kRows; ++r)
      if (r < group.rows)
        sums[r][i] = multiply_add(widen(group.grad[r * group.grad_stride + p]), x, sums[r][i]);
  }
}

// Thread t's share of a piece: pack t of every kThreads packs of its block.
template <typename T, int kRows>
NF_DEVICE void add_piece(const Group<T>& group, const Piece& piece, int thread,
                         Accumulator<T> (&sums)[kRows][kExperts]) {
  constexpr int kLanes = kWideLanes<T>;
  NF_NO_UNROLL
  for (int64_t offset = thread * kLanes; offset < kBlockColumns; offset += kThreads * kLanes) {
    const int64_t p = piece.block + offset;
    if (group.wide && p >= piece.begin && p + kLanes <= piece.end) {
      add_pack<T, kRows>(group, p, sums);
    } else {
      NF_NO_UNROLL
      for (int64_t q = most(p, piece.begin); q < least(p + kLanes, piece.end); ++q)
        add_column<T, kRows>(group, q, sums);
    }
  }
}

// Gradients k .. and experts i .. of the call.
template <typename T, int kRows>
NF_DEVICE Group<T> make_group(const BlendWeightGradCall& call, bool wide, int64_t k, int64_t i) {
  return {static_cast<const T*>(call.grad) + k * call.grad_stride,
          static_cast<const T*>(call.params) + i * call.row_stride,
          call.grad_stride,
          call.row_stride,
          static_cast<int>(least(kRows, call.outputs - k)),
          static_cast<int>(least(kExperts, call.experts - i)),
          wide};
}

// Thread t's share of the sum over a segment of the partial sums of entry (k, i).
template <typename A>
NF_DEVICE double add_partials(const BlendWeightGradCall& call, int64_t segment, int64_t entry,
                              int thread) {
  const SlotRange range =
      find_slots(call.bounds, call.segments, call.slots, segment, kBlockColumns);
  const A* partials = static_cast<const A*>(call.partials) + entry * call.slots;
  double sum = 0;
  for (int64_t slot = range.begin + thread; slot < range.end; slot += kThreads)
    sum += partials[slot];
  return sum;
}

}  // namespace

int64_t blend_weight_grad_slots(int64_t columns, int64_t segments) {
  return count_slots(columns, segments, kBlockColumns);
}

#ifdef __CUDACC__
namespace {

// Two blocks per multiprocessor at the least for one gradient; for four, 128 registers would spill.
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 2 : 1)
    blend_weight_grad_partial_kernel(const __grid_constant__ BlendWeightGradCall call, bool wide) {
  using A = Accumulator<T>;
  __shared__ A warps[kWarps][kRows * kExperts];
  const int64_t slot = blockIdx.x;
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot, kBlockColumns);
  if (piece.begin >= piece.end) return;  // the whole block of threads agrees
  const int thread = threadIdx.x, r = thread / kExperts, i = thread % kExperts;
  for (int64_t k = 0; k < call.outputs; k += kRows) {
    for (int64_t expert = 0; expert < call.experts; expert += kExperts) {
      const Group<T> group = make_group<T, kRows>(call, wide, k, expert);
      A sums[kRows][kExperts] = {};
      add_piece<T, kRows>(group, piece, thread, sums);
      NF_UNROLL
      for (int n = 0; n < kRows * kExperts; ++n) {
        const A sum = add_warp(sums[n / kExperts][n % kExperts]);
        if (thread % 32 == 0) warps[thread / 32][n] = sum;
      }
      __syncthreads();
      if (r < group.rows && i < group.experts) {
        A sum = 0;
        for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp][thread];
        const int64_t entry = (k + r) * call.experts + expert + i;
        static_cast<A*>(call.partials)[entry * call.slots + slot] = sum;
      }
      __syncthreads();
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    blend_weight_grad_total_kernel(const __grid_constant__ BlendWeightGradCall call) {
  __shared__ double warps[kWarps];
  const int64_t entries = call.outputs * call.experts;
  const int64_t segment = blockIdx.x / entries, entry = blockIdx.x % entries;
  const double sum = add_warp(add_partials<A>(call, segment, entry, threadIdx.x));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += warps[warp];
  const int64_t k = entry / call.experts, i = entry % call.experts;
  static_cast<A*>(call.result)[(k * call.segments + segment) * call.experts + i] =
      static_cast<A>(total);
}

bool aligned(int64_t value) {
  return value % 16 == 0;
}

template <typename T>
void launch(const BlendWeightGradCall& call, cudaStream_t stream) {
  const bool wide = aligned(reinterpret_cast<intptr_t>(call.params)) &&
                    aligned(reinterpret_cast<intptr_t>(call.grad)) &&
                    (call.experts == 1 || aligned(call.row_stride * sizeof(T))) &&
                    (call.outputs == 1 || aligned(call.grad_stride * sizeof(T)));
  const auto slots = static_cast<unsigned>(call.slots);
  if (call.outputs == 1)
    blend_weight_grad_partial_kernel<T, 1><<<slots, kThreads, 0, stream>>>(call, wide);
  else blend_weight_grad_partial_kernel<T, 4><<<slots, kThreads, 0, stream>>>(call, wide);
  const auto results = static_cast<unsigned>(call.outputs * call.experts * call.segments);
  blend_weight_grad_total_kernel<Accumulator<T>><<<results, kThreads, 0, stream>>>(call);
}

}  // namespace

const char* launch_blend_weight_grad(Element element, const BlendWeightGradCall& call,
                                     void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (element) {
    case Element::kFloat: launch<float>(call, on); break;
    case Element::kDouble: launch<double>(call, on); break;
    case Element::kBFloat16: launch<__nv_bfloat16>(call, on); break;
    case Element::kHalf: launch<__half>(call, on); break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

}  // namespace neulig_fast
