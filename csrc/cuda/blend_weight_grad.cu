// result[k, s, i] = sum over p in segment s of grad[k, p] * params[i, p]   (blend_weight_grad,
// CUDA)
//
// grad (K, P) and params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64 alike;
// bounds (S + 1,) int64; result (K, S, N) contiguous in the accumulation type, fp32 (fp64 for
// fp64). Accumulates over at most 16384 columns in the accumulation type, and those partial sums in
// fp64. Bytes: (N + K) * P * itemsize for K <= 8 and N <= 8. Beyond, neighbouring blocks of threads
// read the same columns for the next 8 gradients or experts at about the same time, from cache.
//
// Two launches, no atomics, and an order that depends on nothing but the shapes and bounds: not
// even on alignment, because a thread owns the same columns whether or not it may load them as one
// pack. First, a block of threads per piece of columns (pieces.h) and group of rows: a partial sum
// per (k, i). Then a block of threads per result adds the partial sums of its segment.
#include "cuda/blend_weight_grad.h"
#include "cuda/dispatch.h"
#include "cuda/pieces.h"
#include "cuda/reduce.h"

namespace neulig_fast {
namespace {

constexpr int64_t kPieceColumns = 16384;
constexpr int kGroupExperts = 8;  // whose sums a thread keeps
constexpr int kGroupGrads = 8;    // of grad, likewise
constexpr int kTotalThreads = 1024;

// The rows that a block of threads sums: kRows gradients from k on and kExperts experts from i on.
// Rows past the last one are the last one again, and their sums are not kept.
template <typename T, int kRows, int kExperts>
struct Group {
  const T* grad[kRows];
  const T* params[kExperts];
  int64_t k, i;
};

template <typename T, int kRows, int kExperts>
NF_DEVICE Group<T, kRows, kExperts> make_group(const BlendWeightGradCall& call, int64_t index) {
  const int64_t expert_groups = (call.experts + kExperts - 1) / kExperts;
  Group<T, kRows, kExperts> group;
  group.k = index / expert_groups * kRows;
  group.i = index % expert_groups * kExperts;
  NF_UNROLL
  for (int r = 0; r < kRows; ++r)
    group.grad[r] =
        static_cast<const T*>(call.grad) + least(group.k + r, call.outputs - 1) * call.grad_stride;
  NF_UNROLL
  for (int n = 0; n < kExperts; ++n)
    group.params[n] =
        static_cast<const T*>(call.params) + least(group.i + n, call.experts - 1) * call.row_stride;
  return group;
}

inline int64_t count_groups(const BlendWeightGradCall& call, int rows, int experts) {
  return (call.outputs + rows - 1) / rows * ((call.experts + experts - 1) / experts);
}

// sums[r][n] += grad[r, p] * params[n, p] over kPacks packs of columns, kThreads packs apart. All
// loads come before their first use.
template <typename T, int kPacks, int kRows, int kExperts>
NF_DEVICE void add_packs(const Group<T, kRows, kExperts>& group, int64_t p,
                         Accumulator<T> (&sums)[kRows][kExperts]) {
  constexpr int kLanes = kWideLanes<T>;
  Pack<T, kLanes> grad[kPacks][kRows], x[kPacks][kExperts];
  NF_UNROLL
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t at = p + pack * kThreads * kLanes;
    NF_UNROLL
    for (int r = 0; r < kRows; ++r) grad[pack][r] = load_pack<kLanes>(group.grad[r] + at);
    NF_UNROLL
    for (int n = 0; n < kExperts; ++n) x[pack][n] = load_pack<kLanes>(group.params[n] + at);
  }
  NF_UNROLL
  for (int pack = 0; pack < kPacks; ++pack) {
    NF_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      NF_UNROLL
      for (int n = 0; n < kExperts; ++n) {
        NF_UNROLL
        for (int r = 0; r < kRows; ++r)
          sums[r][n] = multiply_add(widen(grad[pack][r].lane[lane]), widen(x[pack][n].lane[lane]),
                                    sums[r][n]);
      }
    }
  }
}

