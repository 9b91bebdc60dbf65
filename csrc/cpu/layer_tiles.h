// The two halves of a linear layer of a mixed model: mix a tile of weights, multiply rows by it.
//
// A tile holds kTileOutputs outputs and up to kTileDepth inputs of W = sum_i w_i W_i in the
// accumulation type, in panels [input][output] as wide as two vector registers: a product then
// needs two loads and one broadcast per row for every two multiply-adds per row. One expert with
// coefficient 1 makes a tile of its own weights. No torch headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/cpu_level.h"
#include "common/dtype.h"

namespace neulig_fast {

constexpr int64_t kTileOutputs = 32;  // whole panels at every level, in fp32 and in fp64
constexpr int64_t kTileDepth = 256;   // an AVX2 panel of them fills half of a first-level cache

template <int kBytes, typename A>
constexpr int kPanelWidth = 2 * kBytes / sizeof(A);

// One value in all lanes. In assembly: gcc 12 inserts lane after lane.
template <int kBytes, typename V>
NF_INLINE V broadcast(const std::decay_t<decltype(V{}[0])>& value) {
  V all;
#ifdef NF_HAVE_LEVELS
  if constexpr (kBytes >= 32) {
    if constexpr (sizeof value == 4) asm("vbroadcastss %1, %0" : "=v"(all) : "m"(value));
    else asm("vbroadcastsd %1, %0" : "=v"(all) : "m"(value));
    return all;
  }
#endif
  if constexpr (sizeof(V) / sizeof value == 4) all = V{value, value, value, value};
  else if constexpr (sizeof(V) / sizeof value == 2) all = V{value, value};
  return all;
}

// a * b + c, with the level's instruction or, where it has none, in two.
template <int kBytes, typename V>
NF_INLINE V product_sum(V a, V b, V c) {
  if constexpr (kBytes < 32) return a * b + c;
  else return multiply_add<sizeof(V) / sizeof(a[0])>(a, b, c);
}

// Transposes a square of lanes; every shuffle is one instruction.
NF_INLINE void transpose(Vec<double, 2> (&v)[2]) {
  using M = Vec<int64_t, 2>;
  const Vec<double, 2> a = v[0], b = v[1];
  v[0] = __builtin_shuffle(a, b, M{0, 2});
  v[1] = __builtin_shuffle(a, b, M{1, 3});
}

NF_INLINE void transpose(Vec<double, 4> (&v)[4]) {
  using M = Vec<int64_t, 4>;
  Vec<double, 4> pairs[4];
#pragma GCC unroll 2
  for (int k = 0; k < 4; k += 2) {
    pairs[k] = __builtin_shuffle(v[k], v[k + 1], M{0, 4, 2, 6});
    pairs[k + 1] = __builtin_shuffle(v[k], v[k + 1], M{1, 5, 3, 7});
  }
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    v[k] = __builtin_shuffle(pairs[k], pairs[k + 2], M{0, 1, 4, 5});
    v[k + 2] = __builtin_shuffle(pairs[k], pairs[k + 2], M{2, 3, 6, 7});
  }
}

NF_INLINE void transpose(Vec<float, 4> (&v)[4]) {
  using M = Vec<int32_t, 4>;
  Vec<float, 4> pairs[4];
#pragma GCC unroll 2
  for (int k = 0; k < 4; k += 2) {
    pairs[k] = __builtin_shuffle(v[k], v[k + 1], M{0, 4, 1, 5});
    pairs[k + 1] = __builtin_shuffle(v[k], v[k + 1], M{2, 6, 3, 7});
  }
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    v[2 * k] = __builtin_shuffle(pairs[k], pairs[k + 2], M{0, 1, 4, 5});
    v[2 * k + 1] = __builtin_shuffle(pairs[k], pairs[k + 2], M{2, 3, 6, 7});
  }
}

