// The kernels of merge_task_vectors, for columns between which no bound changes. No torch headers.
// neulig_fast/ops/merge_task_vectors.py says what is computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/rounding.h"
#include "common/stream.h"
#include "common/vector_math.h"
#include "cpu/bf16_pairs.h"
#include "cpu/store_tile.h"
#include "cpu/task_vector_rules.h"

namespace neulig_fast {

enum class Elect { kNone, kWeightedSum, kSum, kWeightedCount, kCount };
// Which elements are kept: all, those with |d| > lower, those that are drawn, with scales, or all
// that a rule can ask, with scales.
enum class Keep { kAll, kLower, kDrawn, kRule };

// Whole steps of columns. Arrays have a number for every expert.
template <typename T>
struct MergeCall {
  using A = Acc<T>;

  const T* x;      // first expert, first column
  int64_t stride;  // elements from one expert to the next
  const T* base;
  int64_t experts;
  const A *weights, *scales;
  const A *lower, *upper;  // dropped: |d| <= lower and |d| > upper; NaN drops nothing
  const uint16_t* drawn;   // 0xFFFF where a draw keeps an expert's column, else 0; null: no draws
  int64_t drawn_stride;    // from one expert to the next
  const A* shares;  // what an agreeing expert adds to the divisor; null: that is the same for all
  A divisor;        // of all columns
  A lam;
  int zero_sign;
  bool largest;  // the largest term, not the sum
  A* sum;        // unless null, results go here, not to theta
  T* theta;
  bool stream;  // theta bypasses the caches; it is then 16-byte aligned
  int64_t columns;
};

template <typename V, typename A>
NF_INLINE V splat(A value) {
  using U = Vec<Bits<A>, sizeof(V) / sizeof(A)>;
  Bits<A> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (V)(U{} + bits);  // no addition, as that of a zero to a float would be
}

template <typename V, typename U>
NF_INLINE V without(V value, U dropped) {
  return (V)((U)value & ~dropped);
}

// kExperts: 0, or their number in the usual case, where each one's loads are instructions of their
// own and nothing is asked in the loop: a sum of terms, of T, that nothing but an election divides,
// and of drawn ones nothing, and which a total of zero elects + in.
template <typename T, Elect kElect, Keep kKeep, int kExperts>
struct MergeTaskVectors {
  using A = Acc<T>;
  static constexpr bool kUsual = kExperts > 0;
  static constexpr int64_t kRoom = kUsual ? kExperts : kMostExperts;
  static constexpr bool kWeighted =
      kElect == Elect::kWeightedSum || kElect == Elect::kWeightedCount;
  static constexpr bool kVotes = kElect == Elect::kCount || kElect == Elect::kWeightedCount;
  static constexpr bool kElects = kElect != Elect::kNone, kDrops = kKeep != Keep::kAll;
  static constexpr bool kScaled = kKeep == Keep::kDrawn || kKeep == Keep::kRule;
  static constexpr bool kBounded = kKeep == Keep::kLower || kKeep == Keep::kRule;
  static constexpr bool kDivides = kElects && !(kUsual && kKeep == Keep::kDrawn);

  // Copies that stay in registers, or next to them: no store can change them.
  struct Numbers {
    A weights[kRoom], scales[kRoom], lower[kRoom], upper[kRoom], shares[kRoom];
  };

  // What becomes of a step of columns.
  template <typename V, int kParts>
  struct Columns {
    V base[kParts], q[kParts], divisor[kParts], total[kParts];
    V on[kElects ? kRoom : 1][kParts];  // of every expert, what the election goes by
  };

  template <int kBytes>
  static NF_INLINE void run(const MergeCall<T>& args) {
    const MergeCall<T> call = args;
    const int64_t experts = kUsual ? kExperts : call.experts;
    Numbers numbers;
    std::copy_n(call.weights, experts, numbers.weights);
    if constexpr (kScaled) std::copy_n(call.scales, experts, numbers.scales);
    if constexpr (kBounded) std::copy_n(call.lower, experts, numbers.lower);
    if constexpr (kKeep == Keep::kRule) std::copy_n(call.upper, experts, numbers.upper);
    if (kDivides || (!kUsual && call.shares != nullptr))
      std::copy_n(call.shares, experts, numbers.shares);
    for (int64_t p = 0; p < call.columns; p += kStep) step<kBytes>(call, numbers, p);
  }

