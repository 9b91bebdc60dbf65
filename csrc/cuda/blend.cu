// theta[k, p] = sum_i weights[k, s(p), i] * params[i, p]        (blend, CUDA)
//
// weights (K, S, N) contiguous, fp32 (fp64 for fp64 params); params (N, P) and theta (K, P), any
// row stride, column stride 1, each fp32 | bf16 | fp16 | fp64 | fp8 (e4m3fn, e5m2); bounds (S + 1,)
// int64. Accumulates in weights' type: w_0 x_0, then + w_i x_i in expert order, multiplied then
// added, one rounding at the end: the bits depend on nothing but the input.
// Bytes: N * P read, each expert once, and K * P written once, whatever K.
//
// A thread owns packs of columns in every row: 16 bytes of params where pointers and rows are
// aligned, else one column. Up to 8 experts stay in registers, in a kernel per number of them;
// beyond, and in fp64 or with stochastic rounding, they are loaded by eights, and kept in shared
// memory, each thread its own columns, if there is more than one output. Kernels are compiled per
// type of params; theta's is chosen at each store, by all threads alike.
#include "cuda/blend.h"
#include "cuda/dispatch.h"
#include "cuda/pieces.h"
#include "cuda/store.h"

namespace neulig_fast {
namespace {

constexpr int kGroup = 8;               // experts whose loads are in flight together
constexpr int kStageBytes = 48 * 1024;  // shared memory that every device grants without asking

// Two packs for few experts in narrow types, which alone would keep too few bytes in flight.
template <typename T, int kExperts>
constexpr int kPacks = sizeof(T) <= 2 && kExperts <= 4 ? 2 : 1;

// Read-only for the whole launch, so that the compiler may load ahead of stores.
template <typename A>
NF_DEVICE A load_weight(const A* w) {
#ifdef __CUDA_ARCH__
  return __ldg(w);
#else
  return *w;
#endif
}

template <bool kRandom, int kLanes, typename A>
NF_DEVICE void store_sums(const BlendCall& call, int64_t k, int64_t segment, int64_t p,
                          const A (&sum)[kLanes]) {
  if constexpr (kRandom) store_randomly(call, k, segment, p, sum);
  else store_nearest(call, k, p, sum);
}

// One column of all outputs.
template <typename T, bool kRandom>
NF_DEVICE void blend_column(const BlendCall& call, int64_t p) {
  using A = Accumulator<T>;
  const int64_t segment = find_segment(call.bounds, call.segments, p);
  const T* x = static_cast<const T*>(call.params) + p;
  NF_NO_UNROLL
  for (int64_t k = 0; k < call.outputs; ++k) {
    const A* w = static_cast<const A*>(call.weights) + (k * call.segments + segment) * call.experts;
    A sum[1] = {multiply(load_weight(w), widen(x[0]))};
    NF_NO_UNROLL
    for (int64_t i = 1; i < call.experts; ++i)
      sum[0] = add(sum[0], multiply(load_weight(w + i), widen(x[i * call.row_stride])));
    store_sums<kRandom>(call, k, segment, p, sum);
  }
}

template <int kLanes, typename T, bool kRandom>
NF_DEVICE void blend_columns(const BlendCall& call, int64_t p) {
  NF_NO_UNROLL
  for (int64_t q = p; q < least(p + kLanes, call.columns); ++q) blend_column<T, kRandom>(call, q);
}

// Whether columns p .. p + lanes - 1 exist and belong to `segment`, which column p does not
// precede.
NF_DEVICE bool in_segment(const BlendCall& call, int64_t segment, int64_t p, int lanes) {
  if (p + lanes > call.columns) return false;
  return segment == call.segments - 1 || p + lanes <= call.bounds[segment + 1];
}

// sum = w * x for the first expert, sum + w * x for the others.
template <typename T, int kLanes>
NF_DEVICE void accumulate(Accumulator<T> (&sum)[kLanes], Accumulator<T> w, Loaded<T, kLanes>& x,
                          bool first) {
  Accumulator<T> value[kLanes];
  widen_all(x, value);
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) {
    const Accumulator<T> term = multiply(w, value[lane]);
    sum[lane] = first ? term : add(sum[lane], term);
  }
}

// All outputs of the pack of columns at p, in `segment`, from what was loaded.
template <typename T, int kExperts>
NF_DEVICE void blend_pack(const BlendCall& call, int64_t segment, int64_t p,
                          Loaded<T, kWideLanes<T>> (&x)[kExperts]) {
  using A = Accumulator<T>;
  for (int64_t k = 0; k < call.outputs; ++k) {
    const A* w = static_cast<const A*>(call.weights) + (k * call.segments + segment) * kExperts;
    A sum[kWideLanes<T>];
    NF_UNROLL
    for (int i = 0; i < kExperts; ++i) accumulate<T>(sum, load_weight(w + i), x[i], i == 0);
    store_nearest(call, k, p, sum);
  }
}

// find_segment for the columns of a warp, which ascend with its lanes: where all lanes are there,
// they look for lane 0's together, and each goes on from it.
template <int kLanes>
NF_DEVICE int64_t find_segment_in_warp(const BlendCall& call, int64_t p) {
#ifdef __CUDA_ARCH__
  const int lane = threadIdx.x % 32;
  if (call.segments > 1 && p + (31 - lane) * kLanes < call.columns) {
    const int64_t* bounds = call.bounds;
    const int64_t first = p - lane * kLanes;
    const int64_t low =
        find_last_by_warp(call.segments, [=](int64_t s) { return __ldg(bounds + s) <= first; });
    if (low == call.segments - 1 || __ldg(bounds + low + 1) > p) return low;
    return low + find_segment(bounds + low, call.segments - low, p);
  }
#endif
  return find_segment(call.bounds, call.segments, p);
}

// The packs of columns at p, p + apart, ..., all experts in registers.
template <typename T, int kExperts>
NF_DEVICE void blend_few(const BlendCall& call, int64_t p, int64_t apart) {
  constexpr int kLanes = kWideLanes<T>, kCount = kPacks<T, kExperts>;
  Loaded<T, kLanes> x[kCount][kExperts];  // loaded before the search for the segment, which hides
  NF_UNROLL                               // behind the loads
      for (int pack = 0; pack < kCount; ++pack) {
    const int64_t q = p + pack * apart;
    if (q + kLanes > call.columns) continue;
    NF_UNROLL
    for (int i = 0; i < kExperts; ++i)
      x[pack][i] = load_all<kLanes>(static_cast<const T*>(call.params) + i * call.row_stride + q);
  }
  int64_t segment = find_segment_in_warp<kLanes>(call, p);
  NF_UNROLL
  for (int pack = 0; pack < kCount; ++pack) {
    const int64_t q = p + pack * apart;
    if (pack > 0 && !in_segment(call, segment, q, kLanes))
      segment = find_segment(call.bounds, call.segments, q);
    if (in_segment(call, segment, q, kLanes)) blend_pack<T>(call, segment, q, x[pack]);
    else blend_columns<kLanes, T, false>(call, q);
  }
}

// Random words come in fours from the start of a segment; a pack has to begin where they do.
template <int kLanes, bool kRandom>
NF_DEVICE bool words_fit(const BlendCall& call, int64_t segment, int64_t p) {
  constexpr int kUnit = kLanes < 4 ? kLanes : 4;
  return !kRandom || (p - segment_start(call, segment)) % kUnit == 0;
}

// The packs at column p of experts first .. first + kGroup - 1, as far as there are any.
template <typename T, int kLanes>
NF_DEVICE void load_group(const BlendCall& call, int64_t p, int first,
                          Loaded<T, kLanes> (&x)[kGroup]) {
  const T* expert = static_cast<const T*>(call.params) + first * call.row_stride + p;
  const int more = static_cast<int>(call.experts) - first;
  NF_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    if (j < more) x[j] = load_all<kLanes>(expert);
    expert += call.row_stride;
  }
}

