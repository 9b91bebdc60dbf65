// g[t, i] = <grad_t, x[i, t]>, or their sum over t        (blend_lists_weight_grad, CPU)
//
// A table of the addresses of N lists of T tensors of one dtype, fp32 | bf16 | fp16 | fp64, and of
// T gradients, any of the four (address 0: no gradient, all zeros); g (T, N) or (1, N) in fp64.
// Sums in a fixed order: blocks of 4096 columns counted from a chunk's start; in each, 16 lanes
// (column modulo 16; the last columns, fewer than 16, have lanes of their own) summed in fp32 (fp64
// for fp64 experts), multiplied then added; then lanes, blocks and chunks, each in order, in fp64.
// The bits do not depend on threads or instruction set. Bytes: every expert and every gradient read
// once from memory.
#include <torch/csrc/stable/library.h>

#include <array>
#include <utility>
#include <vector>

#include "common/list_checks.h"
#include "common/parallel.h"
#include "cpu/list_chunks.h"

namespace neulig_fast {
namespace {

constexpr int kMaxExperts = 8;  // one kernel reads side by side, as in blend_weight_grad.cpp
constexpr int64_t kBlock = 4096;

// One block of one gradient against up to 8 experts.
template <typename T>
struct Dots {
  const T* x[kMaxExperts];
  const Acc<T>* grad;
  double* sums;     // one per expert, added to
  int64_t columns;  // a multiple of kStep
};

template <typename T, int kExperts>
struct DotBlock {
  template <int kBytes>
  static NF_INLINE void run(const Dots<T>& dots) {
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    constexpr int kParts = kStep / kLanes;
    const T* x[kExperts];
    std::copy_n(dots.x, kExperts, x);
    Vec<Acc<T>, kLanes> acc[kExperts][kParts] = {};
    for (int64_t p = 0; p < dots.columns; p += kStep) {
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = p + part * kLanes;
        const auto grad = load<kLanes>(dots.grad + at);
#pragma GCC unroll 8
        for (int i = 0; i < kExperts; ++i)
          acc[i][part] = acc[i][part] + grad * load<kLanes>(x[i] + at);
      }
    }
    for (int i = 0; i < kExperts; ++i) {
      double sum = 0;
      for (int lane = 0; lane < kStep; ++lane) sum += acc[i][lane / kLanes][lane % kLanes];
      dots.sums[i] += sum;
    }
  }
};

template <typename T>
using Kernels = std::array<KernelFn<Dots<T>>, kMaxExperts>;

template <typename T, int... kIndex>
Kernels<T> make_kernels(CpuLevel level, std::integer_sequence<int, kIndex...>) {
  return {kernel_at<DotBlock<T, kIndex + 1>, Dots<T>>(level)...};
}

template <typename T, typename G>
struct ListDots {
  using A = Acc<T>;

  ListTable lists;
  const Kernels<T>& kernels;
  KernelFn<Tile<A, const G>> widen;

  // Adds the products of `columns` columns: whole steps, then copies padded with zeros.
  void dots(Dots<T> d, int64_t experts, int64_t columns) const {
    d.columns = columns / kStep * kStep;
    if (d.columns > 0) kernels[experts - 1](d);
    const int64_t rest = columns - d.columns;
    if (rest == 0) return;
    alignas(64) T x[kMaxExperts][kStep] = {};
    alignas(64) A grad[kStep] = {};
    for (int64_t i = 0; i < experts; ++i) {
      std::memcpy(x[i], d.x[i] + d.columns, rest * sizeof(T));
      d.x[i] = x[i];
    }
    std::memcpy(grad, d.grad + d.columns, rest * sizeof(A));
    d.grad = grad;
    d.columns = kStep;
    kernels[experts - 1](d);
  }

  void block(int64_t tensor, int64_t begin, int64_t end, double* sums) const {
    alignas(64) A widened[kBlock];
    const G* from = reinterpret_cast<const G*>(lists.others[tensor]) + begin;
    const A* grad = widened;
    if constexpr (std::is_same_v<A, G>) grad = from;
    else widen({widened, from, end - begin, false});
    const int64_t* addresses = lists.addresses + tensor * lists.experts;
    for (int64_t i = 0; i < lists.experts; i += kMaxExperts) {
      const int64_t experts = std::min<int64_t>(kMaxExperts, lists.experts - i);
      Dots<T> d = {{}, grad, sums + i, 0};
      for (int64_t j = 0; j < experts; ++j)
        d.x[j] = reinterpret_cast<const T*>(addresses[i + j]) + begin;
      dots(d, experts, end - begin);
    }
  }

  // Sums of all chunks, (chunks, N).
  std::vector<double> all() const {
    std::vector<double> sums(lists.chunks * lists.experts, 0.0);
    int64_t elements = 0;
    for (int64_t t = 0; t < lists.tensors; ++t) elements += lists.lengths[t];
    for_each_item(lists.chunks, (lists.experts + 1) * elements, [&](int64_t item) {
      const ListChunk chunk = chunk_of(lists, item);
      if (lists.others[chunk.tensor] == 0) return;
      for (int64_t p = chunk.begin; p < chunk.end; p += kBlock)
        block(chunk.tensor, p, std::min(p + kBlock, chunk.end), &sums[item * lists.experts]);
    });
    return sums;
  }
};

template <typename T, typename G>
std::vector<double> chunk_sums(const ListTable& lists) {
  static const Kernels<T> kernels =
      make_kernels<T>(cpu_level(), std::make_integer_sequence<int, kMaxExperts>{});
  using A = Acc<T>;
  static const auto widen = kernel_at<WidenTile<A, G>, Tile<A, const G>>(cpu_level());
  return ListDots<T, G>{lists, kernels, widen}.all();
}

Tensor blend_lists_weight_grad(const Tensor& table, const Tensor& grads, int64_t experts,
                               int64_t chunk, int64_t chunks, bool per_tensor, ScalarType dtype,
                               ScalarType grad_dtype) {
  const char* op = "blend_lists_weight_grad";
  check_list_dtype(op, "experts", dtype);
  check_list_dtype(op, "grads", grad_dtype);
  const ListTable lists = check_lists(op, table, grads, experts, chunk, chunks);
  check_list_values(op, lists, -1);
  std::vector<double> sums;
  visit_dtype(dtype, [&](auto element) {
    visit_dtype(grad_dtype,
                [&](auto grad) { sums = chunk_sums<decltype(element), decltype(grad)>(lists); });
  });
  Tensor result = torch::stable::new_zeros(table, {per_tensor ? lists.tensors : 1, experts},
                                           ScalarType::Double);
  auto* total = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t t = 0; t < lists.tensors; ++t)
    for (int64_t c = lists.bounds[t]; c < lists.bounds[t + 1]; ++c)
      for (int64_t i = 0; i < experts; ++i)
        total[(per_tensor ? t * experts : 0) + i] += sums[c * experts + i];
  return result;
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("blend_lists_weight_grad", TORCH_BOX(&neulig_fast::blend_lists_weight_grad));
}
