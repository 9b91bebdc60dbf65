// fp8 types, and what a float type narrower than fp32 is in bits. Nothing but <cstdint>.
#pragma once

#include <cstdint>

namespace neulig_fast {

struct Float8E4M3 {  // e4m3fn: no infinity
  uint8_t bits;
};
struct Float8E5M2 {
  uint8_t bits;
};

// The sign apart. kLargest is the code that too large values become.
template <int kMantissaBits, int kExponentBias, uint32_t kLargestCode, uint32_t kNanCode>
struct Format {
  static constexpr int kMantissa = kMantissaBits, kBias = kExponentBias;
  static constexpr uint32_t kLargest = kLargestCode, kNan = kNanCode;
};

using FormatOfBFloat16 = Format<7, 127, 0x7F80, 0x7FC0>;
using FormatOfHalf = Format<10, 15, 0x7C00, 0x7E00>;

template <typename T>
struct FormatOf;
template <>
struct FormatOf<Float8E4M3> : Format<3, 7, 0x7E, 0x7F> {};
template <>
struct FormatOf<Float8E5M2> : Format<2, 15, 0x7B, 0x7F> {};

}  // namespace neulig_fast
