// The CUDA kernels' per-thread code, run on the CPU one thread after the other. test_cuda_on_cpu.py
// compiles this file with the host compiler and -ffp-contract=off, and calls it through ctypes.
#include <vector>

#include "cuda/blend.cu"
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
  const Piece piece = find_piece(call.bounds, call.segments, call.columns, slot, kBlockColumns);
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

}  // namespace

extern "C" {

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
  return find_piece(bounds, count, columns, slot, kBlockColumns);
}

SlotRange slots_of(const int64_t* bounds, int64_t count, int64_t slots, int64_t segment) {
  return find_slots(bounds, count, slots, segment, kBlockColumns);
}
}
