/* The memory's limit in plain C, compiled on the machine that is measured: n streams are read
 * side by side, 64 bytes at a time; their exclusive or is written (with or without non-temporal
 * stores) or, in stream_read, only kept. Integers: bit patterns of any dtype cost the same. */
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* The widest vectors of the machine: wider ones would live on the stack. */
#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define PARTS (64 / WIDTH)

typedef int64_t vec __attribute__((vector_size(WIDTH)));
typedef struct {
  vec part[PARTS];
} line;

static inline void put(line *to, line value) {
  for (int i = 0; i < PARTS; ++i) {
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)&to->part[i], (__m512i)value.part[i]);
#elif defined(__AVX__)
    _mm256_stream_si256((__m256i *)&to->part[i], (__m256i)value.part[i]);
#elif defined(__x86_64__)
    _mm_stream_si128((__m128i *)&to->part[i], (__m128i)value.part[i]);
#else
    to->part[i] = value.part[i];
#endif
  }
}

static inline line mixed(const line *const *in, int n, ptrdiff_t j) {
  line acc = in[0][j];
  for (int i = 1; i < n; ++i)
    for (int k = 0; k < PARTS; ++k) acc.part[k] ^= in[i][j].part[k];
  return acc;
}

void stream_write(const line *const *in, int n, line *out, ptrdiff_t begin, ptrdiff_t end,
                  int non_temporal) {
  if (non_temporal) {
    for (ptrdiff_t j = begin; j < end; ++j) put(out + j, mixed(in, n, j));
  } else {
    for (ptrdiff_t j = begin; j < end; ++j) out[j] = mixed(in, n, j);
  }
}

void stream_read(const line *const *in, int n, line *sink, ptrdiff_t begin, ptrdiff_t end) {
  line acc = {0};
  for (ptrdiff_t j = begin; j < end; ++j) {
    const line next = mixed(in, n, j);
    for (int k = 0; k < PARTS; ++k) acc.part[k] ^= next.part[k];
  }
  *sink = acc; /* the loop is not optimised away */
}
