// theta[k, p] = sum_i weights[k, s(p), i] * params[i, p], and what it did   (blend_telemetry, CUDA)
//
// weights (K, S, N) contiguous in the accumulation type A, fp32 (fp64 for fp64); params (N, P), any
// row stride, column stride 1, fp32 | bf16 | fp16 | fp64; theta (K, P) contiguous in any of these.
// theta has blend's bits. Offsets xi_i = (x_i - o) - m in A, where o is expert `base` and m = 0, or
// o is expert 0 and m the mean of all x_j - o; squares of offsets, of experts and of the sums
// before rounding, are added in fp64. Counts: columns with an xi_i > 0 and an xi_j < 0; entries of
// theta that are not finite, and those of them whose sum was.
// Bytes: N * P values read once, K * P written once. For every 8 outputs, and for every use of a
// value of more than 8 experts (fp64: of any), a thread reads its columns again, from cache.
//
// Two launches, no atomics, and an order that depends on nothing but the shapes and bounds, as in
// blend_weight_grad.cu: a block of threads per piece of columns, each thread adding its own columns
// in shared memory; then a block of threads per total adds the partial sums of its segment.
#include "cuda/blend_telemetry_thread.h"
#include "cuda/dispatch.h"
#include "cuda/reduce.h"

namespace neulig_fast {
namespace {

constexpr int kMostOutputs = 8;   // that a thread has sums for
constexpr int kManyThreads = 64;  // of a block with more experts, for their sums to find room

// Calls launch(kExperts): how many experts a thread keeps in registers, the fewest that do. fp64,
// for which speed matters less, keeps none.
template <typename T, typename Launch>
void with_held(const BlendTelemetryCall& call, const Launch& launch) {
  if constexpr (sizeof(T) < 8) {
    if (call.experts <= 4) return launch(std::integral_constant<int, 4>());
    if (call.experts <= 8) return launch(std::integral_constant<int, 8>());
  }
  launch(std::integral_constant<int, 0>());
}

}  // namespace

int64_t blend_telemetry_slots(int64_t columns, int64_t segments) {
  return count_slots(columns, segments, kTelemetryColumns);
}

#ifdef __CUDACC__
namespace {

// The sum of a row of shared memory, one value per thread, in every lane of the warp that asks.
template <typename V>
__device__ __forceinline__ V add_threads(const V* row) {
  V sum = 0;
  for (int thread = threadIdx.x % 32; thread < blockDim.x; thread += 32) sum += row[thread];
  return add_warp(sum);
}

// Writes the partial sums of a slot, outputs first .. first + outputs - 1: a warp per row.
__device__ __forceinline__ void write_partials(const BlendTelemetryCall& call,
                                               const double* squares, const uint32_t* counts,
                                               int64_t slot, int64_t first, int outputs) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int experts = static_cast<int>(call.experts);
  for (int row = warp; row < experts + outputs; row += warps) {
    const double sum = add_threads(squares + row * blockDim.x);
    if (lane == 0 && (row >= experts || first == 0))
      call.square_partials[(row < experts ? row : first + row) * call.slots + slot] = sum;
  }
  for (int row = warp; row < 1 + outputs; row += warps) {
    const uint32_t sum = add_threads(counts + row * blockDim.x);
    if (lane > 0 || (row == 0 && first > 0)) continue;
    int32_t* to = call.count_partials + (row == 0 ? 0 : first + row) * call.slots + slot;
    *to = sum & 0xFFFFu;
    if (row > 0) to[call.outputs * call.slots] = sum >> 16;
  }
}

// Shared memory: (N + outputs, threads) squares, (1 + outputs, threads) counts.
template <typename T, int kExperts>
__global__ void __launch_bounds__(kExperts > 0 ? kThreads : kManyThreads, 2)
    blend_telemetry_partial_kernel(const __grid_constant__ BlendTelemetryCall call, bool wide) {
  extern __shared__ __align__(16) double memory[];
  const int64_t slot = blockIdx.x;
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot, kTelemetryColumns);
  if (piece.begin >= piece.end) return;  // the whole block of threads agrees
  const int64_t segment = slot - piece.block / kTelemetryColumns;
  const int threads = blockDim.x;
  int64_t first = 0;
  do {
    const int outputs = static_cast<int>(least(kMostOutputs, call.outputs - first));
    const int rows = static_cast<int>(call.experts) + outputs;
    auto* counts = reinterpret_cast<uint32_t*>(memory + rows * threads);
    for (int row = 0; row < rows; ++row) memory[row * threads + threadIdx.x] = 0;
    for (int row = 0; row < 1 + outputs; ++row) counts[row * threads + threadIdx.x] = 0;
    const Tally tally = {memory + threadIdx.x, counts + threadIdx.x, threads};
    tally_piece<T, kExperts>(call, piece, segment, wide, threadIdx.x, threads, first, outputs,
                             tally);
    __syncthreads();
    write_partials(call, memory, counts, slot, first, outputs);
    __syncthreads();
    first += kMostOutputs;
  } while (first < call.outputs);
}

