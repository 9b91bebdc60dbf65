// Which columns a random draw keeps, keyed by seed, stream and place. No torch headers.
// neulig_fast/ops/_task_vectors.py says what the words are.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/rounding.h"

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

  template <int kLanes>
  static NF_INLINE void words(const DrawCall& call, uint64_t counter,
                              Vec<uint16_t, 2 * kLanes> (&halves)[4]) {
    using U = Vec<uint32_t, kLanes>;
    using H = Vec<uint16_t, 2 * kLanes>;
    const U ahead = load_bits<U>(kAhead), lower = ahead + static_cast<uint32_t>(counter);
    const U carry = (U)(lower < ahead) & 1u;
    U c[4] = {lower, carry + static_cast<uint32_t>(counter >> 32),
              U{} + static_cast<uint32_t>(call.stream),
              U{} + static_cast<uint32_t>(call.stream >> 32)};
    philox<kLanes, kRounds>(call.seed, c);
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word) halves[word] = in_order<kLanes>(c[word]);
  }

  // Counter l of a group has the columns 2 l and 2 l + 1 of every 16, one word each.
  template <int kLanes>
  static NF_INLINE Vec<uint16_t, 2 * kLanes> in_order(Vec<uint32_t, kLanes> word) {
    constexpr bool kLittle = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
    return (Vec<uint16_t, 2 * kLanes>)(kLittle ? word : word << 16 | word >> 16);
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

  static constexpr uint32_t kAhead[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

}  // namespace neulig_fast
