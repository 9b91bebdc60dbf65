// sums[s, i] = sum over p in segment s of xi_i[p], gram[s, i, j] = sum of xi_i[p] * xi_j[p],
// xi_i = theta_i - mean_j theta_j                                              (offset_gram, CUDA)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; bounds (S + 1,) int64;
// sums (S, N), gram (S, N, N) contiguous fp64. A thread forms offsets as common/offsets.h says, and
// sums of them and of their products, in the accumulation type, fp32 (fp64 for fp64), over at most
// `width` columns. Those partial sums are added in fp64.
// Bytes: N * P * itemsize for N <= 16 (fp64: 8). Beyond, a block of threads reads its columns once
// for their means and again for each pair of groups of 8 experts, from cache.
//
// With many experts, sums fill the registers: few warps fit, and none has room for loads to come.
// So from 9 on (7 in 2-byte types) rows go through shared memory, three stages deep (stages.h). Of
// the 48 KB a block has without asking, 16 experts need all; two blocks of 128 threads share a
// multiprocessor, with up to 64 KB on their way.
//
// Three launches, no atomics, and an order that depends on nothing but the shapes and bounds: not
// even on alignment, because a thread owns the same columns whether or not it may load them as one
// pack. First, a block of threads per piece of columns (pieces.h): a partial sum per total. Then a
// block of threads per total and segment. Then one per segment, which writes the results.
#include "common/offsets.h"
#include "cuda/dispatch.h"
#include "cuda/offset_gram.h"
#include "cuda/offset_group.h"
#include "cuda/offset_stages.h"
#include "cuda/reduce.h"

