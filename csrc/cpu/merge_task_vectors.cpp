// theta = base + lam q, q the combined task vectors of the experts that agree
//                                                                     (merge_task_vectors, CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; base (P,) of their
// type or none; theta (P,) in any of these; numbers (5, N) in the accumulation type: weights,
// scales, lower, upper, lam; places (4, N) int64: lower_cut, upper_cut, thresholds, streams, or
// none. neulig_fast/ops/merge_task_vectors.py says what is computed, _task_vectors.py what a rule
// may ask.
//
// Every step in fp32 (fp64 for fp64 params), in expert order, multiplied then added, and one
// rounding at the end, so the bits depend on nothing but the input. Bytes: (N + 1) * P values read
// and P written, once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/merge_task_vectors_choice.h"
#include "cpu/merge_task_vectors_kernels.h"
#include "cpu/task_vector_tables.h"

namespace neulig_fast {
namespace {

constexpr const char* kOp = "merge_task_vectors";
constexpr int64_t kItemTiles = 16;          // tiles a thread takes at a time
constexpr int64_t kStreamBytes = 32 << 20;  // as in blend.cpp
constexpr int64_t kDrawnRow = Rules<float>::drawn_room(kTile);
enum Divide : int64_t { kNothing = 0, kByWeights = 1, kByCount = 2 };

template <typename T>
struct Merge {
  using A = Acc<T>;

  static constexpr T zeros[kTile] = {};  // where there is no base

  MergeCall<T> whole;  // of all columns; its base may be null
  KernelFn<MergeCall<T>> kernel;
  Rules<A> rules;
  const TileStore& store;
  char* theta;
  int64_t columns;

  void all() const {
    const int64_t tiles = (columns + kTile - 1) / kTile, experts = whole.experts;
    for_each_item((tiles + kItemTiles - 1) / kItemTiles, (experts + 2) * columns, [&](int64_t k) {
      std::vector<uint16_t> drawn(rules.rule & kDraws ? experts * kDrawnRow : 0);
      const int64_t end = std::min((k + 1) * kItemTiles * kTile, columns);
      for (int64_t p = k * kItemTiles * kTile; p < end; p += kTile)
        tile(p, std::min(p + kTile, end), drawn.data());
      if (store.stream) stream_fence();
    });
  }

  void tile(int64_t begin, int64_t end, uint16_t* drawn) const {
    MergeCall<T> call = advanced(whole, begin);
    if (whole.base == nullptr) call.base = zeros;
    if (rules.rule & kDraws) {
      for (int64_t i = 0; i < call.experts; ++i)
        rules.draw_columns(i, begin, end, drawn + i * kDrawnRow);
      call.drawn = drawn + rules.ahead(begin);
      call.drawn_stride = kDrawnRow;
    }
    A lower[kMostExperts], upper[kMostExperts];
    call.lower = lower;
    call.upper = upper;
    for (int64_t from = begin; from < end;) {
      const int64_t to = rules.next_cut(from, end);
      for (int64_t i = 0; i < call.experts; ++i) {
        lower[i] = rules.lower_at(i, from);
        upper[i] = rules.upper_at(i, from);
      }
      write(advanced(call, from - begin), to - from, from);
      from = to;
    }
  }

  // By way of a tile of sums where theta has another type.
  void write(MergeCall<T> call, int64_t count, int64_t from) const {
    if (call.theta != nullptr) return run(call, count);
    alignas(64) A sum[kTile];
    call.sum = sum;
    run(call, count);
    store.write(sum, 0, 0, 0, count, theta + from * store.itemsize);
  }

  // Part of a step up to an aligned theta, whole steps, part of a step.
  void run(MergeCall<T> call, int64_t count) const {
    const int64_t past = reinterpret_cast<uintptr_t>(call.theta) / sizeof(T) % kStep;
    const int64_t head = call.stream && past > 0 ? std::min(kStep - past, count) : 0;
    const int64_t steps = (count - head) / kStep * kStep;
    if (head > 0) part_of_step(call, head);
    call = advanced(call, head);
    call.columns = steps;
    if (steps > 0) kernel(call);
    call = advanced(call, steps);
    if (head + steps < count) part_of_step(call, count - head - steps);
  }

  static MergeCall<T> advanced(MergeCall<T> call, int64_t by) {
    call.x += by;
    if (call.base != nullptr) call.base += by;
    if (call.drawn != nullptr) call.drawn += by;
    if (call.sum != nullptr) call.sum += by;
    if (call.theta != nullptr) call.theta += by;
    return call;
  }

