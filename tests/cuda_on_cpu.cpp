// The CUDA kernels' per-thread code, run on the CPU one thread after the other. test_cuda_on_cpu.py
// compiles this file with the host compiler and -ffp-contract=off, and calls it through ctypes.
#include <vector>

#include "cuda/blend.cu"
#include "cuda/blend_telemetry.cu"
#include "cuda/blend_weight_grad.cu"
#include "cuda/offset_gram.cu"

using namespace neulig_fast;

namespace {

template <typename T, int kExperts>
void few(const BlendCall& call, int64_t p) {
  if constexpr (kExperts > 1) {
    if (call.experts < kExperts) return few<T, kExperts - 1>(call, p);
  }
  constexpr int kLanes = kWideLanes<T>, kStep = kLanes * kPacks<T, kExperts>;
  for (; p < call.columns; p += kStep) blend_few<T, kExperts>(call, p, kLanes);
}

template <typename T, int kLanes>
void many(const BlendCall& call, int64_t p) {
  std::vector<Loaded<T, kLanes>> stage(call.experts * 3);
  for (; p < call.columns; p += kLanes) {
    if (call.stochastic) blend_many<T, kLanes, true>(call, p, stage.data() + 1, 3);
    else blend_many<T, kLanes, false>(call, p, stage.data() + 1, 3);
  }
}

template <typename T>
void blend_from(const BlendCall& call, int path, int64_t p) {
  if (path == 0) few<T, 8>(call, p);
  if (path == 1) many<T, kWideLanes<T>>(call, p);
  if (path == 2) many<T, 1>(call, p);
}

// The partial sums of one slot. Threads' sums are added in order instead of by warps.
template <typename T, int kRows, int kExperts, bool kWhole>
void partial_sums(const BlendWeightGradCall& call, bool wide, int64_t slot) {
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot, kPieceColumns);
  if (piece.begin >= piece.end) return;
  for (int64_t index = 0; index < count_groups(call, kRows, kExperts); ++index) {
    const auto group = make_group<T, kRows, kExperts, kWhole>(call, index);
    Accumulator<T> total[kRows][kExperts] = {};
    for (int thread = 0; thread < kPartialThreads<kRows>; ++thread) {
      Accumulator<T> sums[kRows][kExperts] = {};
      if constexpr (kRows > 1) {
        using S = GradientStages<T, kRows, kExperts>;
        std::vector<typename S::Row> stages(kStages * S::kSize);
        S::add_piece(group, piece, wide, thread, stages.data() + thread, sums);
      } else {
        add_piece(group, piece, wide, thread, sums);
      }
      for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < kExperts; ++n) total[r][n] += sums[r][n];
    }
    for (int64_t k = group.k; k < least(group.k + kRows, call.outputs); ++k)
      for (int64_t i = group.i; i < least(group.i + kExperts, call.experts); ++i)
        static_cast<Accumulator<T>*>(call.partials)[(k * call.experts + i) * call.slots + slot] =
            total[k - group.k][i - group.i];
  }
}

template <typename T>
void weight_grad_all(const BlendWeightGradCall& call, bool wide) {
  using A = Accumulator<T>;
  with_group<T>(call, [&](auto rows, auto experts, auto whole) {
    for (int64_t slot = 0; slot < call.slots; ++slot)
      partial_sums<T, rows, experts, whole>(call, wide, slot);
  });
  for (int64_t segment = 0; segment < call.segments; ++segment)
    for (int64_t entry = 0; entry < call.outputs * call.experts; ++entry) {
      double sum = 0;
      for (int thread = 0; thread < kTotalThreads; ++thread)
        sum += add_partials<A>(call, segment, entry, thread);
      const int64_t k = entry / call.experts, i = entry % call.experts;
      static_cast<A*>(call.result)[(k * call.segments + segment) * call.experts + i] =
          static_cast<A>(sum);
    }
}

// What a block of threads writes for one piece; add(piece, thread, sums) is a thread's share.
template <typename D, typename Add>
void gram_block(const OffsetGramCall& call, int64_t slot, int64_t i, int64_t j, int threads,
                const Add& add) {
  using A = typename D::A;
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot, call.width);
  if (piece.begin >= piece.end) return;
  A all[D::kSums] = {};
  for (int thread = 0; thread < threads; ++thread) {
    A sums[D::kSums] = {};
    add(piece, thread, sums);
    for (int n = 0; n < D::kSums; ++n) all[n] += sums[n];
  }
  for (int n = 0; n < D::kSums; ++n) {
    const int64_t total = D::place(n, call.rows, i, j);
    if (total >= 0) static_cast<A*>(call.partials)[total * call.slots + slot] = all[n];
  }
}