// The pack of columns from p on, any number of experts. stage: room for this thread's pack of every
// expert, `stride` packs apart; not used for one output.
template <typename T, int kLanes, bool kRandom>
NF_DEVICE void blend_many(const BlendCall& call, int64_t p, Loaded<T, kLanes>* stage, int stride) {
  using A = Accumulator<T>;
  Loaded<T, kLanes> x[kGroup];  // loaded before the search for the segment, as in blend_few
  if (p + kLanes <= call.columns) load_group<T, kLanes>(call, p, 0, x);
  const int64_t segment = find_segment_in_warp<kLanes>(call, p);
  if (!in_segment(call, segment, p, kLanes) || !words_fit<kLanes, kRandom>(call, segment, p))
    return blend_columns<kLanes, T, kRandom>(call, p);
  const A* w = static_cast<const A*>(call.weights) + segment * call.experts;
  const int experts = static_cast<int>(call.experts);
  A sum[kLanes] = {};
  for (int first = 0;;) {
    A weight[kGroup];  // all loads before the first use: one wait instead of one per expert
    NF_UNROLL
    for (int j = 0; j < kGroup; ++j)
      if (first + j < experts) weight[j] = load_weight(w + first + j);
    NF_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (first + j >= experts) break;
      accumulate<T>(sum, weight[j], x[j], first + j == 0);
      if (call.outputs > 1) stage[(first + j) * stride] = x[j];
    }
    first += kGroup;
    if (first >= experts) break;
    load_group<T, kLanes>(call, p, first, x);
  }
  for (int64_t k = 0;;) {
    store_sums<kRandom>(call, k, segment, p, sum);
    if (++k >= call.outputs) return;
    w += call.segments * call.experts;
    for (int i = 0; i < experts; ++i) {
      Loaded<T, kLanes> pack = stage[i * stride];
      accumulate<T>(sum, load_weight(w + i), pack, i == 0);
    }
  }
}

}  // namespace

