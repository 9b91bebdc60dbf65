// theta_t = sum_i weights[t, i] * x[i, t]        (blend_lists, CPU)
//
// A table of the addresses of N lists of T tensors of one dtype, fp32 | bf16 | fp16 | fp64, and of
// T outputs, any of the four; weights (N,) or (R, N) contiguous in the accumulation type.
// Sums in fp32 (fp64 for fp64): w_0 x_0, then + w_i x_i in expert order, multiplied then added, and
// one rounding at the end: the bits are those of blend.
// Bytes: each expert read once from memory, each output written once.
#include <torch/csrc/stable/library.h>

#include <array>
#include <utility>

#include "common/list_checks.h"
#include "common/parallel.h"
#include "cpu/list_chunks.h"

namespace neulig_fast {
namespace {

constexpr int kMaxExperts = 16;             // read side by side, as in blend.cpp
constexpr int64_t kTile = 2048;             // columns whose sums stay in the first-level cache
constexpr int64_t kStreamBytes = 32 << 20;  // of all outputs: from here on they bypass the caches

// The share of up to 16 experts in the sums of a tile.
template <typename T>
struct Group {
  const T* x[kMaxExperts];
  const Acc<T>* weights;
  Acc<T>* sums;
  int64_t columns;  // a multiple of kStep
  bool first;       // else it is added to the sums
};

template <typename T, int kExperts>
struct SumGroup {
  template <int kBytes>
  static NF_INLINE void run(const Group<T>& group) {
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    const T* x[kExperts];  // local copies stay in registers: no store can change them
    Acc<T> w[kExperts];
    std::copy_n(group.x, kExperts, x);
    std::copy_n(group.weights, kExperts, w);
    Acc<T>* sums = group.sums;
    const bool first = group.first;
    for (int64_t p = 0; p < group.columns; p += kStep) {
#pragma GCC unroll 16
      for (int part = 0; part < kStep; part += kLanes) {
        auto sum = w[0] * load<kLanes>(x[0] + p + part);
        if (!first) sum = load<kLanes>(sums + p + part) + sum;
#pragma GCC unroll 16
        for (int i = 1; i < kExperts; ++i) sum = sum + w[i] * load<kLanes>(x[i] + p + part);
        store<kLanes>(sums + p + part, sum);
      }
    }
  }
};

template <typename T>
using Kernels = std::array<KernelFn<Group<T>>, kMaxExperts>;

template <typename T, int... kIndex>
Kernels<T> make_kernels(CpuLevel level, std::integer_sequence<int, kIndex...>) {
  return {kernel_at<SumGroup<T, kIndex + 1>, Group<T>>(level)...};
}

template <typename T, typename Out>
struct BlendLists {
  using A = Acc<T>;

  ListTable lists;
  const A* weights;
  int64_t weight_stride;
  int64_t base;
  bool stream;
  const Kernels<T>& kernels;
  KernelFn<Tile<A, Out>> narrow;

  // Sums of `columns` columns from the groups' addresses on; whole steps, then a padded copy.
  void sum(Group<T> group, int64_t experts, int64_t columns) const {
    const auto kernel = kernels[experts - 1];
    group.columns = columns / kStep * kStep;
    if (group.columns > 0) kernel(group);
    const int64_t rest = columns - group.columns;
    if (rest == 0) return;
    alignas(64) T x[kMaxExperts][kStep] = {};
    for (int64_t i = 0; i < experts; ++i) {
      std::memcpy(x[i], group.x[i] + group.columns, rest * sizeof(T));
      group.x[i] = x[i];
    }
    group.sums += group.columns;
    group.columns = kStep;
    kernel(group);
  }

  void tile(int64_t tensor, int64_t begin, int64_t end) const {
    alignas(64) A sums[kTile];
    const int64_t* addresses = lists.addresses + tensor * lists.experts;
    const A* w = weights + lists.rows[tensor] * weight_stride;
    for (int64_t i = 0; i < lists.experts; i += kMaxExperts) {
      const int64_t experts = std::min<int64_t>(kMaxExperts, lists.experts - i);
      Group<T> group = {{}, w + i, sums, 0, i == 0};
      for (int64_t j = 0; j < experts; ++j)
        group.x[j] = reinterpret_cast<const T*>(addresses[i + j]) + begin;
      sum(group, experts, end - begin);
    }
    Out* theta = reinterpret_cast<Out*>(base + lists.others[tensor]) + begin;
    narrow({sums, theta, end - begin, stream});
  }

  void all(int64_t elements) const {
    for_each_item(lists.chunks, (lists.experts + 1) * elements, [&](int64_t item) {
      const ListChunk chunk = chunk_of(lists, item);
      for (int64_t p = chunk.begin; p < chunk.end; p += kTile)
        tile(chunk.tensor, p, std::min(p + kTile, chunk.end));
      if (stream) stream_fence();
    });
  }
};

template <typename T, typename Out>
void run(const Tensor& weights, const ListTable& lists, int64_t base) {
  static const Kernels<T> kernels =
      make_kernels<T>(cpu_level(), std::make_integer_sequence<int, kMaxExperts>{});
  static const auto narrow = kernel_at<NarrowTile<Acc<T>, Out>, Tile<Acc<T>, Out>>(cpu_level());
  int64_t elements = 0;
  for (int64_t t = 0; t < lists.tensors; ++t) elements += lists.lengths[t];
  const bool stream = elements * static_cast<int64_t>(sizeof(Out)) >= kStreamBytes;
  BlendLists<T, Out>{lists,
                     static_cast<const Acc<T>*>(weights.const_data_ptr()),
                     weights.dim() == 2 ? lists.experts : 0,
                     base,
                     stream,
                     kernels,
                     narrow}
      .all(elements);
}

void blend_lists(const Tensor& weights, const Tensor& table, const Tensor& outputs, int64_t base,
                 int64_t chunk, int64_t chunks, ScalarType dtype, ScalarType out_dtype) {
  check_list_dtype("blend_lists", "experts", dtype);
  check_list_dtype("blend_lists", "outputs", out_dtype);
  check_list_weights("blend_lists", weights, dtype);
  const int64_t experts = weights.size(weights.dim() - 1);
  const ListTable lists = check_lists("blend_lists", table, outputs, experts, chunk, chunks);
  check_list_values("blend_lists", lists, weights.dim() == 2 ? weights.size(0) : -1);
  visit_dtype(dtype, [&](auto element) {
    visit_dtype(out_dtype,
                [&](auto out) { run<decltype(element), decltype(out)>(weights, lists, base); });
  });
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("blend_lists", TORCH_BOX(&neulig_fast::blend_lists));
}
