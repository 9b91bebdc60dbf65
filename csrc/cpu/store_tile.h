// The second stage of a blend whose output has another type than its experts, or is rounded
// stochastically: a tile of fp32 sums, in L1, becomes the output's columns.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>

#include "common/rounding.h"
#include "common/stream.h"
#include "cpu/step.h"

namespace neulig_fast {

constexpr int64_t kTile = 4096;  // columns that stay in cache while all outputs are computed

// Whole steps of columns.
struct StoreCall {
  const float* sum;
  const uint32_t* random;  // one word per column; null: to nearest
  void* out;
  int64_t columns;  // a multiple of kStep
  bool stream;      // out bypasses the caches; it is then 16-byte aligned
};

template <typename T>
struct StoreTile {
  template <int kBytes>
  static NF_INLINE void run(const StoreCall& args) {
    const StoreCall call = args;
    constexpr int kLanes = kBytes / sizeof(float);
    T* out = static_cast<T*>(call.out);
    alignas(64) T line[kStep];
    for (int64_t p = 0; p < call.columns; p += kStep) {
      T* to = call.stream ? line : out + p;
#pragma GCC unroll 4
      for (int lane = 0; lane < kStep; lane += kLanes) {
        const auto sum = load<kLanes>(call.sum + p + lane);
        if constexpr (sizeof(T) <= 2) {
          if (call.random != nullptr) {
            const auto word = load_bits<Vec<uint32_t, kLanes>>(call.random + p + lane);
            store_stochastic<T, kLanes>(to + lane, sum, word);
            continue;
          }
        }
        store<kLanes>(to + lane, sum);
      }
      if (call.stream) stream_copy<sizeof line>(out + p, line);
    }
  }
};

// The words of `groups` counters, each four columns, rounded up to a register's worth of counters.
struct RandomCall {
  uint64_t seed, first;
  uint32_t segment, output;
  int64_t groups;
  uint32_t* words;
};

constexpr int kMaxLanes = 16;

struct RandomWords {
  template <int kBytes>
  static NF_INLINE void run(const RandomCall& args) {
    const RandomCall call = args;
    constexpr int kLanes = kBytes / sizeof(uint32_t);
    for (int64_t group = 0; group < call.groups; group += kLanes) {
      using U = Vec<uint32_t, kLanes>;
      uint32_t low[kLanes], high[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t counter = call.first + group + lane;
        low[lane] = static_cast<uint32_t>(counter);
        high[lane] = static_cast<uint32_t>(counter >> 32);
      }
      U c[4] = {load_bits<U>(low), load_bits<U>(high), U{} + call.segment, U{} + call.output};
      philox<kLanes>(call.seed, c);
      for (int lane = 0; lane < kLanes; ++lane)
        for (int word = 0; word < 4; ++word) call.words[(group + lane) * 4 + word] = c[word][lane];
    }
  }
};

// How an output is stored, decided once per call. Columns are counted from their segment's start.
struct TileStore {
  KernelFn<StoreCall> kernel;
  KernelFn<RandomCall> random_words;  // null: to nearest
  uint64_t seed;
  int64_t itemsize;
  bool stream;

  // At most kTile columns.
  void write(const float* sum, int64_t k, int64_t segment, int64_t first, int64_t columns,
             char* out) const {
    alignas(64) uint32_t words[kTile + 4 + 4 * kMaxLanes];
    const uint32_t* random = nullptr;
    if (random_words != nullptr) {
      const int64_t groups = (first % 4 + columns + 3) / 4;
      random_words({seed, static_cast<uint64_t>(first / 4), static_cast<uint32_t>(segment),
                    static_cast<uint32_t>(k), groups, words});
      random = words + first % 4;
    }
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) / itemsize % kStep);
    const int64_t head = stream && past > 0 ? std::min(kStep - past, columns) : 0;
    const int64_t steps = (columns - head) / kStep * kStep, tail = columns - head - steps;
    part_of_step(sum, random, out, head);
    kernel({sum + head, at(random, head), out + head * itemsize, steps, stream});
    part_of_step(sum + head + steps, at(random, head + steps), out + (head + steps) * itemsize,
                 tail);
  }

  void write(const double* sum, int64_t k, int64_t segment, int64_t first, int64_t columns,
             char* out) const {
    alignas(64) float narrow[kTile];
    std::copy_n(sum, columns, narrow);
    write(narrow, k, segment, first, columns, out);
  }

 private:
  static const uint32_t* at(const uint32_t* random, int64_t column) {
    return random == nullptr ? nullptr : random + column;
  }

  void part_of_step(const float* sum, const uint32_t* random, char* out, int64_t columns) const {
    if (columns == 0) return;
    alignas(64) float padded[kStep] = {};
    alignas(64) uint32_t words[kStep] = {};
    alignas(64) char line[kStep * sizeof(double)];
    std::copy_n(sum, columns, padded);
    if (random != nullptr) std::copy_n(random, columns, words);
    kernel({padded, random == nullptr ? nullptr : words, line, kStep, false});
    std::memcpy(out, line, columns * itemsize);
  }
};

template <typename T>
TileStore make_tile_store(CpuLevel level, std::optional<int64_t> seed, bool stream) {
  return {kernel_at<StoreTile<T>, StoreCall>(level),
          seed.has_value() ? kernel_at<RandomWords, RandomCall>(level) : nullptr,
          static_cast<uint64_t>(seed.value_or(0)), sizeof(T), stream};
}

}  // namespace neulig_fast