template <typename D>
void gram_piece(const OffsetGramCall& call, bool wide, int64_t slot, int64_t i, int64_t j,
                const typename D::A* means = nullptr) {
  gram_block<D>(call, slot, i, j, kThreads, [&](const Piece& piece, int thread, auto& sums) {
    D::make(call, wide, i, j, means, piece.block).add_piece(piece, thread, call.width, sums);
  });
}

template <typename T, int kExperts>
void gram_staged(const OffsetGramCall& call, bool wide, int64_t slot) {
  if constexpr (kExperts > kMostFew<T> + 1) {
    if (call.experts < kExperts) return gram_staged<T, kExperts - 1>(call, wide, slot);
  }
  using S = OffsetStages<T, kExperts>;
  using D = typename S::D;
  const D rows = D::make(call, wide, 0, 0);
  std::vector<typename S::Row> stages(kStages * S::kSize);
  gram_block<D>(call, slot, 0, 0, kStageThreads, [&](const Piece& piece, int thread, auto& sums) {
    S::add_piece(rows, piece, thread, stages.data() + thread, sums);
  });
}

template <typename T, int kExperts>
void gram_few(const OffsetGramCall& call, bool wide, int64_t slot) {
  if constexpr (kExperts > 2) {
    if (call.experts < kExperts) return gram_few<T, kExperts - 1>(call, wide, slot);
  }
  gram_piece<Few<T, kExperts>>(call, wide, slot, 0, 0);
}

template <typename T>
void gram_slot(const OffsetGramCall& call, bool wide, int64_t slot) {
  const bool grouped = call.rows == call.experts;
  if (!grouped && call.experts <= kMostFew<T>)
    return gram_few<T, kMostFew<T>>(call, wide, slot);
  if constexpr (sizeof(T) < 8) {
    if (!grouped) return gram_staged<T, kMostStaged>(call, wide, slot);
  }
  std::vector<Accumulator<T>> means(kGroupedWidth);
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot, call.width);
  for (int thread = 0; thread < kThreads; ++thread)
    add_means<T>(call, piece, thread, means.data());
  for (int64_t i = 0; i < call.rows; i += kGroupRows) {
    gram_piece<OneGroup<T>>(call, wide, slot, i, i, means.data());
    for (int64_t j = i + kGroupRows; j < call.rows; j += kGroupRows)
      gram_piece<TwoGroups<T>>(call, wide, slot, i, j, means.data());
  }
}

template <typename T>
void gram_all(const OffsetGramCall& call, bool wide) {
  const int64_t count = count_totals(call.rows);
  for (int64_t slot = 0; slot < call.slots; ++slot) gram_slot<T>(call, wide, slot);
  for (int64_t segment = 0; segment < call.segments; ++segment) {
    for (int64_t total = 0; total < count; ++total) {
      double sum = 0;
      for (int thread = 0; thread < kThreads; ++thread)
        sum += add_slots<Accumulator<T>>(call, segment, total, thread);
      call.totals[segment * count + total] = sum;
    }
    for (int thread = 0; thread < kThreads; ++thread) complete(call, segment, thread);
  }
}

// Writes the partial sums of a slot, as a block of `threads` threads does.
template <typename T, int kExperts>
void telemetry_partials(const BlendTelemetryCall& call, bool wide, int threads, int64_t slot) {
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot, kTelemetryColumns);
  if (piece.begin >= piece.end) return;
  const int64_t segment = slot - piece.block / kTelemetryColumns;
  for (int64_t first = 0; first == 0 || first < call.outputs; first += kMostOutputs) {
    const int outputs = static_cast<int>(least(kMostOutputs, call.outputs - first));
    std::vector<double> squares((call.experts + outputs) * threads);
    std::vector<uint32_t> counts((1 + outputs) * threads);
    for (int thread = 0; thread < threads; ++thread)
      tally_piece<T, kExperts>(call, piece, segment, wide, thread, threads, first, outputs,
                               {squares.data() + thread, counts.data() + thread, threads});
    const auto add = [&](const auto& rows, int64_t row) {
      std::decay_t<decltype(rows[0])> sum = 0;
      for (int thread = 0; thread < threads; ++thread) sum += rows[row * threads + thread];
      return sum;
    };
    for (int64_t row = first == 0 ? 0 : call.experts; row < call.experts + outputs; ++row)
      call.square_partials[(row < call.experts ? row : first + row) * call.slots + slot] =
          add(squares, row);
    if (first == 0) call.count_partials[slot] = add(counts, 0);
    for (int64_t row = 1; row < 1 + outputs; ++row) {
      const uint32_t sum = add(counts, row);
      call.count_partials[(first + row) * call.slots + slot] = sum & 0xFFFFu;
      call.count_partials[(call.outputs + first + row) * call.slots + slot] = sum >> 16;
    }
  }
}

