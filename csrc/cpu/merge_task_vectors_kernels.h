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
#include "cpu/store_tile.h"

namespace neulig_fast {

constexpr int64_t kMostExperts = 64;

enum class Elect { kNone, kWeightedSum, kSum, kWeightedCount, kCount };
enum Rule : int64_t { kLowerBound = 1, kUpperBound = 2, kDraws = 4, kScales = 8 };
// Which elements are kept: all, those with |d| > lower, or all that a rule can ask, with scales.
enum class Keep { kAll, kLower, kRule };

// Whole steps of columns. Arrays have a number for every expert.
template <typename T>
struct MergeCall {
  using A = Acc<T>;

  const T* x;      // first expert, first column
  int64_t stride;  // elements from one expert to the next
  const T* base;   // null: x are task vectors
  int64_t experts;
  const A *weights, *scales;
  const A *lower, *upper;  // dropped: |d| <= lower and |d| > upper; NaN drops nothing
  const uint8_t* drawn;    // 0xFF where a draw keeps an expert's column, else 0; null: no draws
  int64_t drawn_stride;    // from one expert to the next
  // What an agreeing expert adds to the divisor, zeros for none. Without an election null for
  // none, and what all columns are divided by.
  const A* shares;
  A divisor;
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

// All bits where a draw keeps a column.
template <typename A, int... kLane>
NF_INLINE Vec<Bits<A>, sizeof...(kLane)> load_drawn(const uint8_t* p,
                                                    std::integer_sequence<int, kLane...>) {
  using S = Vec<SignedBits<A>, sizeof...(kLane)>;
  const auto v = load_bits<Vec<int8_t, sizeof...(kLane)>>(p);
  return (Vec<Bits<A>, sizeof...(kLane)>)S{SignedBits<A>{v[kLane]}...};
}

// kExperts: their number where each one's loads shall be instructions of their own, else 0.
template <typename T, Elect kElect, Keep kKeep, int kExperts>
struct MergeTaskVectors {
  using A = Acc<T>;
  static constexpr int64_t kRoom = kExperts > 0 ? kExperts : kMostExperts;
  static constexpr bool kWeighted =
      kElect == Elect::kWeightedSum || kElect == Elect::kWeightedCount;
  static constexpr bool kVotes = kElect == Elect::kCount || kElect == Elect::kWeightedCount;
  static constexpr bool kElects = kElect != Elect::kNone, kDrops = kKeep != Keep::kAll;

  // Copies that stay in registers, or next to them: no store can change them.
  struct Numbers {
    A weights[kRoom], scales[kRoom], lower[kRoom], upper[kRoom], shares[kRoom];
  };

  // What becomes of a register of columns.
  template <typename V>
  struct Columns {
    V base, q, divisor, total;
    V on[kElects ? kRoom : 1];  // of every expert, what the election goes by
  };

  template <int kBytes>
  static NF_INLINE void run(const MergeCall<T>& args) {
    const MergeCall<T> call = args;
    Numbers numbers;
    std::copy_n(call.weights, call.experts, numbers.weights);
    if constexpr (kKeep == Keep::kRule) std::copy_n(call.scales, call.experts, numbers.scales);
    if constexpr (kDrops) std::copy_n(call.lower, call.experts, numbers.lower);
    if constexpr (kKeep == Keep::kRule) std::copy_n(call.upper, call.experts, numbers.upper);
    if (call.shares != nullptr) std::copy_n(call.shares, call.experts, numbers.shares);
    constexpr int kLanes = kBytes / sizeof(A);
    for (int64_t p = 0; p < call.columns; p += kStep) {
      alignas(64) T line[kStep];
      T* theta = call.stream ? line : call.theta + p;
      for (int lane = 0; lane < kStep; lane += kLanes) {
        const auto result = merged<kLanes>(call, numbers, p + lane);
        if (call.sum != nullptr) store<kLanes>(call.sum + p + lane, result);
        else store<kLanes>(theta + lane, result);
      }
      if (call.stream) stream_copy<sizeof line>(call.theta + p, line);
    }
  }

  template <int kLanes>
  static NF_INLINE Vec<A, kLanes> merged(const MergeCall<T>& call, const Numbers& numbers,
                                         int64_t p) {
    using V = Vec<A, kLanes>;
    Columns<V> c;
    c.base = call.base == nullptr ? V{} : load<kLanes>(call.base + p);
    c.q = c.divisor = c.total = V{};
    if constexpr (kExperts > 0) {
#pragma GCC unroll 8
      for (int i = 0; i < kExperts; ++i) read<kLanes>(call, numbers, i, p, c);
    } else {
      for (int64_t i = 0; i < call.experts; ++i) read<kLanes>(call, numbers, i, p, c);
    }
    if constexpr (kElects) elect<kLanes>(call, numbers, c);
    if (kElects || (kDrops && call.shares != nullptr)) c.q = c.q / nonzero(c.divisor);
    else if (call.divisor != A(1)) c.q = c.q / call.divisor;
    const V theta = c.q * call.lam;
    return call.base == nullptr ? theta : c.base + theta;
  }

  // Expert i: its term, or what an election needs of it.
  template <int kLanes, typename V>
  static NF_INLINE void read(const MergeCall<T>& call, const Numbers& numbers, int64_t i, int64_t p,
                             Columns<V>& c) {
    V v = load<kLanes>(call.x + i * call.stride + p) - c.base;
    const auto dropped = drops<kLanes>(call, numbers, i, p, v);
    if constexpr (kKeep == Keep::kRule) v = v * numbers.scales[i];
    const V t = v * numbers.weights[i];
    if constexpr (!kElects) {
      c.q = combined(call.largest, c.q, without(t, dropped));
      if (kDrops && call.shares != nullptr)
        c.divisor = c.divisor + without(splat<V>(numbers.shares[i]), dropped);
    } else {
      c.on[i] = without(kWeighted ? t : v, dropped);
      if constexpr (kVotes)
        c.total = c.total + vote(without(v, dropped), kWeighted ? numbers.weights[i] : A(1));
      else c.total = c.total + c.on[i];
    }
  }

