// theta[k, p] = sum_i weights[k, s(p), i] * params[i, p]        (blend, CPU)
//
// params (N, P) and theta (K, P), any row stride, column stride 1, each fp32 | bf16 | fp16 | fp64 |
// fp8 (e4m3fn, e5m2); weights (K, S, N) contiguous in the accumulation type; segments (S + 1,)
// boundaries. Sums in fp32 (fp64 for fp64 params): w_0 x_0, then + w_i x_i in expert order,
// multiplied then added, and one rounding at the end, so the bits depend on nothing but the input.
// Bytes: N * P read, each expert once from memory, and K * P written once.
//
// Rounded to nearest into params' dtype, sums go from registers to theta. Otherwise they stay in a
// tile in L1, and store_tile.h converts that.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>

#include "common/checks.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/segments.h"
#include "common/stream.h"
#include "cpu/store_tile.h"

namespace neulig_fast {
namespace {

// Experts one kernel reads side by side. Their number is a template argument, so each expert's load
// is an instruction of its own, by which the hardware prefetchers follow it; one load instruction
// for all experts, or expert after expert over a tile in L1, is slower. Beyond
// 16, groups of 16 over one tile beat all at once.
constexpr int kMaxExperts = 16;
constexpr int64_t kItemTiles = 16;  // tiles a thread takes at a time
// Outputs from here on bypass the caches. Below, nothing is gained and whoever reads theta next
// pays.
constexpr int64_t kStreamBytes = 32 << 20;

// The share of up to 16 experts in one output over whole steps of columns of one segment.
template <typename T>
struct Group {
  const T* x;             // first expert, first column
  int64_t stride;         // elements from one expert to the next
  const Acc<T>* weights;  // one per expert
  bool first, last;       // of the groups that make up one output
  Acc<T>* sum;            // read unless first, written unless last
  T* theta;               // written if last
  int64_t columns;        // a multiple of kStep
  bool stream;            // theta bypasses the caches; it is then 16-byte aligned
};

template <int kLanes, typename T, typename V, int kParts>
NF_INLINE void store_all(T* to, const V (&parts)[kParts]) {
#pragma GCC unroll 8
  for (int part = 0; part < kParts; ++part) store<kLanes>(to + part * kLanes, parts[part]);
}

template <int kBytes, int kExperts, typename T>
NF_INLINE void blend_step(const Group<T>& g, const Acc<T>* w, int64_t p) {
  const T* x = g.x + p;
  Acc<T>* sum = g.sum + p;
  T* theta = g.theta + p;
  constexpr int kLanes = kBytes / sizeof(Acc<T>);
  constexpr int kParts = kStep / kLanes;
  Vec<Acc<T>, kLanes> acc[kParts];
#pragma GCC unroll 8
  for (int part = 0; part < kParts; ++part) {
    acc[part] = w[0] * load<kLanes>(x + part * kLanes);
    if (!g.first) acc[part] = load<kLanes>(sum + part * kLanes) + acc[part];
  }
#pragma GCC unroll 16
  for (int i = 1; i < kExperts; ++i) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part)
      acc[part] = acc[part] + w[i] * load<kLanes>(x + i * g.stride + part * kLanes);
  }
  if (!g.last) return store_all<kLanes>(sum, acc);
  if (!g.stream) return store_all<kLanes>(theta, acc);
  alignas(64) T line[kStep];
  store_all<kLanes>(line, acc);
  stream_copy<sizeof line>(theta, line);
}

template <typename T, int kExperts>
struct BlendGroup {
  template <int kBytes>
  static NF_INLINE void run(const Group<T>& args) {
    const Group<T> g = args;  // local copies stay in registers: no store can change them
    Acc<T> w[kExperts];
    std::copy_n(g.weights, kExperts, w);
    for (int64_t p = 0; p < g.columns; p += kStep) blend_step<kBytes, kExperts>(g, w, p);
  }
};

template <typename T>
using Kernels = std::array<KernelFn<Group<T>>, kMaxExperts>;

template <typename T, int... kIndex>
Kernels<T> make_kernels(CpuLevel level, std::integer_sequence<int, kIndex...>) {
  return {kernel_at<BlendGroup<T, kIndex + 1>, Group<T>>(level)...};
}

template <typename T>
struct Blend {
  const T* params;
  int64_t row_stride;
  const Acc<T>* weights;
  Segments segments;
  BlendShape shape;
  char* theta;
  int64_t theta_stride;  // bytes from one output to the next
  const TileStore& store;
  bool direct;  // registers to theta, past the store
  const Kernels<T>& kernels;