namespace neulig_fast {
namespace {

constexpr int kGroupRows = 8;            // of more experts than fit at once
constexpr int64_t kGroupedWidth = 4096;  // so that what is read again is still in the cache

// How many packs of every row are in flight, for 16-byte packs of N experts: registers decide.
template <typename T>
constexpr int packs_of(int experts) {
  return sizeof(T) == 8 ? 1 : experts <= 3 ? 4 : experts <= 6 ? 2 : 1;
}

// Experts whose loads and sums fit into registers together. More go through stages (not fp64),
// where loads go on during the arithmetic: bf16 has more of that per byte.
template <typename T>
constexpr int kMostFew = sizeof(T) == 2 ? 6 : 8;
constexpr int kMostStaged = 16;

// N experts, 2 to kMostFew; any number, in groups.
template <typename T, int kExperts>
using Few = Offsets<T, kExperts - 1, 0, kWideLanes<T>, packs_of<T>(kExperts), true>;
template <typename T>
using OneGroup = Offsets<T, kGroupRows, 0, 8 / sizeof(T), 1, false>;
template <typename T>
using TwoGroups = Offsets<T, kGroupRows, kGroupRows, 8 / sizeof(T), 1, false>;

// Thread t's share of the sum over a segment of the partial sums of a total.
template <typename A>
NF_DEVICE double add_slots(const OffsetGramCall& call, int64_t segment, int64_t total, int thread) {
  const SlotRange range = find_slots(call.bounds, call.segments, call.slots, segment, call.width);
  const A* partials = static_cast<const A*>(call.partials) + total * call.slots;
  double sum = 0;
  for (int64_t slot = range.begin + thread; slot < range.end; slot += kThreads)
    sum += partials[slot];
  return sum;
}

// Thread t's share of the results of a segment.
NF_DEVICE void complete(const OffsetGramCall& call, int64_t segment, int thread) {
  const int64_t n = call.experts;
  const OffsetTotals found{call.totals + segment * count_totals(call.rows), call.rows, n};
  for (int64_t e = thread; e < n * n; e += kThreads)
    call.gram[segment * n * n + e] = found.product(e / n, e % n);
  for (int64_t i = thread; i < n; i += kThreads) call.sums[segment * n + i] = found.sum(i);
}

// Thread t's share of the means of the differences to expert 0, by column of a piece's block.
template <typename T, typename A>
NF_DEVICE void add_means(const OffsetGramCall& call, const Piece& piece, int thread, A* means) {
  const A share = A{1} / static_cast<A>(call.experts);
  NF_NO_UNROLL
  for (int64_t p = piece.begin + thread; p < piece.end; p += kThreads) {
    const T* x = static_cast<const T*>(call.params) + p;
    const A first = widen(x[0]);
    A total = 0;
    NF_UNROLL_EIGHT
    for (int64_t i = 1; i < call.experts; ++i) total += widen(x[i * call.row_stride]) - first;
    means[p - piece.block] = total * share;
  }
}

}  // namespace

int64_t offset_gram_rows(int64_t experts, Element element) {
  const int64_t at_once = element == Element::kDouble ? kMostFew<double> : kMostStaged;
  return experts <= at_once ? experts - 1 : experts;
}

int64_t offset_gram_width(int64_t columns, int64_t experts, Element element) {
  constexpr int64_t kLeast = 4096, kMost = 8 * kLeast, kEnough = 1024;  // pieces for a big GPU
  if (offset_gram_rows(experts, element) == experts) return kGroupedWidth;
  return least(most(columns / kEnough / kLeast * kLeast, kLeast), kMost);
}

int64_t offset_gram_slots(int64_t columns, int64_t segments, int64_t width) {
  return count_slots(columns, segments, width);
}

#ifdef __CUDACC__
namespace {

constexpr int kWarps = kThreads / 32;

// Writes the partial sums of a block of kBlockWarps warps; `warps` is (kBlockWarps, kSums or more).
template <typename D, int kBlockWarps, typename A>
__device__ void add_threads(const OffsetGramCall& call, const A (&sums)[D::kSums], A* warps,
                            int64_t i, int64_t j) {
  const int thread = threadIdx.x;
  NF_UNROLL
  for (int n = 0; n < D::kSums; ++n) {
    const A sum = add_warp(sums[n]);
    if (thread % 32 == 0) warps[thread / 32 * D::kSums + n] = sum;
  }
  __syncthreads();
  for (int n = thread; n < D::kSums; n += 32 * kBlockWarps) {
    const int64_t total = D::place(n, call.rows, i, j);
    if (total < 0) continue;
    A sum = 0;
    for (int warp = 0; warp < kBlockWarps; ++warp) sum += warps[warp * D::kSums + n];
    static_cast<A*>(call.partials)[total * call.slots + blockIdx.x] = sum;
  }
}

// One piece, by a block of threads; `warps` is (kWarps, at least kSums).
template <typename D, typename A>
__device__ void add_block(const OffsetGramCall& call, bool wide, const Piece& piece, A* warps,
                          int64_t i, int64_t j, const A* means = nullptr) {
  A sums[D::kSums] = {};
  D::make(call, wide, i, j, means, piece.block).add_piece(piece, threadIdx.x, call.width, sums);
  add_threads<D, kWarps>(call, sums, warps, i, j);
  __syncthreads();
}

// All experts at once. kBlocks of them share a multiprocessor.
template <typename T, typename D, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    offset_gram_partial_kernel(const __grid_constant__ OffsetGramCall call, bool wide) {
  __shared__ Accumulator<T> warps[kWarps * D::kSums];
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, blockIdx.x, call.width);
  if (piece.begin >= piece.end) return;  // the whole block of threads agrees
  add_block<D>(call, wide, piece, warps, 0, 0);
}

// All of up to kMostStaged experts.
template <typename T, int kExperts>
__global__ void __launch_bounds__(kStageThreads, 2)
    offset_gram_staged_kernel(const __grid_constant__ OffsetGramCall call, bool wide) {
  using S = OffsetStages<T, kExperts>;
  using D = typename S::D;
  __shared__ typename S::Row stages[kStages * S::kSize];
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, blockIdx.x, call.width);
  if (piece.begin >= piece.end) return;
  Accumulator<T> sums[D::kSums] = {};
  S::add_piece(D::make(call, wide, 0, 0), piece, threadIdx.x, stages + threadIdx.x, sums);
  __syncthreads();  // then nobody needs the stages
  add_threads<D, kStageThreads / 32>(call, sums, reinterpret_cast<Accumulator<T>*>(stages), 0, 0);
}

