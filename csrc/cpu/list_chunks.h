// What the CPU kernels over lists of tensors share: chunks, and tiles of sums on their way in or
// out of other element types.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/lists.h"
#include "common/stream.h"
#include "cpu/step.h"

namespace neulig_fast {

// Elements [begin, end) of a tensor.
struct ListChunk {
  int64_t tensor, begin, end;
};

inline ListChunk chunk_of(const ListTable& lists, int64_t chunk) {
  const int64_t* last = lists.bounds + lists.tensors;
  const int64_t tensor = std::upper_bound(lists.bounds, last, chunk) - lists.bounds - 1;
  const int64_t begin = (chunk - lists.bounds[tensor]) * lists.chunk;
  return {tensor, begin, std::min(begin + lists.chunk, lists.lengths[tensor])};
}

template <int kLanes, typename To, typename From>
NF_INLINE Vec<To, kLanes> convert(Vec<From, kLanes> v) {
  return __builtin_convertvector(v, Vec<To, kLanes>);
}

// kStep elements between an element type and the type of sums A, in vectors of kBytes of A. fp64
// becomes a 2-byte type by way of fp32, as torch rounds.
template <int kBytes, typename A, typename T>
NF_INLINE void widen_step(const T* from, A* to) {
  constexpr int kLanes = kBytes / sizeof(A);
#pragma GCC unroll 16
  for (int p = 0; p < kStep; p += kLanes)
    store<kLanes>(to + p, convert<kLanes, A, Acc<T>>(load<kLanes>(from + p)));
}

template <int kBytes, typename A, typename T>
NF_INLINE void narrow_step(const A* from, T* to) {
  constexpr int kLanes = kBytes / sizeof(A);
#pragma GCC unroll 16
  for (int p = 0; p < kStep; p += kLanes)
    store<kLanes>(to + p, convert<kLanes, Acc<T>, A>(load<kLanes>(from + p)));
}

// Sums of type A, and elements of type T at any address.
template <typename A, typename T>
struct Tile {
  A* sums;  // room for whole steps
  T* elements;
  int64_t columns;
  bool stream;  // elements bypass the caches
};

// sums = elements, with zeros up to a whole step.
template <typename A, typename T>
struct WidenTile {
  template <int kBytes>
  static NF_INLINE void run(const Tile<A, const T>& tile) {
    const int64_t whole = tile.columns / kStep * kStep;
    for (int64_t p = 0; p < whole; p += kStep) widen_step<kBytes>(tile.elements + p, tile.sums + p);
    if (whole == tile.columns) return;
    T line[kStep] = {};
    std::memcpy(line, tile.elements + whole, (tile.columns - whole) * sizeof(T));
    widen_step<kBytes>(line, tile.sums + whole);
  }
};

// elements = sums, rounded.
template <typename A, typename T>
struct NarrowTile {
  template <int kBytes>
  static NF_INLINE void part(const Tile<A, T>& tile, int64_t begin, int64_t end) {
    alignas(64) A sums[kStep] = {};
    alignas(64) T line[kStep];
    std::memcpy(sums, tile.sums + begin, (end - begin) * sizeof(A));
    narrow_step<kBytes>(sums, line);
    std::memcpy(tile.elements + begin, line, (end - begin) * sizeof(T));
  }

  template <int kBytes>
  static NF_INLINE void run(const Tile<A, T>& tile) {
    constexpr int64_t kLine = kStep * sizeof(T);
    const int64_t past = reinterpret_cast<uintptr_t>(tile.elements) % kLine;
    const bool stream = tile.stream && past % sizeof(T) == 0;
    const int64_t to_line = past > 0 ? (kLine - past) / int64_t(sizeof(T)) : 0;
    const int64_t head = stream ? std::min(to_line, tile.columns) : 0;
    const int64_t whole = head + (tile.columns - head) / kStep * kStep;
    if (head > 0) part<kBytes>(tile, 0, head);
    for (int64_t p = head; p < whole; p += kStep) {
      if (!stream) {
        narrow_step<kBytes>(tile.sums + p, tile.elements + p);
        continue;
      }
      alignas(64) T line[kStep];
      narrow_step<kBytes>(tile.sums + p, line);
      stream_copy<sizeof line>(tile.elements + p, line);
    }
    if (whole < tile.columns) part<kBytes>(tile, whole, tile.columns);
  }
};

}  // namespace neulig_fast
