// Stores that bypass the caches, for results that do not fit them. No torch headers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu_level.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace neulig_fast {

// Copies kCount bytes, a multiple of 16, to a 16-byte aligned address.
template <int kCount>
NF_INLINE void stream_copy(void* to, const void* from) {
#ifdef __SSE2__
#pragma GCC unroll 8
  for (int i = 0; i < kCount / 16; ++i) {
    const auto* source = static_cast<const __m128i*>(from) + i;
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(source));
  }
#else
  std::memcpy(to, from, kCount);
#endif
}

// Makes this thread's streamed stores visible to the others.
inline void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace neulig_fast