  template <int kBytes>
  static NF_INLINE void step(const MergeCall<T>& call, const Numbers& numbers, int64_t p) {
    constexpr int kLanes = kBytes / sizeof(A), kParts = kStep / kLanes;
    using V = Vec<A, kLanes>;
    Columns<V, kParts> c;
    load_step(call.base + p, c.base);
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) c.q[part] = c.divisor[part] = c.total[part] = V{};
    if constexpr (kUsual) {
#pragma GCC unroll 8
      for (int i = 0; i < kExperts; ++i) read(call, numbers, i, p, c);
#pragma GCC unroll 8
      for (int i = 0; i < kExperts && kElects; ++i) take(call, numbers, i, c);
    } else {
      for (int64_t i = 0; i < call.experts; ++i) read(call, numbers, i, p, c);
      for (int64_t i = 0; i < call.experts && kElects; ++i) take(call, numbers, i, c);
    }
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      V q = c.q[part];
      if (kDivides || (!kUsual && kDrops && call.shares != nullptr))
        q = q / nonzero(c.divisor[part]);
      else if (!kUsual) q = q / call.divisor;
      c.q[part] = c.base[part] + q * call.lam;
    }
    if constexpr (!kUsual)
      if (call.sum != nullptr) return store_step(call.sum + p, c.q);
    if (!call.stream) return store_step(call.theta + p, c.q);
    alignas(64) T line[kStep];
    store_step(line, c.q);
    stream_copy<sizeof line>(call.theta + p, line);
  }

  template <int kParts>
  static constexpr bool kPairs =
      kUsual && std::is_same_v<T, BFloat16> && kParts % 2 == 0 && kHasPairs;

  template <typename V, int kParts>
  static NF_INLINE void load_step(const T* from, V (&to)[kParts]) {
    constexpr int kLanes = sizeof(V) / sizeof(A), kTogether = kPairs<kParts> ? 2 : 1;
#pragma GCC unroll 8
    for (int part = 0; part < kParts; part += kTogether) {
      const T* here = from + part * kLanes;
      if constexpr (kPairs<kParts>) load_pair<kLanes>(here, to[part], to[part + 1]);
      else to[part] = load<kLanes>(here);
    }
  }

  template <typename To, typename V, int kParts>
  static NF_INLINE void store_step(To* to, const V (&parts)[kParts]) {
    constexpr int kLanes = sizeof(V) / sizeof(A), kTogether = kPairs<kParts> ? 2 : 1;
#pragma GCC unroll 8
    for (int part = 0; part < kParts; part += kTogether) {
      To* here = to + part * kLanes;
      if constexpr (kPairs<kParts>) store_pair<kLanes>(here, parts[part], parts[part + 1]);
      else store<kLanes>(here, parts[part]);
    }
  }

  // Expert i: its term, or what an election needs of it.
  template <typename V, int kParts>
  static NF_INLINE void read(const MergeCall<T>& call, const Numbers& numbers, int64_t i, int64_t p,
                             Columns<V, kParts>& c) {
    using U = Vec<Bits<A>, sizeof(V) / sizeof(A)>;
    V x[kParts];
    load_step(call.x + i * call.stride + p, x);
    [[maybe_unused]] U drawn[kParts];
    if constexpr (kScaled) load_drawn_step(call, i, p, drawn);
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      V v = x[part] - c.base[part];
      U dropped = outside<U>(numbers, i, v);
      if constexpr (kScaled) {
        dropped |= ~drawn[part];
        v = v * numbers.scales[i];
      }
      const V t = v * numbers.weights[i];
      if constexpr (!kElects) {
        c.q[part] = combined(call, c.q[part], without(t, dropped));
        if (!kUsual && kDrops && call.shares != nullptr)
          c.divisor[part] = c.divisor[part] + without(splat<V>(numbers.shares[i]), dropped);
        continue;
      }
      c.on[i][part] = without(kWeighted ? t : v, dropped);
      V ballot = c.on[i][part];
      if constexpr (kVotes)
        ballot = vote(without(v, dropped), kWeighted ? numbers.weights[i] : A(1));
      c.total[part] = kUsual && i == 0 ? ballot : c.total[part] + ballot;
    }
  }

  // Where a draw keeps expert i's columns, in the order of load_step.
  template <typename U, int kParts>
  static NF_INLINE void load_drawn_step(const MergeCall<T>& call, int64_t i, int64_t p,
                                        U (&to)[kParts]) {
    constexpr int kLanes = sizeof(U) / sizeof(A);
    using S = Vec<SignedBits<A>, kLanes>;
    constexpr int kTogether = kPairs<kParts> ? 2 : 1;
#pragma GCC unroll 8
    for (int part = 0; part < kParts; part += kTogether) {
      if (!kUsual && call.drawn == nullptr) {
        to[part] = ~U{};
        continue;
      }
      const uint16_t* here = call.drawn + i * call.drawn_stride + p + part * kLanes;
      if constexpr (kPairs<kParts>) {
        const S words = load_bits<S>(here);
        to[part] = (U)((words << 16) >> 16);
        to[part + 1] = (U)(words >> 16);
      } else {
        to[part] = load_drawn<A>(here, std::make_integer_sequence<int, kLanes>());
      }
    }
  }

  // Where bounds drop a task vector.
  template <typename U, typename V>
  static NF_INLINE U outside(const Numbers& numbers, int64_t i, V d) {
    U dropped = {};
    if constexpr (kBounded) {
      const V magnitude = (V)((U)d & ~sign_bit<U>());
      dropped = (U)(magnitude <= numbers.lower[i]);
      if constexpr (kKeep == Keep::kRule) dropped |= (U)(magnitude > numbers.upper[i]);
    }
    return dropped;
  }

  // Expert i's term where it agrees with the sign of the total, and its share of the divisor. With
  // the sign bits turned, whoever agrees is positive; comparisons with NaN are false.
  template <typename V, int kParts>
  static NF_INLINE void take(const MergeCall<T>& call, const Numbers& numbers, int64_t i,
                             Columns<V, kParts>& c) {
    using U = Vec<Bits<A>, sizeof(V) / sizeof(A)>;
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const V on = c.on[i][part], total = c.total[part];
      U negative = (U)(total < V{});
      if (!kUsual && call.zero_sign < 0) negative = ~(U)(total > V{});
      U agrees = not_below<U>((V)((U)on ^ (negative & sign_bit<U>())));
      if (!kUsual && call.zero_sign == 0) agrees &= (U)(total != V{}) | (U)(on != on);
      const V t = kWeighted ? on : on * numbers.weights[i];
      c.q[part] = combined(call, c.q[part], (V)(agrees & (U)t));
      if constexpr (!kDivides) continue;
      const V share = (V)(agrees & (U)splat<V>(numbers.shares[i]));
      c.divisor[part] = kUsual && i == 0 ? share : c.divisor[part] + share;
    }
  }

  // Not <= 0, and so true of NaN. In assembly, as gcc 12 makes a comparison and a negation of it.
  template <typename U, typename V>
  static NF_INLINE U not_below(V v) {
#ifdef NF_HAVE_LEVELS
    if constexpr (sizeof(V) == 32) {
      U found;
      if constexpr (sizeof(A) == 4) asm("vcmpnleps %2, %1, %0" : "=x"(found) : "x"(v), "x"(V{}));
      else asm("vcmpnlepd %2, %1, %0" : "=x"(found) : "x"(v), "x"(V{}));
      return found;
    }
#endif
    return ~(U)(v <= V{});
  }

  template <typename U>
  static NF_INLINE U sign_bit() {
    return U{} + (Bits<A>(1) << (8 * sizeof(A) - 1));
  }

  template <typename V>
  static NF_INLINE V vote(V v, A weight) {
    using U = Vec<Bits<A>, sizeof(V) / sizeof(A)>;
    const U ballot = (U)splat<V>(weight), above = (U)(v > V{}), below = (U)(v < V{});
    return (V)((ballot & above) | ((ballot ^ sign_bit<U>()) & below));
  }

  template <typename V>
  static NF_INLINE V combined(const MergeCall<T>& call, V q, V t) {
    using U = Vec<Bits<A>, sizeof(V) / sizeof(A)>;
    if (kUsual || !call.largest) return q + t;
    const V of_t = (V)((U)t & ~sign_bit<U>()), of_q = (V)((U)q & ~sign_bit<U>());
    return select((U)(of_t > of_q) | (U)(t != t), t, q);
  }

  template <typename V>
  static NF_INLINE V nonzero(V divisor) {
    using U = Vec<Bits<A>, sizeof(V) / sizeof(A)>;
    return divisor + (V)((U)(divisor == V{}) & (U)splat<V>(A(1)));
  }
};

}  // namespace neulig_fast