NF_INLINE void transpose(Vec<float, 8> (&v)[8]) {
  using V = Vec<float, 8>;
  using M = Vec<int32_t, 8>;
  V pairs[8], quads[8];
#pragma GCC unroll 4
  for (int k = 0; k < 8; k += 2) {
    pairs[k] = __builtin_shuffle(v[k], v[k + 1], M{0, 8, 1, 9, 4, 12, 5, 13});
    pairs[k + 1] = __builtin_shuffle(v[k], v[k + 1], M{2, 10, 3, 11, 6, 14, 7, 15});
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const int from = k / 2 * 4 + k % 2, to = k / 2 * 4 + k % 2 * 2;
    quads[to] = __builtin_shuffle(pairs[from], pairs[from + 2], M{0, 1, 8, 9, 4, 5, 12, 13});
    quads[to + 1] = __builtin_shuffle(pairs[from], pairs[from + 2], M{2, 3, 10, 11, 6, 7, 14, 15});
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    v[k] = __builtin_shuffle(quads[k], quads[k + 4], M{0, 1, 2, 3, 8, 9, 10, 11});
    v[k + 4] = __builtin_shuffle(quads[k], quads[k + 4], M{4, 5, 6, 7, 12, 13, 14, 15});
  }
}

// Tiles of sum_i coef_i W_i for some samples in which the same experts take part: their weights
// come once from the second-level cache for all of these.
template <typename T>
struct MixTiles {
  static constexpr int64_t kMostSamples = 4;

  const T* weight;  // expert 0, first output, first input
  int64_t expert_stride, output_stride;
  const int64_t* experts;  // those that take part
  const Acc<T>* coef;      // (samples, count)
  int64_t count, samples;
  int64_t outputs, depth;  // up to kTileOutputs, kTileDepth
  Acc<T>* tiles;           // (samples, kTileOutputs * kTileDepth)

  template <int kBytes>
  static NF_INLINE void run(const MixTiles& args) {
    switch (args.samples) {
      case 1: return args.template mix<kBytes, 1>();
      case 2: return args.template mix<kBytes, 2>();
      case 3: return args.template mix<kBytes, 3>();
      default: return args.template mix<kBytes, 4>();
    }
  }

  template <int kBytes, int kSamples>
  NF_INLINE void mix() const {
    constexpr int kSide = std::min(kBytes, 32) / sizeof(Acc<T>),
                  kWidth = kPanelWidth<kBytes, Acc<T>>;
    alignas(64) Acc<T> rows[kSamples * kSide * kTileDepth];
    const MixTiles m = *this;  // local copies stay in registers: no store can change them
    for (int64_t o = 0; o < kTileOutputs; o += kSide) {
      for (int row = 0; row < kSide; ++row)
        m.template mix_row<kBytes, kSamples, kSide>(o + row, rows + row * kTileDepth);
      for (int s = 0; s < kSamples; ++s) {
        const Acc<T>* from = rows + s * kSide * kTileDepth;
        Acc<T>* panel =
            m.tiles + s * kTileOutputs * kTileDepth + o / kWidth * kWidth * m.depth + o % kWidth;
        for (int64_t k = 0; k < m.depth; k += kSide)
          turn<kSide>(from + k, std::min<int64_t>(kSide, m.depth - k), panel + k * kWidth, kWidth);
      }
    }
  }

  // All inputs of one output, of all samples. An element's bits do not depend on kSamples.
  template <int kBytes, int kSamples, int kSide>
  NF_INLINE void mix_row(int64_t output, Acc<T>* to) const {
    constexpr int kParts = kSamples < 3 ? 4 : 2;  // sums fill the registers
    const int64_t some = output < outputs ? count : 0;
    const T* from = weight + output * output_stride;
    int64_t k = 0;
    for (; k + kParts * kSide <= depth; k += kParts * kSide)
      mix_part<kBytes, kSamples, kSide, kParts>(from + k, some, to + k);
    for (; k + kSide <= depth; k += kSide)
      mix_part<kBytes, kSamples, kSide, 1>(from + k, some, to + k);
    for (; k < depth; ++k)
      for (int s = 0; s < kSamples; ++s) {
        Acc<T> sum = 0;
        for (int64_t i = 0; i < some; ++i)
          sum += coef[s * count + i] * load<1>(from + experts[i] * expert_stride + k)[0];
        to[s * kSide * kTileDepth + k] = sum;
      }
  }

