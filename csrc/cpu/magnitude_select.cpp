// The magnitude of which counts[i] elements of |params[i] - base| are the largest, exactly (CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; base (P,) likewise or
// none; counts (N,) int64; differences in fp32 (fp64 for fp64), as are thresholds (N,); cuts (N,)
// int64: one past the last element that counts among those at the threshold.
//
// 1. A sample, at fixed places, says between which two keys the wanted one lies, probably.
// 2. One pass counts the keys above and keeps those strictly between, a few per cent. A key so
//    frequent that it would be more is a bound itself: then those at the bounds are counted too.
// 3. The wanted key is a bound, or found among those kept; or, if the sample misled, in passes over
//    its digits. Counts are exact on every way: the result depends on neither sample nor threads.
// 4. The chunk in which the last tie lies is read again for its place.
//
// Bytes: (N + 1) P itemsize.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "cpu/magnitude_rows.h"

namespace neulig_fast {
namespace {

constexpr int64_t kWhole = 16384;    // up to so many columns all keys are kept
constexpr double kDeviations = 3.5;  // of the wanted key's rank in the sample, to either side

// What a larger sample costs grows with its size, what it saves, keys that are kept for nothing,
// with the square root of its inverse: together they are least at a power of 2/3.
int64_t sample_size(int64_t columns) {
  return static_cast<int64_t>(std::pow(static_cast<double>(columns) / 5, 2.0 / 3));
}

// A place in each of `count` equal parts of [0, columns): no period of the data is that of places.
std::vector<int64_t> sample_places(int64_t count, int64_t columns) {
  std::vector<int64_t> places(count);
  for (int64_t part = 0; part < count; ++part) {
    const int64_t begin = part * columns / count, end = (part + 1) * columns / count;
    uint64_t bits = static_cast<uint64_t>(part) + 0x9E3779B97F4A7C15u;  // splitmix64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    bits ^= bits >> 31;
    places[part] = begin + static_cast<int64_t>(bits % static_cast<uint64_t>(end - begin));
  }
  return places;
}

// The rank-th largest, 1 <= rank <= how many there are; it is known to be among the first `among`.
template <typename V>
V nth_largest(std::vector<V>& keys, int64_t rank, int64_t among) {
  const auto begin = keys.begin();
  std::nth_element(begin, begin + (rank - 1), begin + among, std::greater<V>());
  return keys[rank - 1];
}

// The chunk of an expert: what was counted, and the keys between its bounds unless there were too
// many in all.
template <typename K>
struct Found {
  Tally tally;
  std::vector<K> keys;
};

template <typename K>
struct Answer {
  bool known = false;
  K key = 0;
  int64_t rank = 0;           // which of its ties is the last one that counts, from 1 on
  std::vector<int64_t> ties;  // of every chunk
};

template <typename T>
struct Select {
  using K = Key<T>;

  Magnitudes<T> rows;
  const int64_t* counts;
  Acc<T>* thresholds;
  int64_t* cuts;
  int64_t chunks = rows.chunks();
  std::vector<int64_t> searched{};  // experts of which some elements count and some do not
  std::vector<int64_t> places{};    // of the sample
  std::vector<Bounds<K>> bounds{};  // of each of these
  std::vector<Found<K>> found{};    // (chunks, searched)

  void set(int64_t expert, Acc<T> threshold, int64_t cut) const {
    thresholds[expert] = threshold;
    cuts[expert] = cut;
  }

