// sums[s, 0, i] = sum over p in segment s of |d_i[p]|, d_i = params_i - base; sums[s, 1, i] the
// same of the elements that a rule keeps (magnitude_sums, CPU)
//
// params (N, P), any row stride, column stride 1, fp32 | bf16 | fp16 | fp64; base (P,) of their
// type or none; segments (S + 1,) boundaries; numbers, places, rule, seed and start as those of
// merge_task_vectors, of which weights, scales and lam are not read; sums (S, 2, N) contiguous
// fp64.
//
// Differences in the accumulation type, fp32 (fp64 for fp64). In a fixed order: blocks of 4096
// columns counted from the segment's start; in each, 16 lanes (columns modulo 16) in the
// accumulation type; blocks are added lane by lane, then lanes and items of 16 blocks, each in
// order, in fp64. The bits do not depend on threads or instruction set.
//
// Bytes: (N + 1) * P * itemsize.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/segments.h"
#include "cpu/magnitude_sums_kernels.h"
#include "cpu/task_vector_tables.h"

namespace neulig_fast {
namespace {

constexpr const char* kOp = "magnitude_sums";
constexpr int64_t kBlock = 4096;
constexpr int64_t kItem = 16 * kBlock;  // columns a thread takes at a time

template <typename T>
KernelFn<SumCall<T>> choose(int64_t rule) {
  const CpuLevel level = cpu_level();
  const bool bounds = rule & (kLowerBound | kUpperBound), draws = rule & kDraws;
  if (!draws) return kernel_at<MagnitudeSums<T, true, false>, SumCall<T>>(level);
  if (!bounds) return kernel_at<MagnitudeSums<T, false, true>, SumCall<T>>(level);
  return kernel_at<MagnitudeSums<T, true, true>, SumCall<T>>(level);
}

template <typename T>
struct Sums {
  using A = Acc<T>;

  static constexpr T zeros[kBlock] = {};  // where there is no base

  const T *x, *base;
  int64_t stride;
  Rules<A> rules;
  KernelFn<SumCall<T>> kernel;

  // sums (2, N) of an item.
  void run(const Item& item, double* sums) const {
    std::vector<Lanes<double>> totals(2 * rules.experts);
    for (int64_t begin = item.begin; begin < item.end; begin += kBlock)
      for (int64_t i = 0; i < rules.experts; ++i) {
        Lanes<A> before{}, after{};
        add_block(i, begin, std::min(begin + kBlock, item.end), &before, &after);
        for (int lane = 0; lane < kLaneCount; ++lane) {
          totals[i].lane[lane] += before.lane[lane];
          totals[rules.experts + i].lane[lane] += after.lane[lane];
        }
      }
    for (const Lanes<double>& lanes : totals) {
      double sum = 0;
      for (const double value : lanes.lane) sum += value;
      *sums++ = sum;
    }
  }

  void add_block(int64_t i, int64_t begin, int64_t end, Lanes<A>* before, Lanes<A>* after) const {
    uint16_t buffer[Rules<A>::drawn_room(kBlock)];
    SumCall<T> call = {x + i * stride, base == nullptr ? zeros : base + begin, nullptr};
    call.x += begin;
    call.before = before;
    call.after = after;
    if (rules.rule & kDraws) {
      rules.draw_columns(i, begin, end, buffer);
      call.drawn = buffer + rules.ahead(begin);
    }
    for (int64_t from = begin; from < end;) {
      const int64_t to = rules.next_cut(from, end);
      call.lower = rules.lower_at(i, from);
      call.upper = rules.upper_at(i, from);
      add_columns(call, from - begin, to - begin);
      from = to;
    }
  }

  // Columns [from, to) of a block: what ends within a step by way of copies, with zeros beside.
  void add_columns(SumCall<T> call, int64_t from, int64_t to) const {
    const int64_t whole = (from + kLaneCount - 1) / kLaneCount * kLaneCount;
    if (from < whole) part_of_step(call, from, std::min(whole, to));
    if (whole >= to) return;
    const int64_t last = to / kLaneCount * kLaneCount;
    if (whole < last) kernel(at(call, whole, (last - whole) / kLaneCount));
    if (last < to) part_of_step(call, last, to);
  }

  static SumCall<T> at(SumCall<T> call, int64_t column, int64_t steps) {
    call.x += column;
    call.base += column;
    if (call.drawn != nullptr) call.drawn += column;
    call.steps = steps;
    return call;
  }

  void part_of_step(const SumCall<T>& call, int64_t from, int64_t to) const {
    alignas(64) T row[kLaneCount] = {}, origin[kLaneCount] = {};
    alignas(64) uint16_t drawn[kLaneCount] = {};
    const int64_t lane = from % kLaneCount, count = to - from;
    std::memcpy(row + lane, call.x + from, count * sizeof(T));
    std::memcpy(origin + lane, call.base + from, count * sizeof(T));
    SumCall<T> padded = call;
    padded.x = row;
    padded.base = origin;
    padded.steps = 1;
    if (call.drawn != nullptr) {
      std::memcpy(drawn + lane, call.drawn + from, count * sizeof(uint16_t));
      padded.drawn = drawn;
    }
    kernel(padded);
  }
};

template <typename T>
void run(const Tensor& params, const std::optional<Tensor>& base, const Segments& segments,
         const Rules<Acc<T>>& rules, double* sums) {
  const Sums<T> part = {static_cast<const T*>(params.const_data_ptr()),
                        base ? static_cast<const T*>(base->const_data_ptr()) : nullptr,
                        params.stride(0), rules, choose<T>(rules.rule)};
  const std::vector<Item> items = cut_items(segments, kItem);
  const int64_t entries = 2 * rules.experts;
  std::vector<double> parts(items.size() * entries);
  for_each_item(items.size(), entries * params.size(1),
                [&](int64_t i) { part.run(items[i], parts.data() + i * entries); });
  std::fill_n(sums, segments.count * entries, 0.0);
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t e = 0; e < entries; ++e)
      sums[items[i].segment * entries + e] += parts[i * entries + e];
}

void magnitude_sums(Tensor sums, const Tensor& params, std::optional<Tensor> base,
                    std::optional<Tensor> segments, const Tensor& numbers,
                    std::optional<Tensor> places, int64_t rule, int64_t seed, int64_t start) {
  check_params(kOp, params);
  const int64_t experts = params.size(0), columns = params.size(1);
  if (base) check_exact(kOp, "base", *base, params.scalar_type(), {columns});
  check_rule(kOp, params, numbers, places, rule, start);
  const BlendShape shape{1, check_segments(kOp, segments), experts, columns, false, true};
  const int64_t whole[2] = {0, columns};
  const Segments view = segments_view(kOp, segments, whole, shape);
  check_exact(kOp, "sums", sums, ScalarType::Double, {view.count, 2, experts});
  visit_dtype(params.scalar_type(), [&](auto element) {
    using A = Acc<decltype(element)>;
    const Rules<A> rules = rules_of<A>(numbers, places, rule, seed, start);
    run<decltype(element)>(params, base, view, rules,
                           static_cast<double*>(sums.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("magnitude_sums", TORCH_BOX(&neulig_fast::magnitude_sums));
}
