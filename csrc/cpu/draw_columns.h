// Which columns a random draw keeps, Philox4x32-10 keyed by seed, stream and place. No torch
// headers. neulig_fast/ops/_task_vectors.py says what the words are.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/rounding.h"

namespace neulig_fast {

// Which of the columns from 4 * first on a draw keeps: those whose word is below the threshold.
struct DrawCall {
  uint64_t seed, first, stream, threshold;  // the latter at most 2^32
  int64_t groups;                           // of four columns, a counter each
  uint8_t* drawn;  // 0xFF or 0; groups are rounded up to a register's worth
};

struct DrawColumns {
  template <int kBytes>
  static NF_INLINE void run(const DrawCall& args) {
    const DrawCall call = args;
    constexpr int kLanes = kBytes / sizeof(uint32_t);
    using U = Vec<uint32_t, kLanes>;
    const U below = U{} + static_cast<uint32_t>(call.threshold);
    const U all = U{} - static_cast<uint32_t>(call.threshold >> 32);
    const U ahead = load_bits<U>(kAhead);
    for (int64_t group = 0; group < call.groups; group += kLanes) {
      const uint64_t counter = call.first + group;
      const U lower = ahead + static_cast<uint32_t>(counter);
      const U carry = (U)(lower < ahead) & 1u;
      U c[4] = {lower, carry + static_cast<uint32_t>(counter >> 32),
                U{} + static_cast<uint32_t>(call.stream),
                U{} + static_cast<uint32_t>(call.stream >> 32)};
      philox<kLanes>(call.seed, c);
      U bytes = {};
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word) {
        const uint32_t place = kLittle ? 8 * word : 24 - 8 * word;
        bytes |= ((U)(c[word] < below) | all) & (0xFFu << place);
      }
      std::memcpy(call.drawn + 4 * group, &bytes, sizeof bytes);
    }
  }

  static constexpr uint32_t kAhead[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static constexpr bool kLittle = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
};

}  // namespace neulig_fast
