// All experts of a call, in chunks: what magnitude_select and magnitude_histogram share.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "cpu/magnitude_keys.h"

namespace neulig_fast {

constexpr int64_t kChunk = 32768;  // columns of an item: base stays in a second-level cache
constexpr int64_t kBlock = 2048;   // columns whose keys are kept on the stack at once
constexpr int64_t kBins = 2048;

// Some bits of a key, from `shift` on.
struct Digit {
  int shift, width;
};

// The upper ones first; neulig_fast/ops/_digits.py has the same.
inline std::vector<Digit> digits_of(size_t key_size) {
  if (key_size == 4) return {{20, 11}, {10, 10}, {0, 10}};
  return {{52, 11}, {41, 11}, {30, 11}, {20, 10}, {10, 10}, {0, 10}};
}

// Just outside the keys that are numbers and whose bits above a digit are `prefix`.
template <typename K>
Bounds<K> bounds_of(int64_t prefix, Digit digit) {
  const int below = digit.shift + digit.width;
  const int64_t prefixes = int64_t{1} << (8 * sizeof(K) - 1 - below);
  if (prefix < 0 || prefix >= prefixes) return {0, 0};
  const uint64_t begin = static_cast<uint64_t>(prefix) << below;
  const uint64_t end = static_cast<uint64_t>(prefix + 1) << below;
  const uint64_t most = static_cast<uint64_t>(kAllKeys<K>.high);
  if (begin >= most) return {0, 0};
  return {static_cast<K>(static_cast<int64_t>(begin) - 1), static_cast<K>(std::min(end, most))};
}

template <typename T>
struct Magnitudes {
  using K = Key<T>;

  const T *params, *base;
  int64_t row_stride, experts, columns;

  Magnitudes(const Tensor& params, const std::optional<Tensor>& base)
      : params(static_cast<const T*>(params.const_data_ptr())),
        base(base ? static_cast<const T*>(base->const_data_ptr()) : nullptr),
        row_stride(params.stride(0)),
        experts(params.size(0)),
        columns(params.size(1)) {}

  int64_t chunks() const {
    return (columns + kChunk - 1) / kChunk;
  }

  Differences<T> row(int64_t expert) const {
    return {params + expert * row_stride, base};
  }

  // Calls take(keys, count) with the keys between the bounds, block by block, in order.
  template <typename Take>
  Tally sift(int64_t expert, int64_t chunk, Bounds<K> bounds, const Take& take) const {
    K kept[kBlock + Sift<T>::kSlack];
    Tally total;
    const int64_t end = std::min((chunk + 1) * kChunk, columns);
    for (int64_t p = chunk * kChunk; p < end; p += kBlock) {
      Tally block;
      run_kernel<Sift<T>>(
          Sift<T>{row(expert).from(p), std::min(kBlock, end - p), bounds, kept, &block});
      if (block.between > 0) take(kept, block.between);
      total.add(block);
    }
    return total;
  }

  // Adds a chunk's counts of the values of a digit, where the bits above are `prefix`.
  void count_digit(int64_t expert, int64_t chunk, int64_t prefix, Digit digit,
                   int64_t* counts) const {
    std::array<std::array<int32_t, kBins>, 2> bins{};  // neighbours often have the same digit
    const K mask = static_cast<K>((1 << digit.width) - 1);
    sift(expert, chunk, bounds_of<K>(prefix, digit), [&](const K* keys, int64_t count) {
      for (int64_t j = 0; j < count; ++j) ++bins[j & 1][(keys[j] >> digit.shift) & mask];
    });
    for (int64_t bin = 0; bin < kBins; ++bin)  // sums of integers: the order does not matter
      if (const int32_t sum = bins[0][bin] + bins[1][bin]; sum > 0)
        __atomic_fetch_add(counts + bin, int64_t{sum}, __ATOMIC_RELAXED);
  }
};

inline void check_magnitudes(const char* op, const Tensor& params,
                             const std::optional<Tensor>& base) {
  check_params(op, params);
  if (!base) return;
  STD_TORCH_CHECK(base->dim() == 1 && base->size(0) == params.size(1) &&
                      base->scalar_type() == params.scalar_type(),
                  op, ": base must be (P,) = (", params.size(1), ",) of params' dtype ",
                  toString(params.scalar_type()), ", got ", shape_text(*base), " ",
                  toString(base->scalar_type()));
  check_inner_stride(op, "base", *base);
}

}  // namespace neulig_fast
