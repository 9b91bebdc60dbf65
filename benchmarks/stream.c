/* The memory's limit in plain C, compiled on the machine that is measured: n streams are read
 * side by side, 64 bytes at a time; their exclusive or is written (with or without non-temporal
 * stores) or, in stream_read, only kept. Integers: bit patterns of any dtype cost the same. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef int64_t lane __attribute__((vector_size(64)));

static inline void put(lane *to, lane value) {
#if defined(__AVX512F__)
  _mm512_stream_si512((void *)to, (__m512i)value);
#elif defined(__x86_64__)
  __m128i part[4];
  memcpy(part, &value, sizeof part);
  for (int i = 0; i < 4; ++i) _mm_stream_si128((__m128i *)to + i, part[i]);
#else
  *to = value;
#endif
}

static inline lane mixed(const lane *const *in, int n, ptrdiff_t j) {
  lane acc = in[0][j];
  for (int i = 1; i < n; ++i) acc ^= in[i][j];
  return acc;
}

void stream_write(const lane *const *in, int n, lane *out, ptrdiff_t begin, ptrdiff_t end,
                  int non_temporal) {
  if (non_temporal) {
    for (ptrdiff_t j = begin; j < end; ++j) put(out + j, mixed(in, n, j));
  } else {
    for (ptrdiff_t j = begin; j < end; ++j) out[j] = mixed(in, n, j);
  }
}

void stream_read(const lane *const *in, int n, lane *sink, ptrdiff_t begin, ptrdiff_t end) {
  lane acc = {0};
  for (ptrdiff_t j = begin; j < end; ++j) acc ^= mixed(in, n, j);
  *sink = acc; /* the loop is not optimised away */
}
