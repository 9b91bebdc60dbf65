// Which columns a random draw keeps, keyed by seed, stream and place. No torch headers.
// neulig_fast/ops/_task_vectors.py says what the words are.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/rounding.h"
#include "common/vector_math.h"

namespace neulig_fast {

constexpr int64_t kDrawnGroup = 64;  // columns of eight counters, which a draw begins and ends with

// Which of the columns from kDrawnGroup * first on a draw keeps: those whose word is below the
// threshold.
struct DrawCall {
  uint64_t seed, first, stream, threshold;  // the latter at most 2^32
  int64_t groups;
  uint16_t* drawn;  // 0xFFFF or 0; groups are rounded up to a register's worth
};

struct DrawColumns {
  static constexpr int kCounters = 8, kRounds = 7;
  static constexpr uint64_t kLowerHalves = uint64_t{1} << 63;

  template <int kBytes>
  static NF_INLINE void run(const DrawCall& args) {
    const DrawCall call = args;
    constexpr int kLanes = kBytes / sizeof(uint32_t);
    using H = Vec<uint16_t, 2 * kLanes>;
    const H share = H{} + static_cast<uint16_t>(call.threshold >> 16);
    const H all = H{} - static_cast<uint16_t>(call.threshold >> 32);
    const H rest = H{} + static_cast<uint16_t>(call.threshold);
    const bool divides = static_cast<uint16_t>(call.threshold) != 0;
    for (int64_t lane = 0; lane < call.groups * kCounters; lane += kLanes) {
      const uint64_t counter = call.first * kCounters + lane;
      H halves[4], kept[4], ties = {};
      words<kLanes>(call, counter, halves);
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word) {
        kept[word] = (H)(halves[word] < share) | all;
        ties |= (H)(halves[word] == share);
      }
      if (divides && any(ties)) {
        H lower[4];
        words<kLanes>(call, counter + kLowerHalves, lower);
        for (int word = 0; word < 4; ++word)
          kept[word] |= (H)(halves[word] == share) & (H)(lower[word] < rest);
      }
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word) store<kLanes>(call.drawn, lane, word, kept[word]);
    }
  }

  // Counter l of a group has the columns 2 l and 2 l + 1 of every 16, one word each.
  template <int kLanes>
  static NF_INLINE void words(const DrawCall& call, uint64_t counter,
                              Vec<uint16_t, 2 * kLanes> (&halves)[4]) {
    using W = Vec<uint64_t, kLanes / 2>;
    using U = Vec<uint32_t, kLanes>;
    const W first = load_bits<W>(kEven) + counter, second = first + 1;
    const W stream = W{} + call.stream;
    W even[4] = {first, first >> 32, stream, stream >> 32};
    W odd[4] = {second, second >> 32, stream, stream >> 32};
    philox_rounds<kLanes, kRounds>(call.seed, even);
    philox_rounds<kLanes, kRounds>(call.seed, odd);
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word) {
      U both = interleaved<kLanes>(even[word], odd[word]);
      if constexpr (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) both = both << 16 | both >> 16;
      halves[word] = (Vec<uint16_t, 2 * kLanes>)both;
    }
  }

  template <typename H>
  static NF_INLINE bool any(H ties) {
    uint64_t parts[sizeof(H) / 8], found = 0;
    std::memcpy(parts, &ties, sizeof ties);
    for (const uint64_t part : parts) found |= part;
    return found != 0;
  }

  template <int kLanes>
  static NF_INLINE void store(uint16_t* drawn, int64_t lane, int word,
                              const Vec<uint16_t, 2 * kLanes>& kept) {
    constexpr int kTogether = kLanes < kCounters ? kLanes : kCounters;
#pragma GCC unroll 2
    for (int part = 0; part < kLanes; part += kTogether) {
      const int64_t at = lane + part;
      uint16_t* to = drawn + at / kCounters * kDrawnGroup + at % kCounters * 2 + word * 16;
      std::memcpy(to, reinterpret_cast<const char*>(&kept) + part * 4, kTogether * 4);
    }
  }

  static constexpr uint64_t kEven[] = {0, 2, 4, 6, 8, 10, 12, 14};
};

// All bits where a draw keeps a column.
template <typename A, int... kLane>
NF_INLINE Vec<Bits<A>, sizeof...(kLane)> load_drawn(const uint16_t* p,
                                                    std::integer_sequence<int, kLane...>) {
  using S = Vec<SignedBits<A>, sizeof...(kLane)>;
  const auto v = load_bits<Vec<int16_t, sizeof...(kLane)>>(p);
  return (Vec<Bits<A>, sizeof...(kLane)>)S{SignedBits<A>{v[kLane]}...};
}

}  // namespace neulig_fast