// The same over one column.
template <typename T, int kRows, int kExperts>
NF_DEVICE void add_column(const Group<T, kRows, kExperts>& group, int64_t p,
                          Accumulator<T> (&sums)[kRows][kExperts]) {
  NF_UNROLL
  for (int n = 0; n < kExperts; ++n) {
    const auto x = widen(group.params[n][p]);
    NF_UNROLL
    for (int r = 0; r < kRows; ++r)
      sums[r][n] = multiply_add(widen(group.grad[r][p]), x, sums[r][n]);
  }
}

// Packs a thread has in flight per row: about 12 loads of 16 bytes.
template <int kRows, int kExperts>
constexpr int kPacksAtOnce = kRows + kExperts <= 3   ? 4
                             : kRows + kExperts <= 9 ? 2
                                                     : 1;

// Thread t's share of a piece: pack t of every kThreads packs of its block of columns, in order.
template <typename T, int kRows, int kExperts>
NF_DEVICE void add_piece(const Group<T, kRows, kExperts>& group, const Piece& piece, bool wide,
                         int thread, Accumulator<T> (&sums)[kRows][kExperts]) {
  constexpr int kLanes = kWideLanes<T>, kPacks = kPacksAtOnce<kRows, kExperts>;
  constexpr int64_t kStride = kThreads * kLanes;
  const bool whole = piece.begin == piece.block && piece.end == piece.block + kPieceColumns;
  const int64_t first = piece.block + thread * kLanes;
  if (wide && whole) {
    NF_NO_UNROLL
    for (int64_t offset = 0; offset < kPieceColumns; offset += kPacks * kStride)
      add_packs<T, kPacks>(group, first + offset, sums);
    return;
  }
  NF_NO_UNROLL
  for (int64_t p = first; p < piece.end; p += kStride) {
    if (wide && p >= piece.begin && p + kLanes <= piece.end) {
      add_packs<T, 1>(group, p, sums);
    } else {
      NF_NO_UNROLL
      for (int64_t q = most(p, piece.begin); q < least(p + kLanes, piece.end); ++q)
        add_column<T>(group, q, sums);
    }
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

constexpr int kWarps = kThreads / 32;

// Two blocks per multiprocessor at the least for one gradient; for eight, 128 registers would
// spill.
template <typename T, int kRows, int kExperts>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 2 : 1)
    blend_weight_grad_partial_kernel(const __grid_constant__ BlendWeightGradCall call,
                                     unsigned groups, bool wide) {
  using A = Accumulator<T>;
  __shared__ A warps[kWarps][kRows * kExperts];
  const int64_t slot = blockIdx.x / groups;
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot, kPieceColumns);
  if (piece.begin >= piece.end) return;  // the whole block of threads agrees
  const auto group = make_group<T, kRows, kExperts>(call, blockIdx.x % groups);
  const int thread = threadIdx.x;
  A sums[kRows][kExperts] = {};
  add_piece<T>(group, piece, wide, thread, sums);
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

template <typename T, int kRows, int kExperts>
void launch_partial(const BlendWeightGradCall& call, bool wide, cudaStream_t stream) {
  if constexpr (kExperts > 1) {
    if (call.experts < kExperts) return launch_partial<T, kRows, kExperts - 1>(call, wide, stream);
  }
  const auto groups = static_cast<unsigned>(count_groups(call, kRows, kExperts));
  const auto blocks = static_cast<unsigned>(call.slots) * groups;
  blend_weight_grad_partial_kernel<T, kRows, kExperts>
      <<<blocks, kThreads, 0, stream>>>(call, groups, wide);
}

template <typename T>
void launch(const BlendWeightGradCall& call, cudaStream_t stream) {
  const bool wide = aligned(reinterpret_cast<intptr_t>(call.params)) &&
                    aligned(reinterpret_cast<intptr_t>(call.grad)) &&
                    (call.experts == 1 || aligned(call.row_stride * sizeof(T))) &&
                    (call.outputs == 1 || aligned(call.grad_stride * sizeof(T)));
  if (call.outputs == 1) launch_partial<T, 1, kGroupExperts>(call, wide, stream);
  else launch_partial<T, kGroupGrads, kGroupExperts>(call, wide, stream);
  const auto results = static_cast<unsigned>(call.outputs * call.experts * call.segments);
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
