// Magnitudes as integers of the same order, and which of them lie between two bounds
// (magnitude_select, magnitude_histogram). No torch headers.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/dtype.h"
#include "common/vector_math.h"

namespace neulig_fast {

// The bits of |x - base| in the accumulation type: ascending as it does, every NaN above infinity.
template <typename T>
using Key = SignedBits<Acc<T>>;

template <typename K>
constexpr K kInfinityKey = static_cast<K>(sizeof(K) == 4 ? 0x7F800000 : 0x7FF0000000000000);

// Columns of one expert.
template <typename T>
struct Differences {
  const T *x, *base;  // base: null where x itself is meant

  Differences from(int64_t column) const {
    return {x + column, base == nullptr ? nullptr : base + column};
  }

  template <int kLanes, bool kBase>
  NF_INLINE Vec<Key<T>, kLanes> keys(int64_t column) const {
    auto value = load<kLanes>(x + column);
    if constexpr (kBase) value = value - load<kLanes>(base + column);
    return (Vec<Key<T>, kLanes>)value & std::numeric_limits<Key<T>>::max();
  }

  Key<T> key(int64_t column) const {
    return base == nullptr ? keys<1, false>(column)[0] : keys<1, true>(column)[0];
  }
};

// For every set of 8 lanes the numbers of its lanes, in order.
constexpr auto make_lane_lists() {
  std::array<std::array<int32_t, 8>, 256> lists{};
  for (int set = 0; set < 256; ++set)
    for (int lane = 0, count = 0; lane < 8; ++lane)
      if (set >> lane & 1) lists[set][count++] = lane;
  return lists;
}
alignas(32) inline constexpr auto kLaneLists = make_lane_lists();

// Writes the lanes whose mask is set, one after the other, and returns how many; up to kLanes - 1
// entries behind them are overwritten. In assembly, as no vector extension of gcc or clang does it.
template <int kBytes, int kLanes, typename K>
NF_INLINE int64_t store_lanes(K* to, Vec<K, kLanes> keys, Vec<K, kLanes> mask) {
#ifdef NF_HAVE_LEVELS
  if constexpr (sizeof(K) == 4 && kLanes * 4 == kBytes && kBytes == 32) {
    unsigned set;
    asm("vmovmskps %1, %0" : "=r"(set) : "x"(mask));
    const auto list = load_bits<Vec<K, kLanes>>(kLaneLists[set].data());
    Vec<K, kLanes> packed;
    asm("vpermd %1, %2, %0" : "=x"(packed) : "x"(keys), "x"(list));
    std::memcpy(to, &packed, sizeof packed);
    return __builtin_popcount(set);
  }
  if constexpr (sizeof(K) == 4 && kLanes * 4 == kBytes && kBytes == 64) {
    unsigned set;
    Vec<K, kLanes> packed;
    asm("vpmovd2m %2, %%k1\n\t"
        "kmovw %%k1, %1\n\t"
        "vpcompressd %3, %0%{%%k1%}%{z%}"
        : "=&v"(packed), "=&r"(set)
        : "v"(mask), "v"(keys)
        : "k1");
    std::memcpy(to, &packed, sizeof packed);
    return __builtin_popcount(set);
  }
#endif
  int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    to[count] = keys[lane];
    count -= mask[lane];  // of which every bit is set
  }
  return count;
}

// Two keys, and those strictly between them; whether those at them are counted apart.
template <typename K>
struct Bounds {
  K low, high;
  bool ties = false;
};

// No key that is a number lies outside.
template <typename K>
constexpr Bounds<K> kAllKeys = {-1, kInfinityKey<K> + 1};

// How many keys of some columns are NaN, above the upper bound, at it, between, and at the lower.
// Where those at the bounds are not counted apart, the upper one's count as above.
struct Tally {
  int64_t nans = 0, above = 0, at_high = 0, between = 0, at_low = 0;