  void all() {
    cpu_level();  // may throw, which a thread may not
    for (int64_t i = 0; i < rows.experts; ++i) {
      set(i, counts[i] > 0 && rows.columns > 0 ? Acc<T>(-1) : static_cast<Acc<T>>(INFINITY), 0);
      if (counts[i] > 0 && counts[i] < rows.columns) searched.push_back(i);
    }
    const int64_t experts = searched.size(), elements = experts * rows.columns;
    if (experts > 0 && rows.columns > kWhole)
      places = sample_places(sample_size(rows.columns), rows.columns);
    bounds.resize(experts);
    found.resize(experts * chunks);
    for_each_item(experts, elements, [&](int64_t e) { bounds[e] = bracket(searched[e]); });
    const int64_t room = std::max(experts * 2 * kWhole, elements / 4);
    std::atomic<int64_t> kept{0};
    // All experts of a chunk before the next one: they find base in cache.
    for_each_item(experts * chunks, elements, [&](int64_t item) {
      std::vector<K> between;
      between.reserve(kChunk / 16);
      found[item].tally = rows.sift(searched[item % experts], item / experts,
                                    bounds[item % experts], [&](const K* keys, int64_t count) {
                                      if (kept.fetch_add(count, std::memory_order_relaxed) < room)
                                        between.insert(between.end(), keys, keys + count);
                                    });
      found[item].keys.assign(between.begin(), between.end());  // no room besides: fresh pages cost
    });
    std::vector<Answer<K>> answers(experts);
    for_each_item(experts, elements, [&](int64_t e) { answers[e] = answer(e); });
    for (int64_t e = 0; e < experts; ++e)
      if (!answers[e].known) answers[e] = search_digits(e);
    for_each_item(experts, elements, [&](int64_t e) { write(searched[e], answers[e]); });
  }

  // Two keys between which, or at which, the wanted one lies, probably.
  Bounds<K> bracket(int64_t expert) const {
    Bounds<K> range = kAllKeys<K>;
    const int64_t size = places.size();
    std::vector<K> sample(size);
    const Differences<T> row = rows.row(expert);
    for (int64_t j = 0; j < size; ++j) sample[j] = row.key(places[j]);
    sample.erase(
        std::remove_if(sample.begin(), sample.end(), [](K key) { return key > kInfinityKey<K>; }),
        sample.end());
    if (sample.empty()) return range;
    const double share = static_cast<double>(counts[expert]) / rows.columns, rank = share * size;
    const double margin = kDeviations * std::sqrt(rank * (1 - share)) + 1;
    const int64_t numbers = sample.size();
    const int64_t first = std::min(static_cast<int64_t>(std::floor(rank - margin)), numbers);
    const int64_t last = static_cast<int64_t>(std::ceil(rank + margin));
    if (last <= numbers) range.low = nth_largest(sample, last, numbers);
    if (first >= 1) range.high = nth_largest(sample, first, std::min(last, numbers));
    const auto often = [&](K key) {
      return std::count(sample.begin(), sample.end(), key) > margin / 8;
    };
    range.ties = often(range.low) || often(range.high);
    return range;
  }

  Tally total(int64_t e) const {
    Tally sum;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum.add(at(e, chunk).tally);
    return sum;
  }

  const Found<K>& at(int64_t e, int64_t chunk) const {
    return found[chunk * static_cast<int64_t>(searched.size()) + e];
  }

  template <typename Ties>
  Answer<K> with_ties(K key, int64_t rank, const Ties& ties) const {
    Answer<K> answer = {true, key, rank, std::vector<int64_t>(chunks)};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) answer.ties[chunk] = ties(chunk);
    return answer;
  }

  // The wanted key if it lies at or between the bounds; rank 0: all elements count.
  Answer<K> answer(int64_t e) const {
    const Tally sum = total(e);
    int64_t rank = counts[searched[e]];
    if (rank >= rows.columns - sum.nans) return {true};
    rank -= sum.above;
    if (rank <= 0) return {};
    if (rank <= sum.at_high)
      return with_ties(bounds[e].high, rank, [&](int64_t c) { return at(e, c).tally.at_high; });
    rank -= sum.at_high;
    if (rank <= sum.between) return among_kept(e, rank);
    rank -= sum.between;
    if (rank <= sum.at_low)
      return with_ties(bounds[e].low, rank, [&](int64_t c) { return at(e, c).tally.at_low; });
    return {};
  }

