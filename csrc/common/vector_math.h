// exp, log and sqrt of vectors, after Cephes (S. L. Moshier, netlib.org/cephes). No torch headers.
//
// Same bits at every level: multiply_add and IEEE operations only. tests/test_vector_math.py
// compares them with wider arithmetic: at most 2 ulp.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace neulig_fast {

template <typename A>
using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
template <typename A>
using SignedBits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

template <typename V, typename U>
NF_INLINE V select(U mask, V yes, V no) {
  return (V)((mask & (U)yes) | (~mask & (U)no));
}

// The polynomial with these coefficients, highest power first.
template <int kLanes, typename V, typename A, int kCount>
NF_INLINE V polynomial(V x, const A (&coefficients)[kCount]) {
  V y = V{} + coefficients[0];
#pragma GCC unroll 12
  for (int k = 1; k < kCount; ++k) y = multiply_add<kLanes>(y, x, V{} + coefficients[k]);
  return y;
}

template <typename A>
struct RealFormat;  // what exp and log know of a type

template <>
struct RealFormat<float> {
  static constexpr int kMantissa = 23;
  static constexpr uint32_t kOne = 0x3F800000u, kRootHalf = 0x3F3504F3u;
  static constexpr float kMagic = 0x1.8p+23f;       // its last place is 1
  static constexpr float kLowest = -87.336544f;     // e^x is subnormal below
  static constexpr float kLn2Low = 2.12194440e-4f;  // ln 2 = 0.693359375 - kLn2Low
};
template <>
struct RealFormat<double> {
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kOne = 0x3FF0000000000000u, kRootHalf = 0x3FE6A09E667F3BCDu;
  static constexpr double kMagic = 0x1.8p+52;
  static constexpr double kLowest = -708.3964185322641;
  static constexpr double kLn2Low = 2.121944400546905827679e-4;
};

// e^r for |r| <= ln 2 / 2.
template <int kLanes>
NF_INLINE Vec<float, kLanes> exp_reduced(Vec<float, kLanes> r) {
  constexpr float kTerms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                              4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  return multiply_add<kLanes>(polynomial<kLanes>(r, kTerms), r * r, r) + 1.0f;
}

template <int kLanes>
NF_INLINE Vec<double, kLanes> exp_reduced(Vec<double, kLanes> r) {
  constexpr double kP[] = {1.26177193074810590878e-4, 3.02994407707441961300e-2, 1.0};
  constexpr double kQ[] = {3.00198505138664455042e-6, 2.52448340349684104192e-3,
                           2.27265548208155028766e-1, 2.0};
  const auto square = r * r;
  const auto p = r * polynomial<kLanes>(square, kP);
  return 2.0 * (p / (polynomial<kLanes>(square, kQ) - p)) + 1.0;
}

// e^x for x <= 0; 0 where the result would be subnormal. NaN stays NaN.
template <int kLanes, typename V>
NF_INLINE V exp_nonpositive(V x) {
  using A = std::decay_t<decltype(x[0])>;
  using F = RealFormat<A>;
  using U = Vec<Bits<A>, kLanes>;
  const V shifted = multiply_add<kLanes>(x, V{} + A(1.44269504088896340736), V{} + F::kMagic);
  const V n = shifted - F::kMagic;
  V r = multiply_add<kLanes>(n, V{} - A(0.693359375), x);
  r = multiply_add<kLanes>(n, V{} + F::kLn2Low, r);
  const V power = (V)(((U)shifted << F::kMantissa) + F::kOne);  // 2^n
  return select((U)(x < F::kLowest), V{}, exp_reduced<kLanes>(r) * power);
}

// log(1 + f) - f + f^2 / 2, for 1 + f between the roots of 1/2 and 2.
template <int kLanes>
NF_INLINE Vec<float, kLanes> log_reduced(Vec<float, kLanes> f) {
  constexpr float kTerms[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                              -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                              2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  return polynomial<kLanes>(f, kTerms) * f * (f * f);
}

template <int kLanes>
NF_INLINE Vec<double, kLanes> log_reduced(Vec<double, kLanes> f) {
  constexpr double kP[] = {1.01875663804580931796e-4, 4.97494994976747001425e-1,
                           4.70579119878881725854e0,  1.44989225341610930846e1,
                           1.79368678507819816313e1,  7.70838733755885391666e0};
  constexpr double kQ[] = {1.0,
                           1.12873587189167450590e1,
                           4.52279145837532221105e1,
                           8.29875266912776603211e1,
                           7.11544750618563894466e1,
                           2.31251620126765340583e1};
  return f * (f * f * polynomial<kLanes>(f, kP) / polynomial<kLanes>(f, kQ));
}

// log x for normal x > 0.
template <int kLanes, typename V>
NF_INLINE V log_positive(V x) {
  using A = std::decay_t<decltype(x[0])>;
  using F = RealFormat<A>;
  using U = Vec<Bits<A>, kLanes>;
  using S = Vec<SignedBits<A>, kLanes>;
  const U offset = (U)x - F::kRootHalf;
  const U exponent = (U)((S)offset >> F::kMantissa);
  const V f = (V)((U)x - (exponent << F::kMantissa)) - A(1);
  const V n = (V)((U)(V{} + F::kMagic) + exponent) - F::kMagic;
  V y = multiply_add<kLanes>(n, V{} - F::kLn2Low, log_reduced<kLanes>(f));
  y = multiply_add<kLanes>(f * f, V{} - A(0.5), y);
  return select((U)(x == x), multiply_add<kLanes>(n, V{} + A(0.693359375), f + y), x);
}

// Rounded to nearest on every machine. In assembly: std::sqrt may set errno, so compilers do not
// make a vector of it.
template <int kLanes, typename V>
NF_INLINE V square_root(V x) {
#ifdef __SSE2__
  using A = std::decay_t<decltype(x[0])>;
  if constexpr (sizeof(V) >= 32) {
    V y;
    if constexpr (sizeof(A) == 4) asm("vsqrtps %1, %0" : "=v"(y) : "v"(x));
    else asm("vsqrtpd %1, %0" : "=v"(y) : "v"(x));
    return y;
  } else if constexpr (sizeof(V) == 16) {
    V y;
    if constexpr (sizeof(A) == 4) asm("sqrtps %1, %0" : "=x"(y) : "x"(x));
    else asm("sqrtpd %1, %0" : "=x"(y) : "x"(x));
    return y;
  }
#endif
  for (int k = 0; k < kLanes; ++k) x[k] = std::sqrt(x[k]);
  return x;
}

}  // namespace neulig_fast