// Groups of experts, and pairs of groups, one after the other.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    offset_gram_grouped_kernel(const __grid_constant__ OffsetGramCall call, bool wide) {
  __shared__ Accumulator<T> warps[kWarps * TwoGroups<T>::kSums], means[kGroupedWidth];
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, blockIdx.x, call.width);
  if (piece.begin >= piece.end) return;
  add_means<T>(call, piece, threadIdx.x, means);
  __syncthreads();
  for (int64_t i = 0; i < call.rows; i += kGroupRows) {
    add_block<OneGroup<T>>(call, wide, piece, warps, i, i, means);
    for (int64_t j = i + kGroupRows; j < call.rows; j += kGroupRows)
      add_block<TwoGroups<T>>(call, wide, piece, warps, i, j, means);
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    offset_gram_total_kernel(const __grid_constant__ OffsetGramCall call) {
  __shared__ double warps[kWarps];
  const int64_t count = count_totals(call.rows);
  const int64_t segment = blockIdx.x / count, total = blockIdx.x % count;
  const double sum = add_warp(add_slots<A>(call, segment, total, threadIdx.x));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double all = 0;
  for (int warp = 0; warp < kWarps; ++warp) all += warps[warp];
  call.totals[blockIdx.x] = all;
}

__global__ void __launch_bounds__(kThreads)
    offset_gram_complete_kernel(const __grid_constant__ OffsetGramCall call) {
  complete(call, blockIdx.x, threadIdx.x);
}

template <typename T, int kExperts>
void launch_few(const OffsetGramCall& call, bool wide, cudaStream_t stream) {
  if constexpr (kExperts > 2) {
    if (call.experts < kExperts) return launch_few<T, kExperts - 1>(call, wide, stream);
  }
  constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;
  offset_gram_partial_kernel<T, Few<T, kExperts>, kBlocks>
      <<<grid_of(call.slots), kThreads, 0, stream>>>(call, wide);
}

template <typename T, int kExperts>
void launch_staged(const OffsetGramCall& call, bool wide, cudaStream_t stream) {
  if constexpr (kExperts > kMostFew<T> + 1) {
    if (call.experts < kExperts) return launch_staged<T, kExperts - 1>(call, wide, stream);
  }
  offset_gram_staged_kernel<T, kExperts>
      <<<grid_of(call.slots), kStageThreads, 0, stream>>>(call, wide);
}

template <typename T>
void launch_partial(const OffsetGramCall& call, cudaStream_t stream) {
  const bool wide = reinterpret_cast<intptr_t>(call.params) % 16 == 0 &&
                    call.row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  if (call.rows == call.experts)
    offset_gram_grouped_kernel<T><<<grid_of(call.slots), kThreads, 0, stream>>>(call, wide);
  else if (call.experts <= kMostFew<T>) launch_few<T, kMostFew<T>>(call, wide, stream);
  else if constexpr (sizeof(T) < 8) launch_staged<T, kMostStaged>(call, wide, stream);
}

template <typename T>
void launch(const OffsetGramCall& call, cudaStream_t stream) {
  launch_partial<T>(call, stream);
  const auto totals = grid_of(call.segments * count_totals(call.rows));
  offset_gram_total_kernel<Accumulator<T>><<<totals, kThreads, 0, stream>>>(call);
  offset_gram_complete_kernel<<<grid_of(call.segments), kThreads, 0, stream>>>(call);
}

}  // namespace

const char* launch_offset_gram(Element element, const OffsetGramCall& call, void* stream) {
  return launch_for<float, double, __nv_bfloat16, __half>(
      element, [&](auto zero) { launch<decltype(zero)>(call, static_cast<cudaStream_t>(stream)); });
}
#endif

}  // namespace neulig_fast