  // The rank-th largest of the keys that were kept. Counting them in bins first leaves few for
  // nth_element, which takes many times as long a key.
  Answer<K> among_kept(int64_t e, int64_t rank) const {
    const Bounds<K> range = bounds[e];
    int shift = 0;
    while ((range.high - range.low) >> shift >= kBins) ++shift;
    std::array<int64_t, kBins> bins{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Found<K>& some = at(e, chunk);
      if (static_cast<int64_t>(some.keys.size()) != some.tally.between) return {};
      for (const K key : some.keys) ++bins[(key - range.low) >> shift];
    }
    int64_t bin = kBins - 1;
    for (; rank > bins[bin]; --bin) rank -= bins[bin];
    std::vector<std::pair<K, int64_t>> few;  // with their chunks
    few.reserve(bins[bin]);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (const K key : at(e, chunk).keys)
        if ((key - range.low) >> shift == bin) few.push_back({key, chunk});
    const K key = nth_largest(few, rank, few.size()).first;
    std::vector<int64_t> ties(chunks);
    for (const auto& [other, chunk] : few) {
      rank -= other > key;
      ties[chunk] += other == key;
    }
    return {true, key, rank, std::move(ties)};
  }

  // Digit by digit, a pass over the expert for each, and one more for the ties.
  Answer<K> search_digits(int64_t e) const {
    const int64_t expert = searched[e];
    int64_t rank = counts[expert], prefix = 0;
    for (const Digit digit : digits_of(sizeof(K))) {
      std::vector<int64_t> bins(kBins);
      for_each_item(chunks, rows.columns, [&](int64_t chunk) {
        rows.count_digit(expert, chunk, prefix, digit, bins.data());
      });
      int64_t bin = kBins - 1;
      for (; rank > bins[bin]; --bin) rank -= bins[bin];
      prefix = prefix << digit.width | bin;
    }
    const K key = static_cast<K>(prefix);
    std::vector<int64_t> ties(chunks);
    for_each_item(chunks, rows.columns, [&](int64_t chunk) {
      ties[chunk] = rows.sift(expert, chunk, {key, key, true}, [](const K*, int64_t) {}).at_high;
    });
    return {true, key, rank, std::move(ties)};
  }

  // The place of the last tie that counts, in the chunk that has it.
  void write(int64_t expert, const Answer<K>& answer) const {
    if (answer.rank == 0) return;
    int64_t rank = answer.rank, chunk = 0;
    for (; rank > answer.ties[chunk]; ++chunk) rank -= answer.ties[chunk];
    const Differences<T> row = rows.row(expert);
    int64_t column = chunk * kChunk;
    while (rank > 0) rank -= row.key(column++) == answer.key;
    Acc<T> threshold;
    std::memcpy(&threshold, &answer.key, sizeof threshold);
    set(expert, threshold, column);
  }
};

std::tuple<Tensor, Tensor> magnitude_select(const Tensor& params, const Tensor& counts,
                                            std::optional<Tensor> base) {
  const char* op = "magnitude_select";
  check_magnitudes(op, params, base);
  check_exact(op, "counts", counts, ScalarType::Long, {params.size(0)});
  const auto* wanted = static_cast<const int64_t*>(counts.const_data_ptr());
  const int64_t least = *std::min_element(wanted, wanted + params.size(0));
  STD_TORCH_CHECK(least >= 0, op, ": counts must not be negative, got ", least);
  Tensor thresholds =
      torch::stable::new_empty(params, {params.size(0)}, acc_dtype(params.scalar_type()));
  Tensor cuts = torch::stable::new_empty(params, {params.size(0)}, ScalarType::Long);
  visit_dtype(params.scalar_type(), [&](auto element) {
    using T = decltype(element);
    Select<T>{{params, base},
              wanted,
              static_cast<Acc<T>*>(thresholds.mutable_data_ptr()),
              static_cast<int64_t*>(cuts.mutable_data_ptr())}
        .all();
  });
  return {thresholds, cuts};
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("magnitude_select", TORCH_BOX(&neulig_fast::magnitude_select));
}