  // Fewer columns than a step: the same kernel on padded copies.
  void part_of_step(MergeCall<T> call, int64_t count) const {
    alignas(64) T x[kMostExperts * kStep];
    alignas(64) T base[kStep] = {};
    alignas(64) T line[kStep];
    alignas(64) A sum[kStep];
    alignas(64) uint16_t drawn[kMostExperts * kStep];
    MergeCall<T> padded = call;
    std::memset(x, 0, call.experts * kStep * sizeof(T));
    std::memset(drawn, 0, call.experts * kStep * sizeof(uint16_t));
    for (int64_t i = 0; i < call.experts; ++i) {
      std::memcpy(x + i * kStep, call.x + i * call.stride, count * sizeof(T));
      if (call.drawn != nullptr)
        std::memcpy(drawn + i * kStep, call.drawn + i * call.drawn_stride,
                    count * sizeof(uint16_t));
    }
    padded.x = x;
    padded.stride = padded.drawn_stride = padded.columns = kStep;
    std::memcpy(base, call.base, count * sizeof(T));
    padded.base = base;
    if (call.drawn != nullptr) padded.drawn = drawn;
    if (call.sum != nullptr) padded.sum = sum;
    padded.theta = line;
    padded.stream = false;
    kernel(padded);
    if (call.sum != nullptr) std::memcpy(call.sum, sum, count * sizeof(A));
    else std::memcpy(call.theta, line, count * sizeof(T));
  }
};

// What all columns are divided by without an election.
template <typename A>
A common_divisor(const A* weights, int64_t experts, int64_t divide) {
  if (divide == kByCount) return A(experts);
  A total = 0;
  for (int64_t i = 0; i < experts && divide == kByWeights; ++i) total += weights[i];
  return divide == kNothing || std::abs(total) < A(1e-8) ? A(1) : total;
}

struct Options {
  int64_t rule, seed, start, elect, zero_sign, divide, combine;
};

template <typename T>
void run(const Tensor& theta, const Tensor& params, const std::optional<Tensor>& base,
         const Tensor& numbers, const std::optional<Tensor>& places, const Options& options,
         const TileStore& store) {
  using A = Acc<T>;
  const int64_t experts = params.size(0);
  const auto* table = static_cast<const A*>(numbers.const_data_ptr());
  const std::vector<A> ones(experts, A(1)), zeros(experts, A(0));
  const bool elects = options.elect != 0, direct = theta.scalar_type() == params.scalar_type();
  MergeCall<T> call = {};
  call.x = static_cast<const T*>(params.const_data_ptr());
  call.stride = params.stride(0);
  if (base) call.base = static_cast<const T*>(base->const_data_ptr());
  call.experts = experts;
  call.weights = table;
  call.scales = options.rule & kScales ? table + experts : ones.data();
  call.lam = table[4 * experts];
  call.divisor = A(1);
  if (elects || (options.divide == kByCount && options.rule != 0)) {
    const A* shares[] = {zeros.data(), table, ones.data()};
    call.shares = shares[options.divide];
  } else {
    call.divisor = common_divisor(table, experts, options.divide);
  }
  call.zero_sign = static_cast<int>(options.zero_sign);
  call.largest = options.combine == 1;
  if (direct) call.theta = static_cast<T*>(theta.mutable_data_ptr());
  call.stream = direct && store.stream;
  const bool draws = options.rule & kDraws;
  const bool usual = direct && !call.largest && call.divisor == A(1) && options.zero_sign == 1 &&
                     (draws ? options.divide == kNothing : elects == (call.shares != nullptr));
  Merge<T>{call,
           choose_kernel<T>(static_cast<Elect>(options.elect), options.rule, usual ? experts : 0),
           rules_of<A>(numbers, places, options.rule, options.seed, options.start),
           store,
           static_cast<char*>(theta.mutable_data_ptr()),
           params.size(1)}
      .all();
}

void check(const Tensor& theta, const Tensor& params, const std::optional<Tensor>& base,
           const Tensor& numbers, const std::optional<Tensor>& places, const Options& options) {
  check_params(kOp, params);
  const int64_t columns = params.size(1);
  check_float(kOp, "out", theta.scalar_type());
  check_exact(kOp, "out", theta, theta.scalar_type(), {columns});
  if (base) check_exact(kOp, "base", *base, params.scalar_type(), {columns});
  check_rule(kOp, params, numbers, places, options.rule, options.start);
  check_within(kOp, "elect", options.elect, 0, 4);
  check_within(kOp, "zero_sign", options.zero_sign, -1, 1);
  check_within(kOp, "divide", options.divide, 0, options.combine == 1 ? 0 : 2);
  check_within(kOp, "combine", options.combine, 0, 1);
}

void merge_task_vectors(Tensor theta, const Tensor& params, std::optional<Tensor> base,
                        const Tensor& numbers, std::optional<Tensor> places, int64_t rule,
                        int64_t seed, int64_t start, int64_t elect, int64_t zero_sign,
                        int64_t divide, int64_t combine) {
  const Options options = {rule, seed, start, elect, zero_sign, divide, combine};
  check(theta, params, base, numbers, places, options);
  if (theta.numel() == 0) return;
  TileStore store;
  visit_dtype(theta.scalar_type(), [&](auto element) {
    constexpr int64_t kSize = sizeof element;
    const bool aligned = reinterpret_cast<uintptr_t>(theta.const_data_ptr()) % kSize == 0;
    const bool stream = aligned && theta.numel() * kSize >= kStreamBytes;
    store = make_tile_store<decltype(element)>(cpu_level(), std::nullopt, stream);
  });
  visit_dtype(params.scalar_type(), [&](auto element) {
    run<decltype(element)>(theta, params, base, numbers, places, options, store);
  });
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("merge_task_vectors", TORCH_BOX(&neulig_fast::merge_task_vectors));
}