  // Fewer columns than a step: the same kernel on padded copies.
  void part_of_step(Group<T> g, int64_t experts, int64_t columns) const {
    alignas(64) T x[kMaxExperts * kStep] = {};
    alignas(64) Acc<T> sum[kStep] = {};
    alignas(64) T theta[kStep];
    for (int64_t i = 0; i < experts; ++i)
      std::memcpy(x + i * kStep, g.x + i * g.stride, columns * sizeof(T));
    if (!g.first) std::memcpy(sum, g.sum, columns * sizeof(Acc<T>));
    kernels[experts - 1]({x, kStep, g.weights, g.first, g.last, sum, theta, kStep, false});
    if (g.last) std::memcpy(g.theta, theta, columns * sizeof(T));
    else std::memcpy(g.sum, sum, columns * sizeof(Acc<T>));
  }

  // Part of a step up to an aligned theta, whole steps, part of a step.
  void group(Group<T> g, int64_t experts, int64_t columns) const {
    const int64_t past = reinterpret_cast<uintptr_t>(g.theta) / sizeof(T) % kStep;
    const int64_t head = g.stream && past > 0 ? std::min(kStep - past, columns) : 0;
    const int64_t steps = (columns - head) / kStep * kStep;
    if (head > 0) part_of_step(g, experts, head);
    advance(g, head);
    g.columns = steps;
    if (steps > 0) kernels[experts - 1](g);
    advance(g, steps);
    if (head + steps < columns) part_of_step(g, experts, columns - head - steps);
  }

  static void advance(Group<T>& g, int64_t columns) {
    g.x += columns;
    g.sum += columns;
    if (g.last) g.theta += columns;
  }

  void piece(int64_t k, int64_t segment, int64_t begin, int64_t end) const {
    alignas(64) Acc<T> sum[kTile];
    const Acc<T>* w = weights + (k * shape.segments + segment) * shape.experts;
    char* out = theta + k * theta_stride + begin * store.itemsize;
    for (int64_t i = 0; i < shape.experts; i += kMaxExperts) {
      const int64_t experts = std::min<int64_t>(kMaxExperts, shape.experts - i);
      const bool last = direct && i + experts == shape.experts;
      group({params + i * row_stride + begin, row_stride, w + i, i == 0, last, sum,
             reinterpret_cast<T*>(out), 0, direct && store.stream},
            experts, end - begin);
    }
    if (!direct) store.write(sum, k, segment, begin - segments.bounds[segment], end - begin, out);
  }

  // Every output of a tile before the next tile: the second output finds the experts in cache.
  void tile(int64_t begin, int64_t end) const {
    for (int64_t k = 0; k < shape.outputs; ++k)
      for_each_piece(segments, begin, end, [&](int64_t segment, int64_t from, int64_t to) {
        piece(k, segment, from, to);
      });
  }

  void all() const {
    const int64_t tiles = (shape.columns + kTile - 1) / kTile;
    const int64_t elements = (shape.experts + shape.outputs) * shape.columns;
    for_each_item((tiles + kItemTiles - 1) / kItemTiles, elements, [&](int64_t item) {
      const int64_t end = std::min((item + 1) * kItemTiles * kTile, shape.columns);
      for (int64_t p = item * kItemTiles * kTile; p < end; p += kTile)
        tile(p, std::min(p + kTile, end));
      if (store.stream) stream_fence();
    });
  }
};

template <typename T>
void run(const Tensor& weights, const Tensor& params, const Segments& segments,
         const BlendShape& shape, const Tensor& theta, const TileStore& store, bool direct) {
  static const Kernels<T> kernels =
      make_kernels<T>(cpu_level(), std::make_integer_sequence<int, kMaxExperts>{});
  Blend<T>{static_cast<const T*>(params.const_data_ptr()),
           params.stride(0),
           static_cast<const Acc<T>*>(weights.const_data_ptr()),
           segments,
           shape,
           static_cast<char*>(theta.mutable_data_ptr()),
           shape.many_outputs ? theta.stride(0) * store.itemsize : 0,
           store,
           direct,
           kernels}
      .all();
}

void blend(Tensor theta, const Tensor& weights, const Tensor& params,
           std::optional<Tensor> segments, std::optional<int64_t> seed) {
  const BlendShape shape = check_blend(theta, weights, params, segments, seed);
  const int64_t whole[2] = {0, shape.columns};
  const Segments view = segments_view("blend", segments, whole, shape);
  if (theta.numel() == 0) return;
  TileStore store;
  visit_stored(theta.scalar_type(), [&](auto element) {
    constexpr int64_t kSize = sizeof element;
    const bool aligned = reinterpret_cast<uintptr_t>(theta.const_data_ptr()) % kSize == 0;
    const bool stream = aligned && theta.numel() * kSize >= kStreamBytes;
    store = make_tile_store<decltype(element)>(cpu_level(), seed, stream);
  });
  const bool direct = !seed.has_value() && theta.scalar_type() == params.scalar_type();
  visit_stored(params.scalar_type(), [&](auto element) {
    run<decltype(element)>(weights, params, view, shape, theta, store, direct);
  });
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("blend", TORCH_BOX(&neulig_fast::blend));
}