// The sum over a block of threads, in thread 0.
template <typename V>
__device__ __forceinline__ V add_block(V value) {
  __shared__ V warps[kThreads / 32];
  value = add_warp(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  V total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += warps[warp];
  return total;
}

__global__ void __launch_bounds__(kThreads)
    blend_telemetry_total_kernel(const __grid_constant__ BlendTelemetryCall call) {
  const int64_t squares = call.experts + call.outputs, rows = squares + 1 + 2 * call.outputs;
  const int64_t segment = blockIdx.x / rows, row = blockIdx.x % rows;
  if (row < squares) {
    const double total =
        add_block(add_row<double>(call, call.square_partials, row, segment, threadIdx.x));
    if (threadIdx.x == 0) *place_of_squares(call, row, segment) = total;
  } else {
    const int64_t total =
        add_block(add_row<int64_t>(call, call.count_partials, row - squares, segment, threadIdx.x));
    if (threadIdx.x == 0) *place_of_count(call, row - squares, segment) = total;
  }
}

template <typename T, int kExperts>
void launch_partials(const BlendTelemetryCall& call, bool wide, cudaStream_t stream) {
  const int threads = kExperts > 0 ? kThreads : kManyThreads;
  const int64_t outputs = least(kMostOutputs, call.outputs);
  const int64_t bytes = (call.experts + outputs) * sizeof(double) + (1 + outputs) * sizeof(int);
  blend_telemetry_partial_kernel<T, kExperts>
      <<<grid_of(call.slots), threads, threads * bytes, stream>>>(call, wide);
}

bool aligned(int64_t value, int64_t to) {
  return value % to == 0;
}

template <typename T>
void launch(const BlendTelemetryCall& call, cudaStream_t stream) {
  // 64: a pack of 8 fp64 results, the widest.
  const bool wide = aligned(reinterpret_cast<intptr_t>(call.params), 16) &&
                    aligned(reinterpret_cast<intptr_t>(call.theta), 64) &&
                    (call.experts == 1 || aligned(call.row_stride * sizeof(T), 16)) &&
                    (call.outputs == 1 || aligned(call.columns, kWideLanes<T>));
  with_held<T>(call, [&](auto held) { launch_partials<T, held>(call, wide, stream); });
  const int64_t rows = call.experts + 1 + 3 * call.outputs;
  const auto totals = grid_of(call.segments * rows);
  blend_telemetry_total_kernel<<<totals, kThreads, 0, stream>>>(call);
}

}  // namespace

const char* launch_blend_telemetry(Element element, const BlendTelemetryCall& call, void* stream) {
  return launch_for<float, double, __nv_bfloat16, __half>(
      element, [&](auto zero) { launch<decltype(zero)>(call, static_cast<cudaStream_t>(stream)); });
}
#endif

}  // namespace neulig_fast
