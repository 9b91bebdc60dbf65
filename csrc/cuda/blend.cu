// theta[k, p] = sum_i weights[k, s(p), i] * params[i, p]        (blend, CUDA)
//
// weights (K, S, N) contiguous, fp32 (fp64 for fp64); params (N, P), any row stride, column stride
// 1, fp32 | bf16 | fp16 | fp64; bounds (S + 1,) int64; theta (K, P) contiguous in params' type.
// Accumulates in weights' type: w_0 x_0, then + w_i x_i in expert order, multiplied then added, one
// rounding at the end: the bits depend on nothing but the input.
// Bytes: (N + K) * P * itemsize; each expert is read once and each output written once, whatever K.
//
// A thread owns one pack of columns in every row: 16 bytes where pointers and rows are aligned,
// else one column. Up to 8 experts stay in registers; beyond, they are loaded by eights, and kept
// in shared memory, each thread its own columns, if there is more than one output.
#include "cuda/blend.h"
#include "cuda/pieces.h"

namespace neulig_fast {
namespace {

constexpr int kGroup = 8;               // experts whose loads are in flight together
constexpr int kStageBytes = 48 * 1024;  // shared memory that every device grants without asking

// One column of all outputs.
template <typename T>
NF_DEVICE void blend_column(const BlendCall& call, int64_t p) {
  using A = Accumulator<T>;
  const int64_t segment = find_segment(call.bounds, call.segments, p);
  const T* x = static_cast<const T*>(call.params) + p;
  NF_NO_UNROLL
  for (int64_t k = 0; k < call.outputs; ++k) {
    const A* w = static_cast<const A*>(call.weights) + (k * call.segments + segment) * call.experts;
    A sum = multiply(w[0], widen(x[0]));
    NF_NO_UNROLL
    for (int64_t i = 1; i < call.experts; ++i)
      sum = add(sum, multiply(w[i], widen(x[i * call.row_stride])));
    narrow(sum, static_cast<T*>(call.theta)[k * call.columns + p]);
  }
}

template <int kLanes, typename T>
NF_DEVICE void blend_columns(const BlendCall& call, int64_t p) {
  NF_NO_UNROLL
  for (int64_t q = p; q < least(p + kLanes, call.columns); ++q) blend_column<T>(call, q);
}

// Whether columns p .. p + lanes - 1 exist and belong to `segment`, the one of column p.
NF_DEVICE bool in_segment(const BlendCall& call, int64_t segment, int64_t p, int lanes) {
  if (p + lanes > call.columns) return false;
  return segment == call.segments - 1 || p + lanes <= call.bounds[segment + 1];
}

// sum = w * x for the first expert, sum + w * x for the others.
template <typename T, int kLanes>
NF_DEVICE void accumulate(Accumulator<T> (&sum)[kLanes], Accumulator<T> w, const Pack<T, kLanes>& x,
                          bool first) {
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) {
    const Accumulator<T> term = multiply(w, widen(x.lane[lane]));
    sum[lane] = first ? term : add(sum[lane], term);
  }
}

template <typename T, int kLanes>
NF_DEVICE void store_sums(const BlendCall& call, int64_t k, int64_t p,
                          const Accumulator<T> (&sum)[kLanes]) {
  Pack<T, kLanes> theta;
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) narrow(sum[lane], theta.lane[lane]);
  store_pack<kLanes>(static_cast<T*>(call.theta) + k * call.columns + p, theta);
}

// The pack of columns from p on, all experts in registers.
template <typename T, int kExperts>
NF_DEVICE void blend_few(const BlendCall& call, int64_t p) {
  constexpr int kLanes = kWideLanes<T>;
  using A = Accumulator<T>;
  if (p + kLanes > call.columns) return blend_columns<kLanes, T>(call, p);
  Pack<T, kLanes> x[kExperts];  // loaded before the search for the segment, which hides behind them
  NF_UNROLL
  for (int i = 0; i < kExperts; ++i)
    x[i] = load_pack<kLanes>(static_cast<const T*>(call.params) + i * call.row_stride + p);
  const int64_t segment = find_segment(call.bounds, call.segments, p);
  if (!in_segment(call, segment, p, kLanes)) return blend_columns<kLanes, T>(call, p);
  for (int64_t k = 0; k < call.outputs; ++k) {
    const A* w = static_cast<const A*>(call.weights) + (k * call.segments + segment) * kExperts;
    A sum[kLanes];
    NF_UNROLL
    for (int i = 0; i < kExperts; ++i) accumulate(sum, w[i], x[i], i == 0);
    store_sums<T>(call, k, p, sum);
  }
}

