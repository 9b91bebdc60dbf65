// The activations that end a linear layer, on vectors. No torch headers.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/vector_math.h"

namespace neulig_fast {

// In the order of neulig_fast/ops/_activation.py.
enum class Activation : int64_t { kNone, kRelu, kGelu, kGeluTanh, kQuickGelu, kCount };

// 1 / (1 + e^-z), by the exponential of -|z|.
template <int kLanes, typename V>
NF_INLINE V sigmoid(V z) {
  using A = std::decay_t<decltype(z[0])>;
  using U = Vec<Bits<A>, kLanes>;
  const V e = exp_nonpositive<kLanes>(select((U)(z > 0), -z, z));
  return select((U)(z > 0), V{} + A(1), e) / (e + A(1));
}

// The normal distribution function. With y = |x| / √2 and t = 1 / (1 + y/2), erfc(y) is
// t exp(-y² + g(t)), g a polynomial fitted for t in [0.05, 1]: 1e-7 relative, also far out, where
// 1 + erf would have cancelled.
template <int kLanes>
NF_INLINE Vec<float, kLanes> normal_cdf(Vec<float, kLanes> x) {
  using V = Vec<float, kLanes>;
  using U = Vec<uint32_t, kLanes>;
  constexpr float kFit[] = {0.1789889145f, -0.8613377816f, 1.568483546f,  -1.224932554f,
                            0.3391717977f, -0.2110784706f, 0.1028890973f, 0.3732485339f,
                            1.000080574f,  -1.265513572f};
  const V y = (V)((U)x & 0x7FFFFFFFu) * 0.70710678f;
  const V t = 1.0f / multiply_add<kLanes>(y, V{} + 0.5f, V{} + 1.0f);
  const V tail = 0.5f * t * exp_nonpositive<kLanes>(polynomial<kLanes>(t, kFit) - y * y);
  return select((U)(x > 0), 1.0f - tail, tail);
}

template <int kLanes>
NF_INLINE Vec<double, kLanes> normal_cdf(Vec<double, kLanes> x) {
  for (int lane = 0; lane < kLanes; ++lane)
    x[lane] = 0.5 * std::erfc(x[lane] * -0.70710678118654752440);
  return x;
}

template <int kLanes, typename V>
NF_INLINE V activate(Activation activation, V x) {
  using A = std::decay_t<decltype(x[0])>;
  using U = Vec<Bits<A>, kLanes>;
  switch (activation) {
    case Activation::kRelu: return select((U)(x <= 0), V{}, x);  // NaN stays NaN
    case Activation::kGelu: return x * normal_cdf<kLanes>(x);
    case Activation::kGeluTanh: {  // tanh(u) = 2 sigmoid(2 u) - 1
      const V cube = multiply_add<kLanes>(x * x, V{} + A(0.044715), V{} + A(1)) * x;
      return x * sigmoid<kLanes>(cube * A(1.59576912160573071));
    }
    case Activation::kQuickGelu: return x * sigmoid<kLanes>(x * A(1.702));
    default: return x;
  }
}

}  // namespace neulig_fast
