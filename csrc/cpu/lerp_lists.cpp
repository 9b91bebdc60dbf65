// theta_t = a_t + w (b_t - a_t), or from |w| >= 1/2 on b_t - (1 - w) (b_t - a_t)   (lerp_lists,
// CPU)
//
// A table of the addresses of two lists of T tensors of one dtype, fp32 | bf16 | fp16 | fp64, and
// of T outputs of that dtype, which may be the tensors of the first list; weight (1,) in the
// accumulation type. In fp32 (fp64 for fp64), multiplied then added, and one rounding at the end,
// to nearest or, of 2-byte types with a seed, stochastically: the word of element o of position r
// in step k is number o of Philox's stream (r, k). Bytes: both lists read once, the outputs written
// once.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <type_traits>

#include "common/list_checks.h"
#include "common/parallel.h"
#include "cpu/bf16_pairs.h"
#include "cpu/list_chunks.h"
#include "cpu/store_tile.h"

namespace neulig_fast {
namespace {

constexpr int64_t kColumns = 2048;  // of a tile, whose sums stay in the first-level cache

// Whole steps of columns: values = origin + slope (b - a), origin one of the two. Values are
// results of type T, or sums that are still to be rounded. A step is read before it is written.
template <typename T, typename Value>
struct LerpCall {
  const T* a;
  const T* b;
  Value* values;
  int64_t columns;  // a multiple of kStep
  Acc<T> slope;
  bool from_end;  // origin is b
};

template <typename T, typename Value>
struct LerpColumns {
  static constexpr bool kPairs = std::is_same_v<Value, BFloat16> && kHasPairs;

  template <int kBytes>
  static NF_INLINE void run(const LerpCall<T, Value>& args) {
    const LerpCall<T, Value> call =
        args;  // a local copy stays in registers: no store can change it
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    using V = Vec<Acc<T>, kLanes>;
    int64_t p = 0;
    if constexpr (kPairs) {
      for (; p + 2 * kLanes <= call.columns; p += 2 * kLanes) {
        V a[2], b[2];
        load_pair<kLanes>(call.a + p, a[0], a[1]);
        load_pair<kLanes>(call.b + p, b[0], b[1]);
        store_pair<kLanes>(call.values + p, moved(call, a[0], b[0]), moved(call, a[1], b[1]));
      }
    }
    for (; p < call.columns; p += kLanes)
      store<kLanes>(call.values + p,
                    moved(call, load<kLanes>(call.a + p), load<kLanes>(call.b + p)));
  }

  template <typename V>
  static NF_INLINE V moved(const LerpCall<T, Value>& call, V a, V b) {
    return (call.from_end ? b : a) + call.slope * (b - a);
  }
};

template <typename T>
struct LerpLists {
  using A = Acc<T>;

  ListTable lists;
  A slope;
  bool from_end;
  int64_t base, step;
  bool random;
  TileStore store;  // of 2-byte types, where random
  KernelFn<LerpCall<T, T>> to_nearest;
  KernelFn<LerpCall<T, A>> to_sums;

  template <typename Value>
  void lerp(KernelFn<LerpCall<T, Value>> kernel, const T* a, const T* b, Value* values,
            int64_t columns) const {
    const int64_t whole = columns / kStep * kStep;
    if (whole > 0) kernel({a, b, values, whole, slope, from_end});
    if (whole == columns) return;
    alignas(64) T rest[2][kStep] = {};
    alignas(64) Value last[kStep];
    std::memcpy(rest[0], a + whole, (columns - whole) * sizeof(T));
    std::memcpy(rest[1], b + whole, (columns - whole) * sizeof(T));
    kernel({rest[0], rest[1], last, kStep, slope, from_end});
    std::memcpy(values + whole, last, (columns - whole) * sizeof(Value));
  }

  void tile(const ListChunk& chunk, int64_t begin, int64_t end) const {
    const int64_t* addresses = lists.addresses + 2 * chunk.tensor;
    const T* a = reinterpret_cast<const T*>(addresses[0]) + begin;
    const T* b = reinterpret_cast<const T*>(addresses[1]) + begin;
    T* theta = reinterpret_cast<T*>(base + lists.others[chunk.tensor]) + begin;
    const int64_t columns = end - begin;
    if (!random) return lerp(to_nearest, a, b, theta, columns);
    alignas(64) A sums[kColumns];
    lerp(to_sums, a, b, sums, columns);
    store.write(sums, step, lists.rows[chunk.tensor], begin, columns,
                reinterpret_cast<char*>(theta));
  }

  void all() const {
    int64_t elements = 0;
    for (int64_t t = 0; t < lists.tensors; ++t) elements += lists.lengths[t];
    for_each_item(lists.chunks, 3 * elements, [&](int64_t item) {
      const ListChunk chunk = chunk_of(lists, item);
      for (int64_t p = chunk.begin; p < chunk.end; p += kColumns)
        tile(chunk, p, std::min(p + kColumns, chunk.end));
    });
  }
};

template <typename T>
void run(const Tensor& weight, const ListTable& lists, int64_t base, std::optional<int64_t> seed,
         int64_t step) {
  const CpuLevel level = cpu_level();
  const Acc<T> w = *static_cast<const Acc<T>*>(weight.const_data_ptr());
  const bool from_end = !(w < Acc<T>(0.5) && w > Acc<T>(-0.5));
  LerpLists<T>{lists,
               from_end ? w - Acc<T>(1) : w,
               from_end,
               base,
               step,
               sizeof(T) == 2 && seed.has_value(),
               make_tile_store<T>(level, seed, false),
               kernel_at<LerpColumns<T, T>, LerpCall<T, T>>(level),
               kernel_at<LerpColumns<T, Acc<T>>, LerpCall<T, Acc<T>>>(level)}
      .all();
}

void lerp_lists(const Tensor& weight, const Tensor& table, const Tensor& outputs, int64_t base,
                int64_t chunk, int64_t chunks, ScalarType dtype, std::optional<int64_t> seed,
                int64_t step) {
  check_list_dtype("lerp_lists", "tensors", dtype);
  check_list_weights("lerp_lists", weight, dtype);
  STD_TORCH_CHECK(weight.numel() == 1, "lerp_lists: weight must be one number, got ",
                  shape_text(weight));
  const ListTable lists = check_lists("lerp_lists", table, outputs, 2, chunk, chunks);
  check_list_values("lerp_lists", lists, -1);
  visit_dtype(dtype,
              [&](auto element) { run<decltype(element)>(weight, lists, base, seed, step); });
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("lerp_lists", TORCH_BOX(&neulig_fast::lerp_lists));
}
