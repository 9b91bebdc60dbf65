// Which of the kernels of merge_task_vectors runs a call. No torch headers.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/cpu_level.h"
#include "cpu/merge_task_vectors_kernels.h"

namespace neulig_fast {

// Up to how many experts have kernels of their own: task arithmetic, which waits for memory, TIES
// and DARE, whose terms then stay in registers.
constexpr int own_kernels(Elect elect, Keep keep) {
  if (elect == Elect::kNone && keep == Keep::kAll) return 8;
  if (elect == Elect::kNone) return keep == Keep::kDrawn ? 5 : 0;
  return elect == Elect::kWeightedSum && (keep == Keep::kLower || keep == Keep::kDrawn) ? 5 : 0;
}

template <typename T, Elect kElect, Keep kKeep, int... kIndex>
KernelFn<MergeCall<T>> choose_by_experts(int64_t usual, std::integer_sequence<int, kIndex...>) {
  const CpuLevel level = cpu_level();
  constexpr Keep kAnyKeep = kKeep == Keep::kDrawn ? Keep::kRule : kKeep;
  KernelFn<MergeCall<T>> kernel =
      kernel_at<MergeTaskVectors<T, kElect, kAnyKeep, 0>, MergeCall<T>>(level);
  [[maybe_unused]] const auto consider = [&](int64_t own, KernelFn<MergeCall<T>> candidate) {
    if (own == usual) kernel = candidate;
  };
  (consider(kIndex + 1,
            kernel_at<MergeTaskVectors<T, kElect, kKeep, kIndex + 1>, MergeCall<T>>(level)),
   ...);
  return kernel;
}

template <typename T, Elect kElect>
KernelFn<MergeCall<T>> choose_by_keep(int64_t rule, int64_t usual) {
  const auto of = [&](auto keep) {
    constexpr Keep kKeep = decltype(keep)::value;
    return choose_by_experts<T, kElect, kKeep>(
        usual, std::make_integer_sequence<int, own_kernels(kElect, kKeep)>());
  };
  if (rule == 0) return of(std::integral_constant<Keep, Keep::kAll>());
  if (rule == kLowerBound) return of(std::integral_constant<Keep, Keep::kLower>());
  if ((rule & ~kScales) == kDraws) return of(std::integral_constant<Keep, Keep::kDrawn>());
  return of(std::integral_constant<Keep, Keep::kRule>());
}

// usual: the number of experts in the usual case, else 0.
template <typename T>
KernelFn<MergeCall<T>> choose_kernel(Elect elect, int64_t rule, int64_t usual) {
  switch (elect) {
    case Elect::kNone: return choose_by_keep<T, Elect::kNone>(rule, usual);
    case Elect::kWeightedSum: return choose_by_keep<T, Elect::kWeightedSum>(rule, usual);
    case Elect::kSum: return choose_by_keep<T, Elect::kSum>(rule, usual);
    case Elect::kWeightedCount: return choose_by_keep<T, Elect::kWeightedCount>(rule, usual);
    default: return choose_by_keep<T, Elect::kCount>(rule, usual);
  }
}

}  // namespace neulig_fast
