// result[k, s, i] = sum over p in segment s of grad[k, p] * params[i, p]   (blend_weight_grad,
// CUDA)
//
// grad (K, P) and params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64 alike;
// bounds (S + 1,) int64; result (K, S, N) contiguous in the accumulation type, fp32 (fp64 for
// fp64). Accumulates over at most 16384 columns in the accumulation type, and those partial sums in
// fp64. Several gradients leave too few registers for loads to come: their rows go through shared
// memory (gradient_stages.h). Bytes: (N + K) * P * itemsize for K <= 8 (fp64: K = 1) and N <= 8.
// Beyond, neighbouring blocks of threads read the same columns for the next 8 gradients (fp64: the
// next one) or experts at about the same time, from cache.
//
// Two launches, no atomics, and an order that depends on nothing but the shapes and bounds: not
// even on alignment, because a thread owns the same columns whether or not it may load them as one
// pack. First, a block of threads per piece of columns (pieces.h) and group of rows: a partial sum
// per (k, i). Then a block of threads per result adds the partial sums of its segment.
#include "cuda/blend_weight_grad.h"
#include "cuda/dispatch.h"
#include "cuda/gradient_group.h"
#include "cuda/gradient_stages.h"
#include "cuda/pieces.h"
#include "cuda/reduce.h"

#include <type_traits>