// The pack of columns from p on, any number of experts. stage: room for this thread's pack of every
// expert, `stride` packs apart; not used for one output.
template <typename T, int kLanes>
NF_DEVICE void blend_many(const BlendCall& call, int64_t p, Pack<T, kLanes>* stage, int stride) {
  using A = Accumulator<T>;
  const int64_t segment = find_segment(call.bounds, call.segments, p);
  if (!in_segment(call, segment, p, kLanes)) return blend_columns<kLanes, T>(call, p);
  const T* params = static_cast<const T*>(call.params) + p;
  const A* w = static_cast<const A*>(call.weights) + segment * call.experts;
  const int experts = static_cast<int>(call.experts);
  A sum[kLanes] = {};
  for (int first = 0; first < experts; first += kGroup) {
    Pack<T, kLanes> x[kGroup];
    NF_UNROLL
    for (int j = 0; j < kGroup; ++j)
      if (first + j < experts) x[j] = load_pack<kLanes>(params + (first + j) * call.row_stride);
    NF_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (first + j >= experts) continue;
      accumulate(sum, w[first + j], x[j], first + j == 0);
      if (call.outputs > 1) stage[(first + j) * stride] = x[j];
    }
  }
  store_sums<T>(call, 0, p, sum);
  for (int64_t k = 1; k < call.outputs; ++k) {
    w += call.segments * call.experts;
    for (int i = 0; i < experts; ++i) accumulate(sum, w[i], stage[i * stride], i == 0);
    store_sums<T>(call, k, p, sum);
  }
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <int kLanes>
__device__ __forceinline__ int64_t first_column() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kLanes;
}

// At least 2 blocks per multiprocessor, which is easy: unless told, ptxas spills to reach an
// occupancy of its own choice (8 bytes at 32 registers for 2 fp32 experts, sm_80).
template <typename T, int kExperts>
__global__ void __launch_bounds__(kThreads, 2)
    blend_few_kernel(const __grid_constant__ BlendCall call) {
  const int64_t p = first_column<kWideLanes<T>>();
  if (p < call.columns) blend_few<T, kExperts>(call, p);
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 2)
    blend_many_kernel(const __grid_constant__ BlendCall call) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int64_t p = first_column<kLanes>();
  auto* stage = reinterpret_cast<Pack<T, kLanes>*>(memory) + threadIdx.x;
  if (p < call.columns) blend_many<T, kLanes>(call, p, stage, blockDim.x);
}

unsigned blocks_for(const BlendCall& call, int64_t columns_per_block) {
  return static_cast<unsigned>((call.columns + columns_per_block - 1) / columns_per_block);
}

template <typename T, int kExperts>
void launch_few(const BlendCall& call, cudaStream_t stream) {
  if constexpr (kExperts > 1) {
    if (call.experts < kExperts) return launch_few<T, kExperts - 1>(call, stream);
  }
  const unsigned blocks = blocks_for(call, kThreads * kWideLanes<T>);
  blend_few_kernel<T, kExperts><<<blocks, kThreads, 0, stream>>>(call);
}

template <typename T, int kLanes>
void launch_many(const BlendCall& call, cudaStream_t stream) {
  const int64_t bytes = call.outputs > 1 ? call.experts * sizeof(Pack<T, kLanes>) : 0;
  int threads = kThreads;
  while (threads * bytes > kStageBytes) threads /= 2;  // 32 threads at 64 experts of 16 bytes
  const unsigned blocks = blocks_for(call, threads * kLanes);
  blend_many_kernel<T, kLanes><<<blocks, threads, threads * bytes, stream>>>(call);
}

bool aligned(int64_t value) {
  return value % 16 == 0;
}

template <typename T>
void launch(const BlendCall& call, cudaStream_t stream) {
  const bool wide = aligned(reinterpret_cast<intptr_t>(call.params)) &&
                    aligned(reinterpret_cast<intptr_t>(call.theta)) &&
                    (call.experts == 1 || aligned(call.row_stride * sizeof(T))) &&
                    (call.outputs == 1 || aligned(call.columns * sizeof(T)));
  if (!wide) return launch_many<T, 1>(call, stream);
  if (call.experts <= kGroup) return launch_few<T, kGroup>(call, stream);
  launch_many<T, kWideLanes<T>>(call, stream);
}

}  // namespace

const char* launch_blend(Element element, const BlendCall& call, void* stream) {
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