template <typename T>
void telemetry_all(const BlendTelemetryCall& call, bool wide, bool few) {
  const auto all_partials = [&](auto held) {
    for (int64_t slot = 0; slot < call.slots; ++slot)
      telemetry_partials<T, held>(call, wide, held > 0 ? kThreads : kManyThreads, slot);
  };
  if (few) with_held<T>(call, all_partials);
  else all_partials(std::integral_constant<int, 0>());
  const int64_t squares = call.experts + call.outputs, counts = 1 + 2 * call.outputs;
  for (int64_t segment = 0; segment < call.segments; ++segment)
    for (int64_t row = 0; row < squares + counts; ++row) {
      double square = 0;
      int64_t count = 0;
      for (int thread = 0; thread < kThreads; ++thread) {
        if (row < squares)
          square += add_row<double>(call, call.square_partials, row, segment, thread);
        else count += add_row<int64_t>(call, call.count_partials, row - squares, segment, thread);
      }
      if (row < squares) *place_of_squares(call, row, segment) = square;
      else *place_of_count(call, row - squares, segment) = count;
    }
}

}  // namespace

extern "C" {

void telemetry(int element, const BlendTelemetryCall* call, bool wide, bool few) {
  switch (static_cast<Element>(element)) {
    case Element::kFloat: return telemetry_all<float>(*call, wide, few);
    case Element::kDouble: return telemetry_all<double>(*call, wide, few);
    case Element::kBFloat16: return telemetry_all<__nv_bfloat16>(*call, wide, few);
    case Element::kHalf: return telemetry_all<__half>(*call, wide, few);
    default: return;  // no fp8
  }
}

// Columns first .. of every output, `first` a multiple of 16: packs a thread owns are side by side
// here, on a GPU apart.
void blend_columns_from(int element, const BlendCall* call, int path, int64_t first) {
  switch (static_cast<Element>(element)) {
    case Element::kFloat: return blend_from<float>(*call, path, first);
    case Element::kDouble: return blend_from<double>(*call, path, first);
    case Element::kBFloat16: return blend_from<__nv_bfloat16>(*call, path, first);
    case Element::kHalf: return blend_from<__half>(*call, path, first);
    case Element::kFloat8E4M3: return blend_from<Float8E4M3>(*call, path, first);
    case Element::kFloat8E5M2: return blend_from<Float8E5M2>(*call, path, first);
  }
}

void weight_grad(int element, const BlendWeightGradCall* call, bool wide) {
  switch (static_cast<Element>(element)) {
    case Element::kFloat: return weight_grad_all<float>(*call, wide);
    case Element::kDouble: return weight_grad_all<double>(*call, wide);
    case Element::kBFloat16: return weight_grad_all<__nv_bfloat16>(*call, wide);
    case Element::kHalf: return weight_grad_all<__half>(*call, wide);
    default: return;  // no fp8
  }
}

void offset_gram(int element, const OffsetGramCall* call, bool wide) {
  switch (static_cast<Element>(element)) {
    case Element::kFloat: return gram_all<float>(*call, wide);
    case Element::kDouble: return gram_all<double>(*call, wide);
    case Element::kBFloat16: return gram_all<__nv_bfloat16>(*call, wide);
    case Element::kHalf: return gram_all<__half>(*call, wide);
    default: return;  // no fp8
  }
}

void gram_last_slot(const OffsetGramCall* call, bool wide) {
  gram_few<__nv_bfloat16, 2>(*call, wide, call->slots - 1);
}

int64_t gram_rows(int64_t experts, int element) {
  return offset_gram_rows(experts, static_cast<Element>(element));
}

int64_t gram_width(int64_t columns, int64_t experts, int element) {
  return offset_gram_width(columns, experts, static_cast<Element>(element));
}

int64_t gram_slots(int64_t columns, int64_t segments, int64_t width) {
  return offset_gram_slots(columns, segments, width);
}

int64_t weight_grad_slots(int64_t columns, int64_t segments) {
  return blend_weight_grad_slots(columns, segments);
}

int64_t slot_count(int64_t columns, int64_t segments, int64_t width) {
  return count_slots(columns, segments, width);
}

int64_t segment_of(const int64_t* bounds, int64_t count, int64_t p) {
  return find_segment(bounds, count, p);
}

Piece piece_of(const int64_t* bounds, int64_t count, int64_t columns, int64_t slot, int64_t width) {
  return find_piece(bounds, count, columns, slot, width);
}

SlotRange slots_of(const int64_t* bounds, int64_t count, int64_t slots, int64_t segment,
                   int64_t width) {
  return find_slots(bounds, count, slots, segment, width);
}
}
