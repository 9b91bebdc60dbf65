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

}  // namespace neulig_fast
