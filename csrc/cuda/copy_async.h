// Copies of packs from global to shared memory that go on while a thread computes. A thread that
// reads only what it copied itself needs no barrier. On the host, and before sm_80: plain copies.
#pragma once

#include "cuda/element.h"

namespace neulig_fast {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define NF_ASYNC_COPIES
#endif

// 4 or 8 bytes.
template <typename T, int kLanes>
NF_DEVICE void copy_async(Pack<T, kLanes>* to, const T* from) {
#ifdef NF_ASYNC_COPIES
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "n"(sizeof(*to))
               : "memory");
#else
  *to = load_pack<kLanes>(from);
#endif
}

// Ends a group of copies, which may be empty.
NF_DEVICE void end_copies() {
#ifdef NF_ASYNC_COPIES
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread but the last `kPending`.
template <int kPending>
NF_DEVICE void wait_for_copies() {
#ifdef NF_ASYNC_COPIES
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

constexpr int kStageThreads = 128;  // of a block whose rows go through stages
constexpr int kStages = 3;          // at once: one in use, two on their way

// Calls copy(n, stage) for n = 0 .. count - 1, each long before use(stage), which needs what it
// copied. Stages are 0 .. kStages - 1.
template <typename Copy, typename Use>
NF_DEVICE void run_ahead(int count, const Copy& copy, const Use& use) {
  int copied = 0, stage = 0;  // the stage that is next to be copied to, and then to be used
  const auto next = [&] {
    if (copied < count) copy(copied, stage);
    end_copies();
    ++copied;
    stage = stage + 1 < kStages ? stage + 1 : 0;
  };
  NF_UNROLL
  for (int n = 0; n < kStages - 1; ++n) next();
  NF_NO_UNROLL
  for (int n = 0; n < count; ++n) {
    wait_for_copies<kStages - 2>();
    next();
    use(stage);
  }
}

}  // namespace neulig_fast
