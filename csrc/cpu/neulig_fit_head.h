// The head and the boosting term of one sample in neulig_fit, for every instruction level.
//
// In: P (N, C), the head's products with the N features; w (N,). With y = inverse * sum_i w_i P_i
// + h, out: the loss and dots_i = <P_i, B dL/dy>, before the normalisation's part. Supervised, with
// p = softmax(y) and target t, dots_i = sum_c p_c (P_ic - P_it): what is left is small where p is
// sure of t, and so is its rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/neulig_kernels.h"

namespace neulig_fast {

// Classes [begin, end) of all experts; whole steps.
template <typename A>
struct Classes {
  const A* products;  // expert 0, class `begin`
  int64_t stride;     // from an expert to the next
  int64_t begin, end;

  const A* at(int64_t expert, int64_t column) const {
    return products + expert * stride + (column - begin);
  }
};

template <typename A>
struct HeadSample {
  Classes<A> parts[2];  // whole steps where they are, and a zero-padded copy of the rest
  int64_t experts;
  const A* w;
  A inverse;        // 1 / |e|
  const A* bias;    // (columns,), -inf beyond C
  int64_t target;   // -1: entropy
  A *y, *g;         // scratch (columns,)
  int64_t columns;  // C in whole steps
  A* origin;        // scratch (N,)
  A* dots;          // (N,)
  double* loss;     // added to
};

template <typename A>
struct Head {
  template <int kBytes>
  static NF_INLINE void run(const HeadSample<A>& h) {
    constexpr int kLanes = kBytes / sizeof(A);
    const A largest = logits<kLanes>(h);
    const A at_target = h.target < 0 ? A(0) : h.y[h.target] - largest;
    const A total = exponentials<kLanes>(h, largest);
    if (h.target < 0) {
      entropy<kLanes>(h, total);
      return products<kLanes>(h, A(1));
    }
    *h.loss += std::log(total) - at_target;
    const Classes<A>& part = h.parts[h.target >= h.parts[0].end];
    for (int64_t i = 0; i < h.experts; ++i) h.origin[i] = *part.at(i, h.target);
    products<kLanes>(h, total);
  }

  // y, and its maximum.
  template <int kLanes>
  static NF_INLINE A logits(const HeadSample<A>& h) {
    using V = Vec<A, kLanes>;
    constexpr int kVectors = kStep / kLanes;
    V top[kVectors];
    for (V& v : top) v = V{} - std::numeric_limits<A>::infinity();
    for (const Classes<A>& part : h.parts)
      for (int64_t c = part.begin; c < part.end; c += kStep) {
        V sum[kVectors] = {};
        for (int64_t i = 0; i < h.experts; ++i) {
          const V w = broadcast<kLanes>(h.w + i);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v)
            sum[v] = multiply_add<kLanes>(load<kLanes>(part.at(i, c + v * kLanes)), w, sum[v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const V bias = load<kLanes>(h.bias + c + v * kLanes);
          const V y = multiply_add<kLanes>(sum[v], broadcast<kLanes>(&h.inverse), bias);
          store<kLanes>(h.y + c + v * kLanes, y);
          top[v] = select((Vec<Bits<A>, kLanes>)(y > top[v]), y, top[v]);
        }
      }
    A largest = top[0][0];
    for (const V& v : top)
      for (int k = 0; k < kLanes; ++k) largest = v[k] > largest ? v[k] : largest;
    return largest;
  }

  // y = e^(y - largest), and its sum.
  template <int kLanes>
  static NF_INLINE A exponentials(const HeadSample<A>& h, A largest) {
    using V = Vec<A, kLanes>;
    constexpr int kVectors = kStep / kLanes;
    V sum[kVectors] = {};
    for (int64_t c = 0; c < h.columns; c += kStep)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        A* y = h.y + c + v * kLanes;
        const V e = exp_nonpositive<kLanes>(load<kLanes>(y) - largest);
        store<kLanes>(y, e);
        sum[v] = sum[v] + e;
      }
    return total<kLanes>(sum);
  }

  // From e^(y - max) and its sum: y = B dL/dy = -p (g - <p, g>), g = log(p + d) + p / (p + d).
  template <int kLanes>
  static NF_INLINE void entropy(const HeadSample<A>& h, A sum) {
    using V = Vec<A, kLanes>;
    constexpr int kVectors = kStep / kLanes;
    V plogp[kVectors] = {}, pg[kVectors] = {};
    for (int64_t c = 0; c < h.columns; c += kStep)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        A *y = h.y + c + v * kLanes, *to = h.g + c + v * kLanes;
        const V p = load<kLanes>(y) / sum, more = p + A(kEntropyEpsilon);
        const V logarithm = log_positive<kLanes>(more), g = logarithm + p / more;
        store<kLanes>(y, p);
        store<kLanes>(to, g);
        plogp[v] = multiply_add<kLanes>(p, logarithm, plogp[v]);
        pg[v] = multiply_add<kLanes>(p, g, pg[v]);
      }
    *h.loss -= total<kLanes>(plogp);
    const A mean = total<kLanes>(pg);
    for (int64_t c = 0; c < h.columns; c += kLanes)
      store<kLanes>(h.y + c, load<kLanes>(h.y + c) * (mean - load<kLanes>(h.g + c)));
    for (int64_t i = 0; i < h.experts; ++i) h.origin[i] = 0;
  }

  // dots_i = sum_c y_c (P_ic - origin_i) / divisor.
  template <int kLanes>
  static NF_INLINE void products(const HeadSample<A>& h, A divisor) {
    using V = Vec<A, kLanes>;
    constexpr int kVectors = kStep / kLanes;
    for (int64_t i = 0; i < h.experts; ++i) {
      V sum[kVectors] = {};
      for (const Classes<A>& part : h.parts)
        for (int64_t c = part.begin; c < part.end; c += kStep)
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            const V difference = load<kLanes>(part.at(i, c + v * kLanes)) - h.origin[i];
            sum[v] = multiply_add<kLanes>(load<kLanes>(h.y + c + v * kLanes), difference, sum[v]);
          }
      h.dots[i] = total<kLanes>(sum) / divisor;
    }
  }

  template <int kLanes>
  static NF_INLINE A total(const Vec<A, kLanes> (&sum)[kStep / kLanes]) {
    A lanes[kStep];
    for (int v = 0; v < kStep / kLanes; ++v) store<kLanes>(lanes + v * kLanes, sum[v]);
    return sum_lanes(lanes);
  }
};

}  // namespace neulig_fast