#ifdef __CUDACC__
namespace {

template <int kLanes>
__device__ __forceinline__ int64_t first_column(int packs) {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x * kLanes * packs + threadIdx.x * kLanes;
}

// At least 2 blocks per multiprocessor, which is easy: unless told, ptxas spills to reach an
// occupancy of its own choice (8 bytes at 32 registers for 2 fp32 experts, sm_80).
template <typename T, int kExperts>
__global__ void __launch_bounds__(kThreads, 2)
    blend_few_kernel(const __grid_constant__ BlendCall call) {
  const int64_t p = first_column<kWideLanes<T>>(kPacks<T, kExperts>);
  if (p < call.columns) blend_few<T, kExperts>(call, p, kThreads * kWideLanes<T>);
}

template <typename T, int kLanes, bool kRandom>
__global__ void __launch_bounds__(kThreads, 2)
    blend_many_kernel(const __grid_constant__ BlendCall call) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int64_t p = first_column<kLanes>(1);
  auto* stage = reinterpret_cast<Loaded<T, kLanes>*>(memory) + threadIdx.x;
  if (p < call.columns) blend_many<T, kLanes, kRandom>(call, p, stage, blockDim.x);
}

unsigned blocks_for(const BlendCall& call, int64_t columns_per_block) {
  return grid_of((call.columns + columns_per_block - 1) / columns_per_block);
}

template <typename T, int kExperts>
void launch_few(const BlendCall& call, cudaStream_t stream) {
  if constexpr (kExperts > 1) {
    if (call.experts < kExperts) return launch_few<T, kExperts - 1>(call, stream);
  }
  const unsigned blocks = blocks_for(call, kThreads * kWideLanes<T> * kPacks<T, kExperts>);
  blend_few_kernel<T, kExperts><<<blocks, kThreads, 0, stream>>>(call);
}

template <typename T, int kLanes, bool kRandom>
void launch_many(const BlendCall& call, cudaStream_t stream) {
  const int64_t bytes = call.outputs > 1 ? call.experts * sizeof(Pack<T, kLanes>) : 0;
  int threads = kThreads;
  while (threads * bytes > kStageBytes) threads /= 2;  // 32 threads at 64 experts of 16 bytes
  const unsigned blocks = blocks_for(call, threads * kLanes);
  blend_many_kernel<T, kLanes, kRandom><<<blocks, threads, threads * bytes, stream>>>(call);
}

int64_t itemsize(Element element) {
  switch (element) {
    case Element::kDouble: return 8;
    case Element::kFloat: return 4;
    case Element::kBFloat16:
    case Element::kHalf: return 2;
    default: return 1;
  }
}

// Whether packs of params are aligned, and what becomes of one in theta, in parts of 16 bytes.
template <typename T>
bool wide(const BlendCall& call) {
  const int64_t item = itemsize(call.out), part = least(kWideLanes<T> * item, 16);
  return reinterpret_cast<intptr_t>(call.params) % 16 == 0 &&
         (call.experts == 1 || call.row_stride * sizeof(T) % 16 == 0) &&
         reinterpret_cast<intptr_t>(call.theta) % part == 0 &&
         (call.outputs == 1 || call.theta_stride * item % part == 0);
}

template <typename T>
void launch(const BlendCall& call, cudaStream_t stream) {
  constexpr int kLanes = kWideLanes<T>;
  if (call.stochastic && wide<T>(call)) return launch_many<T, kLanes, true>(call, stream);
  if (call.stochastic) return launch_many<T, 1, true>(call, stream);
  if (!wide<T>(call)) return launch_many<T, 1, false>(call, stream);
  if constexpr (sizeof(T) < 8) {  // the speed of fp64 matters less than eight more kernels
    if (call.experts <= kGroup) return launch_few<T, kGroup>(call, stream);
  }
  launch_many<T, kLanes, false>(call, stream);
}

}  // namespace

const char* launch_blend(Element element, const BlendCall& call, void* stream) {
  return launch_for<float, double, __nv_bfloat16, __half, Float8E4M3, Float8E5M2>(
      element, [&](auto zero) { launch<decltype(zero)>(call, static_cast<cudaStream_t>(stream)); });
}
#endif

}  // namespace neulig_fast