namespace neulig_fast {
namespace {

constexpr int64_t kPieceColumns = 16384;
constexpr int kGroupExperts = 8;  // whose sums a thread keeps
constexpr int kGroupGrads = 8;    // of grad, likewise
constexpr int kTotalThreads = 1024;

template <int kRows>
constexpr int kPartialThreads = kRows == 1 ? kThreads : kStageThreads;

inline int64_t count_groups(const BlendWeightGradCall& call, int rows, int experts) {
  return (call.outputs + rows - 1) / rows * ((call.experts + experts - 1) / experts);
}

// sums[n] += grad[p] * params[n, p] over kPacks packs of columns, a block of threads apart. All
// loads come before their first use.
template <int kPacks, typename T, int kExperts, bool kWhole>
NF_DEVICE void add_packs(const Group<T, 1, kExperts, kWhole>& group, int64_t p,
                         Accumulator<T> (&sums)[1][kExperts]) {
  constexpr int kLanes = kWideLanes<T>;
  Pack<T, kLanes> grad[kPacks], x[kPacks][kExperts];
  NF_UNROLL
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t at = p + pack * kThreads * kLanes;
    const T* expert = group.params + at;
    grad[pack] = load_pack<kLanes>(group.grad + at);
    NF_UNROLL
    for (int n = 0; n < kExperts; ++n, expert += group.row_stride)
      if (group.has_expert(n)) x[pack][n] = load_pack<kLanes>(expert);
  }
  NF_UNROLL
  for (int pack = 0; pack < kPacks; ++pack) {
    NF_UNROLL
    for (int n = 0; n < kExperts; ++n) {
      if (!group.has_expert(n)) continue;
      NF_UNROLL
      for (int lane = 0; lane < kLanes; ++lane)
        sums[0][n] =
            multiply_add(widen_lane(grad[pack], lane), widen_lane(x[pack][n], lane), sums[0][n]);
    }
  }
}

// Packs a thread has in flight per row: about 12 loads of 16 bytes.
template <int kExperts, bool kWhole>
constexpr int kPacksAtOnce = kExperts <= 2             ? 4
                             : kExperts <= 8 && kWhole ? 2
                                                       : 1;

// Thread t's share of a piece: pack t of every kThreads packs of its block of columns, in order.
template <typename T, int kExperts, bool kWhole>
NF_DEVICE void add_piece(const Group<T, 1, kExperts, kWhole>& group, const Piece& piece, bool wide,
                         int thread, Accumulator<T> (&sums)[1][kExperts]) {
  constexpr int kLanes = kWideLanes<T>, kPacks = kPacksAtOnce<kExperts, kWhole>;
  constexpr int64_t kStride = kThreads * kLanes;
  const bool whole = piece.begin == piece.block && piece.end == piece.block + kPieceColumns;
  const int64_t first = piece.block + thread * kLanes;
  if (kPacks > 1 && wide && whole) {
    NF_NO_UNROLL
    for (int64_t offset = 0; offset < kPieceColumns; offset += kPacks * kStride)
      add_packs<kPacks>(group, first + offset, sums);
    return;
  }
  NF_NO_UNROLL
  for (int64_t p = first; p < piece.end; p += kStride) {
    if (wide && p >= piece.begin && p + kLanes <= piece.end) add_packs<1>(group, p, sums);
    else add_columns(group, most(p, piece.begin), least(p + kLanes, piece.end), sums);
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls launch(kRows, kExperts, kWhole) for the kernel that the call needs. One gradient and up to
// 8 experts, which is what training asks for, have a kernel per number of experts; other calls
// share three, and fp64, for which speed matters less, has one.
template <typename T, int kExperts = kGroupExperts, typename Launch>
void with_group(const BlendWeightGradCall& call, const Launch& launch) {
  constexpr Constant<1> one;
  constexpr Constant<kGroupGrads> many;
  constexpr std::false_type some;
  if constexpr (sizeof(T) == 8) {
    launch(one, Constant<8>(), some);
  } else if (call.outputs > 1) {
    if (call.experts <= 4) launch(many, Constant<4>(), some);
    else launch(many, Constant<8>(), some);
  } else if (call.experts > 8) {
    launch(one, Constant<8>(), some);
  } else if (call.experts == kExperts) {
    launch(one, Constant<kExperts>(), std::true_type());
  } else if constexpr (kExperts > 1) {
    with_group<T, kExperts - 1>(call, launch);
  }
}

// Thread t's share of the sum over a segment of the partial sums of entry (k, i).
template <typename A>
NF_DEVICE double add_partials(const BlendWeightGradCall& call, int64_t segment, int64_t entry,
                              int thread) {
  const SlotRange range =
      find_slots(call.bounds, call.segments, call.slots, segment, kPieceColumns);
  const A* partials = static_cast<const A*>(call.partials) + entry * call.slots;
  double sum = 0;
  for (int64_t slot = range.begin + thread; slot < range.end; slot += kTotalThreads)
    sum += partials[slot];
  return sum;
}

}  // namespace

int64_t blend_weight_grad_slots(int64_t columns, int64_t segments) {
  return count_slots(columns, segments, kPieceColumns);
}

#ifdef __CUDACC__
namespace {

template <typename T, int kRows, int kExperts, bool kWhole>
__global__ void __launch_bounds__(kPartialThreads<kRows>, 2)
    blend_weight_grad_partial_kernel(const __grid_constant__ BlendWeightGradCall call,
                                     unsigned groups, bool wide) {
  using A = Accumulator<T>;
  using S = GradientStages<T, kRows, kExperts>;
  constexpr int kWarps = kPartialThreads<kRows> / 32;
  constexpr size_t kSumBytes = sizeof(A) * kWarps * kRows * kExperts;
  constexpr size_t kStageBytes = kRows > 1 ? sizeof(typename S::Row) * kStages * S::kSize : 0;
  __shared__ __align__(16) char memory[kStageBytes > kSumBytes ? kStageBytes : kSumBytes];
  const int64_t slot = blockIdx.x / groups;
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot, kPieceColumns);
  if (piece.begin >= piece.end) return;  // the whole block of threads agrees
  const auto group = make_group<T, kRows, kExperts, kWhole>(call, blockIdx.x % groups);
  const int thread = threadIdx.x;
  A sums[kRows][kExperts] = {};
  if constexpr (kRows > 1) {
    auto* stage = reinterpret_cast<typename S::Row*>(memory) + thread;
    S::add_piece(group, piece, wide, thread, stage, sums);
    __syncthreads();  // then nobody needs the stages
  } else {
    add_piece(group, piece, wide, thread, sums);
  }
  auto* warps = reinterpret_cast<A(*)[kRows * kExperts]>(memory);
  NF_UNROLL
  for (int n = 0; n < kRows * kExperts; ++n) {
    const A sum = add_warp(sums[n / kExperts][n % kExperts]);
    if (thread % 32 == 0) warps[thread / 32][n] = sum;
  }
  __syncthreads();
  if (thread >= kRows * kExperts) return;
  const int64_t k = group.k + thread / kExperts, i = group.i + thread % kExperts;
  if (k >= call.outputs || i >= call.experts) return;
  A sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp][thread];
  static_cast<A*>(call.partials)[(k * call.experts + i) * call.slots + slot] = sum;
}

template <typename A>
__global__ void __launch_bounds__(kTotalThreads)
    blend_weight_grad_total_kernel(const __grid_constant__ BlendWeightGradCall call) {
  __shared__ double warps[kTotalThreads / 32];
  const int64_t entries = call.outputs * call.experts;
  const int64_t segment = blockIdx.x / entries, entry = blockIdx.x % entries;
  const double sum = add_warp(add_partials<A>(call, segment, entry, threadIdx.x));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (const double warp : warps) total += warp;
  const int64_t k = entry / call.experts, i = entry % call.experts;
  static_cast<A*>(call.result)[(k * call.segments + segment) * call.experts + i] =
      static_cast<A>(total);
}

bool aligned(int64_t value) {
  return value % 16 == 0;
}

template <typename T, int kRows, int kExperts, bool kWhole>
void launch_partial(const BlendWeightGradCall& call, bool wide, cudaStream_t stream) {
  const auto groups = grid_of(count_groups(call, kRows, kExperts));
  const auto blocks = grid_of(call.slots * groups);
  blend_weight_grad_partial_kernel<T, kRows, kExperts, kWhole>
      <<<blocks, kPartialThreads<kRows>, 0, stream>>>(call, groups, wide);
}

template <typename T>
void launch(const BlendWeightGradCall& call, cudaStream_t stream) {
  const bool wide = aligned(reinterpret_cast<intptr_t>(call.params)) &&
                    aligned(reinterpret_cast<intptr_t>(call.grad)) &&
                    (call.experts == 1 || aligned(call.row_stride * sizeof(T))) &&
                    (call.outputs == 1 || aligned(call.grad_stride * sizeof(T)));
  with_group<T>(call, [&](auto rows, auto experts, auto whole) {
    launch_partial<T, rows, experts, whole>(call, wide, stream);
  });
  const auto results = grid_of(call.outputs * call.experts * call.segments);
  blend_weight_grad_total_kernel<Accumulator<T>><<<results, kTotalThreads, 0, stream>>>(call);
}

}  // namespace

const char* launch_blend_weight_grad(Element element, const BlendWeightGradCall& call,
                                     void* stream) {
  return launch_for<float, double, __nv_bfloat16, __half>(
      element, [&](auto zero) { launch<decltype(zero)>(call, static_cast<cudaStream_t>(stream)); });
}
#endif

}  // namespace neulig_fast