  template <int kLanes, typename V>
  static NF_INLINE Vec<Bits<A>, kLanes> drops(const MergeCall<T>& call, const Numbers& numbers,
                                              int64_t i, int64_t p, V d) {
    using U = Vec<Bits<A>, kLanes>;
    U dropped = {};
    if constexpr (kDrops) {
      const V magnitude = (V)((U)d & ~sign_bit<U>());
      dropped = (U)(magnitude <= numbers.lower[i]);
      if constexpr (kKeep == Keep::kRule) {
        dropped |= (U)(magnitude > numbers.upper[i]);
        if (call.drawn != nullptr)
          dropped |= ~load_drawn<A>(call.drawn + i * call.drawn_stride + p,
                                    std::make_integer_sequence<int, kLanes>());
      }
    }
    return dropped;
  }

  // The terms of the experts that agree with the sign of the total, and their divisor.
  template <int kLanes, typename V>
  static NF_INLINE void elect(const MergeCall<T>& call, const Numbers& numbers, Columns<V>& c) {
    using U = Vec<Bits<A>, kLanes>;
    // Comparisons with NaN are false.
    const U negative = call.zero_sign < 0 ? ~(U)(c.total > V{}) : (U)(c.total < V{});
    const U turn = negative & sign_bit<U>();
    if constexpr (kExperts > 0) {
#pragma GCC unroll 8
      for (int i = 0; i < kExperts; ++i) take(call, numbers, i, turn, c);
    } else {
      for (int64_t i = 0; i < call.experts; ++i) take(call, numbers, i, turn, c);
    }
  }

  // With the sign bits turned, whoever agrees is positive.
  template <typename U, typename V>
  static NF_INLINE void take(const MergeCall<T>& call, const Numbers& numbers, int64_t i, U turn,
                             Columns<V>& c) {
    U opposed = (U)((V)((U)c.on[i] ^ turn) <= V{});
    if (call.zero_sign == 0) opposed |= (U)(c.total == V{}) & (U)(c.on[i] == c.on[i]);
    const V t = kWeighted ? c.on[i] : c.on[i] * numbers.weights[i];
    c.q = combined(call.largest, c.q, without(t, opposed));
    c.divisor = c.divisor + without(splat<V>(numbers.shares[i]), opposed);
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
  static NF_INLINE V combined(bool largest, V q, V t) {
    using U = Vec<Bits<A>, sizeof(V) / sizeof(A)>;
    if (!largest) return q + t;
    const V of_t = (V)((U)t & ~sign_bit<U>()), of_q = (V)((U)q & ~sign_bit<U>());
    return select((U)(of_t > of_q) | (U)(t != t), t, q);
  }

  template <typename V>
  static NF_INLINE V nonzero(V divisor) {
    using U = Vec<Bits<A>, sizeof(V) / sizeof(A)>;
    return divisor + (V)((U)(divisor == V{}) & (U)splat<V>(A(1)));
  }
};

// Up to how many experts have kernels of their own: task arithmetic, which waits for memory, and
// TIES, whose terms then stay in registers.
constexpr int own_kernels(Elect elect, Keep keep) {
  if (elect == Elect::kNone && keep == Keep::kAll) return 8;
  return elect == Elect::kWeightedSum && keep == Keep::kLower ? 5 : 0;
}

template <typename T, Elect kElect, Keep kKeep, int... kIndex>
KernelFn<MergeCall<T>> choose_by_experts(int64_t experts, std::integer_sequence<int, kIndex...>) {
  const CpuLevel level = cpu_level();
  KernelFn<MergeCall<T>> kernel =
      kernel_at<MergeTaskVectors<T, kElect, kKeep, 0>, MergeCall<T>>(level);
  [[maybe_unused]] const auto consider = [&](int64_t own, KernelFn<MergeCall<T>> candidate) {
    if (own == experts) kernel = candidate;
  };
  (consider(kIndex + 1,
            kernel_at<MergeTaskVectors<T, kElect, kKeep, kIndex + 1>, MergeCall<T>>(level)),
   ...);
  return kernel;
}

template <typename T, Elect kElect>
KernelFn<MergeCall<T>> choose_by_keep(int64_t rule, int64_t experts) {
  const auto of = [&](auto keep) {
    constexpr Keep kKeep = decltype(keep)::value;
    return choose_by_experts<T, kElect, kKeep>(
        experts, std::make_integer_sequence<int, own_kernels(kElect, kKeep)>());
  };
  if (rule == 0) return of(std::integral_constant<Keep, Keep::kAll>());
  if (rule == kLowerBound) return of(std::integral_constant<Keep, Keep::kLower>());
  return of(std::integral_constant<Keep, Keep::kRule>());
}

template <typename T>
KernelFn<MergeCall<T>> choose_kernel(Elect elect, int64_t rule, int64_t experts) {
  switch (elect) {
    case Elect::kNone: return choose_by_keep<T, Elect::kNone>(rule, experts);
    case Elect::kWeightedSum: return choose_by_keep<T, Elect::kWeightedSum>(rule, experts);
    case Elect::kSum: return choose_by_keep<T, Elect::kSum>(rule, experts);
    case Elect::kWeightedCount: return choose_by_keep<T, Elect::kWeightedCount>(rule, experts);
    default: return choose_by_keep<T, Elect::kCount>(rule, experts);
  }
}

}  // namespace neulig_fast
