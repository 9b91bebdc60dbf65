// The CUDA kernels' per-thread code, run on the CPU one thread after the other. test_cuda_on_cpu.py
// compiles this file with the host compiler and -ffp-contract=off, and calls it through ctypes.
#include <type_traits>
#include <vector>

#include "cuda/blend.cu"
#include "cuda/blend_telemetry.cu"
#include "cuda/blend_weight_grad.cu"

using namespace neulig_fast;

namespace {

template <typename T, int kExperts>
void few(const BlendCall& call, int64_t p) {
  if constexpr (kExperts > 1) {
    if (call.experts < kExperts) return few<T, kExperts - 1>(call, p);
  }
  for (; p < call.columns; p += kWideLanes<T>) blend_few<T, kExperts>(call, p);
}

template <typename T, int kLanes>
void many(const BlendCall& call, int64_t p) {
  std::vector<Pack<T, kLanes>> stage(call.experts * 3);
  for (; p < call.columns; p += kLanes) blend_many<T, kLanes>(call, p, stage.data() + 1, 3);
}

template <typename T>
void blend_from(const BlendCall& call, int path, int64_t p) {
  if (path == 0) few<T, 8>(call, p);
  if (path == 1) many<T, kWideLanes<T>>(call, p);
  if (path == 2) many<T, 1>(call, p);
}

template <typename T, int kRows>
void partial_sums(const BlendWeightGradCall& call, bool wide, int64_t slot) {
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot);
  if (piece.begin >= piece.end) return;
  for (int64_t k = 0; k < call.outputs; k += kRows)
    for (int64_t expert = 0; expert < call.experts; expert += kExperts) {
      const Group<T> group = make_group<T, kRows>(call, wide, k, expert);
      Accumulator<T> total[kRows][kExperts] = {};
      for (int thread = 0; thread < 256; ++thread) {
        Accumulator<T> sums[kRows][kExperts] = {};
        add_piece<T, kRows>(group, piece, thread, sums);
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < kExperts; ++i) total[r][i] += sums[r][i];
      }
      for (int r = 0; r < group.rows; ++r)
        for (int i = 0; i < group.experts; ++i)
          static_cast<Accumulator<T>*>(
              call.partials)[((k + r) * call.experts + expert + i) * call.slots + slot] =
              total[r][i];
    }
}

template <typename T>
void weight_grad_all(const BlendWeightGradCall& call, bool wide, int rows) {
  using A = Accumulator<T>;
  for (int64_t slot = 0; slot < call.slots; ++slot)
    rows == 1 ? partial_sums<T, 1>(call, wide, slot) : partial_sums<T, 4>(call, wide, slot);
  for (int64_t segment = 0; segment < call.segments; ++segment)
    for (int64_t entry = 0; entry < call.outputs * call.experts; ++entry) {
      double sum = 0;
      for (int thread = 0; thread < 256; ++thread)
        sum += add_partials<A>(call, segment, entry, thread);
      const int64_t k = entry / call.experts, i = entry % call.experts;
      static_cast<A*>(call.result)[(k * call.segments + segment) * call.experts + i] =
          static_cast<A>(sum);
    }
}

// Writes the partial sums of a slot, as a block of `threads` threads does.
template <typename T, int kExperts>
void telemetry_partials(const BlendTelemetryCall& call, bool wide, int threads, int64_t slot) {
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot);
  if (piece.begin >= piece.end) return;
  const int64_t segment = slot - piece.block / kBlockColumns;
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

template <typename T, int kExperts>
void telemetry_of(const BlendTelemetryCall& call, bool wide, int64_t slot) {
  if constexpr (kExperts > 1) {
    if (call.experts < kExperts) return telemetry_of<T, kExperts - 1>(call, wide, slot);
  }
  telemetry_partials<T, kExperts>(call, wide, kThreads, slot);
}

template <typename T>
void telemetry_all(const BlendTelemetryCall& call, bool wide, bool few) {
  for (int64_t slot = 0; slot < call.slots; ++slot) {
    if (few) telemetry_of<T, kMostExperts>(call, wide, slot);
    else telemetry_partials<T, 0>(call, wide, kManyThreads, slot);
  }
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
  }
}

// Columns first .. of every output, `first` a multiple of 16.
void blend_columns_from(int element, const BlendCall* call, int path, int64_t first) {
  switch (static_cast<Element>(element)) {
    case Element::kFloat: return blend_from<float>(*call, path, first);
    case Element::kDouble: return blend_from<double>(*call, path, first);
    case Element::kBFloat16: return blend_from<__nv_bfloat16>(*call, path, first);
    case Element::kHalf: return blend_from<__half>(*call, path, first);
  }
}

void weight_grad(int element, const BlendWeightGradCall* call, bool wide, int rows) {
  switch (static_cast<Element>(element)) {
    case Element::kFloat: return weight_grad_all<float>(*call, wide, rows);
    case Element::kDouble: return weight_grad_all<double>(*call, wide, rows);
    case Element::kBFloat16: return weight_grad_all<__nv_bfloat16>(*call, wide, rows);
    case Element::kHalf: return weight_grad_all<__half>(*call, wide, rows);
  }
}

int64_t slot_count(int64_t columns, int64_t segments) {
  return blend_weight_grad_slots(columns, segments);
}

int64_t segment_of(const int64_t* bounds, int64_t count, int64_t p) {
  return find_segment(bounds, count, p);
}

Piece piece_of(const int64_t* bounds, int64_t count, int64_t columns, int64_t slot) {
  return find_piece(bounds, count, columns, slot);
}

SlotRange slots_of(const int64_t* bounds, int64_t count, int64_t slots, int64_t segment) {
  return find_slots(bounds, count, slots, segment);
}
}