  template <int kBytes, int kSamples, int kLanes, int kParts>
  NF_INLINE void mix_part(const T* from, int64_t some, Acc<T>* to) const {
    using V = Vec<Acc<T>, kLanes>;
    V mixed[kSamples][kParts] = {};
    for (int64_t i = 0; i < some; ++i) {
      const T* expert = from + experts[i] * expert_stride;
      V value[kParts];
      for (size_t ahead = 0; ahead < kParts * kLanes * sizeof(T); ahead += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(expert + output_stride) + ahead);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) value[part] = load<kLanes>(expert + part * kLanes);
#pragma GCC unroll 4
      for (int s = 0; s < kSamples; ++s) {
        const V w = broadcast<kBytes, V>(coef[s * count + i]);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part)
          mixed[s][part] = product_sum<kBytes>(w, value[part], mixed[s][part]);
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < kSamples; ++s)
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part)
        store<kLanes>(to + s * kLanes * kTileDepth + part * kLanes, mixed[s][part]);
  }

  // A square of kSide rows, some of its columns, as rows of a panel.
  template <int kSide>
  static NF_INLINE void turn(const Acc<T>* from, int64_t columns, Acc<T>* to, int64_t width) {
    Vec<Acc<T>, kSide> square[kSide];
#pragma GCC unroll 8
    for (int row = 0; row < kSide; ++row) square[row] = load<kSide>(from + row * kTileDepth);
    transpose(square);
    if (columns == kSide) {
#pragma GCC unroll 8
      for (int row = 0; row < kSide; ++row) store<kSide>(to + row * width, square[row]);
    } else {
      for (int row = 0; row < columns; ++row) store<kSide>(to + row * width, square[row]);
    }
  }
};

// Rows of x times a tile, added to sums (rows, kTileOutputs).
template <typename A>
struct ProductRows {
  const A* x;
  int64_t x_stride, rows, depth;
  const A* tile;
  A* sums;
  bool first;  // sums start at zero

  template <int kBytes>
  static NF_INLINE void run(const ProductRows& args) {
    constexpr int kMost = kBytes == 64 ? 12 : 6;  // twice as many sums, and three registers, fit
    constexpr int kWidth = kPanelWidth<kBytes, A>;
    const int64_t groups = (args.rows + kMost - 1) / kMost;
    for (int64_t o = 0; o < kTileOutputs; o += kWidth) {
      ProductRows p = args;
      p.tile += o * args.depth;
      p.sums += o;
      for (int64_t g = 0; g < groups; ++g) {
        // Groups differ by one row at most: none wastes its registers on a few rows.
        const int64_t begin = args.rows * g / groups, end = args.rows * (g + 1) / groups;
        p.x = args.x + begin * args.x_stride;
        p.sums = args.sums + begin * kTileOutputs + o;
        p.template some<kBytes>(end - begin, std::make_integer_sequence<int, kMost>());
      }
    }
  }

  template <int kBytes, int... kRow>
  NF_INLINE void some(int64_t count, std::integer_sequence<int, kRow...>) const {
    ((count == kRow + 1 ? group<kBytes, kRow + 1>() : void()), ...);
  }

  template <int kBytes, int kRows>
  NF_INLINE void group() const {
    constexpr int kLanes = kBytes / sizeof(A);
    constexpr int64_t kLine = 64 / sizeof(A);
    using V = Vec<A, kLanes>;
    V sum[kRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = first ? V{} : load<kLanes>(sums + r * kTileOutputs);
      sum[r][1] = first ? V{} : load<kLanes>(sums + r * kTileOutputs + kLanes);
    }
    const A *from = x, *panel = tile;
    for (int64_t k = 0; k < depth; ++k, ++from, panel += 2 * kLanes) {
      if (k % kLine == 0) {
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(from + (kRows + r) * x_stride);
      }
      const V left = load<kLanes>(panel), right = load<kLanes>(panel + kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const V value = broadcast<kBytes, V>(from[r * x_stride]);
        sum[r][0] = product_sum<kBytes>(value, left, sum[r][0]);
        sum[r][1] = product_sum<kBytes>(value, right, sum[r][1]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      store<kLanes>(sums + r * kTileOutputs, sum[r][0]);
      store<kLanes>(sums + r * kTileOutputs + kLanes, sum[r][1]);
    }
  }
};

}  // namespace neulig_fast