  void add(const Tally& other) {
    nans += other.nans;
    above += other.above;
    at_high += other.at_high;
    between += other.between;
    at_low += other.at_low;
  }
};

// Counts the keys of some columns, and writes those between the bounds in order.
template <typename T>
struct Sift {
  using K = Key<T>;
  static constexpr int64_t kSlack = 64 / sizeof(K);  // entries that `kept` has beyond `columns`

  Differences<T> row;
  int64_t columns;
  Bounds<K> bounds;
  K* kept;
  Tally* tally;

  template <int kBytes>
  static NF_INLINE void run(const Sift& args) {
    const Sift sift = args;  // a local copy stays in registers: no store can change it
    if (sift.row.base == nullptr) sift.template with_base<kBytes, false>();
    else sift.template with_base<kBytes, true>();
  }

  template <int kBytes, bool kBase>
  NF_INLINE void with_base() const {
    if (bounds.ties) all<kBytes, kBase, true>();
    else all<kBytes, kBase, false>();
  }

  template <int kBytes, bool kBase, bool kTies>
  NF_INLINE void all() const {
    constexpr int kLanes = kBytes / sizeof(K);
    const int64_t whole = columns / kLanes * kLanes;
    K* const to = some<kBytes, kLanes, kBase, kTies>(0, whole, kept);
    some<kBytes, 1, kBase, kTies>(whole, columns, to);
  }

  template <int kBytes, int kLanes, bool kBase, bool kTies>
  NF_INLINE K* some(int64_t begin, int64_t end, K* to) const {
    using V = Vec<K, kLanes>;
    using U = Vec<Bits<Acc<T>>, kLanes>;
    // Shifted so that the keys between the bounds are the least of all: one comparison finds them.
    constexpr Bits<Acc<T>> kLeast = Bits<Acc<T>>{1} << (8 * sizeof(K) - 1);
    const Bits<Acc<T>> shift = kLeast - static_cast<Bits<Acc<T>>>(bounds.low) - 1;
    const Bits<Acc<T>> width = bounds.high > bounds.low ? bounds.high - bounds.low - 1 : 0;
    const V limit = (V)(U{} + (kLeast + width));
    K* const first = to;
    V most = {}, over_high = {}, from_high = {}, from_low = {};  // minus how many
#pragma GCC unroll 2
    for (int64_t p = begin; p < end; p += kLanes) {
      const V keys = row.template keys<kLanes, kBase>(p);
      most = keys > most ? keys : most;
      from_high += (V)(keys > bounds.high - 1);
      if constexpr (kTies) {
        over_high += (V)(keys > bounds.high);
        from_low += (V)(keys > bounds.low - 1);
      }
      const V shifted = (V)((U)keys + shift);
      to += store_lanes<kBytes, kLanes, K>(to, keys, (V)(limit > shifted));
    }
    const int64_t high = total(from_high), between = to - first;
    const int64_t nans =
        total((V)(most > kInfinityKey<K>)) == 0 ? 0 : count_nans<kLanes, kBase>(begin, end);
    const int64_t at_high = kTies ? high - total(over_high) : 0;
    tally->nans += nans;
    tally->above += high - at_high - nans;
    tally->at_high += at_high;
    tally->between += between;
    if constexpr (kTies) tally->at_low += total(from_low) - high - between;
    return to;
  }

  template <int kLanes, bool kBase>
  NF_INLINE int64_t count_nans(int64_t begin, int64_t end) const {
    Vec<K, kLanes> nans = {};
    for (int64_t p = begin; p < end; p += kLanes)
      nans += (Vec<K, kLanes>)(row.template keys<kLanes, kBase>(p) > kInfinityKey<K>);
    return total(nans);
  }

  template <typename V>
  static NF_INLINE int64_t total(V negative) {
    int64_t sum = 0;
    for (size_t lane = 0; lane < sizeof(V) / sizeof(K); ++lane) sum -= negative[lane];
    return sum;
  }
};

}  // namespace neulig_fast
