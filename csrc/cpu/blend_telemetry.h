// What blend_telemetry.cpp does with steps of 16 columns, compiled for every instruction level.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/checks.h"
#include "common/dtype.h"
#include "common/stream.h"

namespace neulig_fast {

constexpr int64_t kAhead = 512;  // bytes of every row that are fetched ahead of their use
constexpr int kStep = 16;        // columns of a step, and lanes of every sum

template <typename T>
using Count = std::conditional_t<sizeof(Acc<T>) == 8, int64_t, int32_t>;

// Steps of columns of one segment.
template <typename T>
struct Steps {
  const T* x;  // first expert, first column
  int64_t row_stride, experts;
  const Acc<T>* weights;  // of output 0
  int64_t weight_stride, outputs;
  int64_t origin;        // the expert that offsets start from
  bool centred;          // or rather their mean
  Acc<T> share, limit;   // 1 / N; the smallest magnitude that `out` cannot hold
  ScalarType out;        // type of theta
  char* theta;           // output 0, first column
  int64_t theta_stride;  // bytes from one output to the next
  bool stream;           // theta bypasses the caches; it is then 16-byte aligned
  double* squares;       // (N + K, kStep) lanes, added to: experts, then outputs
  Count<T>* counts;      // (1 + 2 K, kStep): conflicts; nonfinite and saturated of each output
  int64_t columns;       // a multiple of kStep
};

template <typename To, typename From, int kLanes>
NF_INLINE Vec<To, kLanes> convert(Vec<From, kLanes> v) {
  if constexpr (std::is_same_v<To, From>) return v;
  else return __builtin_convertvector(v, Vec<To, kLanes>);
}

template <int kLanes>
NF_INLINE void add_squares(double* lanes, Vec<double, kLanes> v) {
  const Vec<double, kLanes> sum = load<kLanes>(lanes) + v * v;
  store<kLanes>(lanes, sum);
}

// By halves: a vector of kLanes doubles would be wider than a register.
template <int kLanes>
NF_INLINE void add_squares(double* lanes, Vec<float, kLanes> v) {
  constexpr int kHalf = kLanes / 2;
  float halves[kLanes];
  store<kLanes>(halves, v);
  for (int first = 0; first < kLanes; first += kHalf) {
    const auto half = load_bits<Vec<float, kHalf>>(halves + first);
    add_squares<kHalf>(lanes + first, convert<double, float, kHalf>(half));
  }
}

// Adds 1 to every lane whose mask is set, which is -1.
template <typename M, typename C>
NF_INLINE void count(C* lanes, M mask) {
  const M sum = load_bits<M>(lanes) - mask;
  std::memcpy(lanes, &sum, sizeof sum);
}

template <typename O, int kLanes, typename V>
NF_INLINE void put(char* theta, int64_t column, V v, bool stream) {
  O* to = reinterpret_cast<O*>(theta) + column;
  if constexpr (sizeof(O) * kLanes % 16 == 0) {
    alignas(64) O line[kLanes];
    if (stream) {
      store<kLanes>(line, v);
      return stream_copy<sizeof line>(to, line);
    }
  }
  store<kLanes>(to, v);
}

// Via fp32 to the 16-bit types, as PyTorch converts fp64.
template <int kLanes, typename A>
NF_INLINE void put_as(ScalarType out, char* theta, int64_t column, Vec<A, kLanes> v, bool stream) {
  if (out == ScalarType::Double)
    return put<double, kLanes>(theta, column, convert<double, A, kLanes>(v), stream);
  const Vec<float, kLanes> narrow = convert<float, A, kLanes>(v);
  if (out == ScalarType::Float) return put<float, kLanes>(theta, column, narrow, stream);
  if (out == ScalarType::BFloat16) return put<BFloat16, kLanes>(theta, column, narrow, stream);
  put<Half, kLanes>(theta, column, narrow, stream);
}

// Counts and writes kLanes sums of output k.
template <int kLanes, typename T>
NF_INLINE void finish_lanes(const Steps<T>& g, int64_t k, int64_t p, int lane,
                            Vec<Acc<T>, kLanes> sum) {
  using A = Acc<T>;
  const A infinity = static_cast<A>(INFINITY);
  Vec<A, kLanes> narrow = sum;
  if (g.out != ScalarType::Double)
    narrow = convert<A, float, kLanes>(convert<float, A, kLanes>(sum));
  const auto nonfinite = ~((narrow < g.limit) & (narrow > -g.limit));
  Count<T>* counts = g.counts + (1 + 2 * k) * kStep + lane;
  count(counts, nonfinite);
  count(counts + kStep, nonfinite & (sum < infinity) & (sum > -infinity));
  put_as<kLanes, A>(g.out, g.theta + k * g.theta_stride, p, sum, g.stream);
}

// kLanes columns from p on, the lanes `lane` .. of a step. kExperts: their number, or 0 for any.
template <int kLanes, int kExperts, typename T>
NF_INLINE void telemetry_lanes(const Steps<T>& g, int64_t p, int lane) {
  using A = Acc<T>;
  using V = Vec<A, kLanes>;
  using Mask = decltype(V{} < V{});
  const int64_t experts = kExperts > 0 ? kExperts : g.experts;
  const auto read = [&](int64_t i) { return load<kLanes>(g.x + i * g.row_stride + p); };
  V held[kExperts > 0 ? kExperts : 1];
#pragma GCC unroll 8
  for (int i = 0; i < kExperts; ++i) held[i] = read(i);
  if (kExperts == 0)  // one load instruction for all rows, by which nothing can be foreseen
    for (int64_t i = 0; i < experts; ++i)
      __builtin_prefetch(g.x + i * g.row_stride + p + kAhead / int64_t{sizeof(T)});
  const auto x = [&](int64_t i) { return kExperts > 0 ? held[i] : read(i); };

  const V origin = read(g.origin), zero = {};
  V mean = zero;
  if (g.centred) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < experts; ++i) mean = mean + (x(i) - origin);
    mean = mean * g.share;
  }
  Mask above = {}, below = {};
#pragma GCC unroll 8
  for (int64_t i = 0; i < experts; ++i) {
    const V offset = x(i) - origin - mean;
    add_squares<kLanes>(g.squares + i * kStep + lane, offset);
    above |= offset > zero;
    below |= offset < zero;
  }
  count(g.counts + lane, above & below);

  for (int64_t k = 0; k < g.outputs; ++k) {
    const A* w = g.weights + k * g.weight_stride;
    V sum = w[0] * x(0);
#pragma GCC unroll 8
    for (int64_t i = 1; i < experts; ++i) sum = sum + w[i] * x(i);
    add_squares<kLanes>(g.squares + (experts + k) * kStep + lane, sum - origin - mean);
    finish_lanes<kLanes>(g, k, p, lane, sum);
  }
}

template <typename T, int kExperts>
struct TelemetrySteps {
  template <int kBytes>
  static NF_INLINE void run(const Steps<T>& args) {
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    const Steps<T> g = args;  // a local copy stays in registers: no store can change it
    for (int64_t p = 0; p < g.columns; p += kStep)
      for (int lane = 0; lane < kStep; lane += kLanes)
        telemetry_lanes<kLanes, kExperts>(g, p + lane, lane);
  }
};

}  // namespace neulig_fast
