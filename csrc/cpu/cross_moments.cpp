// cross = sum_t (x_t - a)(y_t - b)', and sums of x - a, (x - a)^2, y - b and (y - b)^2
//                                                                          (cross_moments, CPU)
//
// x (B, T, X) and y (B, T, Y), t over all B T rows, any strides, both fp32 | bf16 | fp16 | fp64;
// shifts a (X,) and b (Y,) or none, contiguous in the accumulation type, fp32 (fp64 for fp64), as
// are the results.
// Chunks of kChunkBlocks blocks of rows are taken from memory once, shifted, into blocks of
// cross_moments_kernels.h; then tiles of cross are multiplied from these, each by one thread.
//
// Sums in a fixed order, whatever the threads: a block's products in the order of its rows, blocks
// of a chunk, then chunks, in the accumulation type; a block's columns so too, blocks in fp64.
//
// Bytes: B T (X + Y) itemsize. 2 B T X Y flops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/cross_moments_kernels.h"

namespace neulig_fast {
namespace {

constexpr int64_t kChunkBlocks = 8;
constexpr int64_t kBlockSize = kBlockRows * kUnits;
// Groups of units of a tile: the blocks of x and the sums stay in a second-level cache.
constexpr int64_t kTileX = 4, kTileY = 8;

int64_t groups_of(int64_t units) {
  return (units + kUnits - 1) / kUnits;
}

// One of the two matrices, and what a chunk of its rows is made into.
template <typename T>
struct Factor {
  using A = Acc<T>;

  const T* data;
  int64_t rows, units;  // T, X
  int64_t sample_stride, row_stride, unit_stride;
  int64_t groups;  // of kUnits units; what follows is of whole groups
  std::vector<A> shift;
  std::vector<double> sums, squares;
  Tensor memory;
  A* blocks;

  Factor(const Tensor& x, const std::optional<Tensor>& given)
      : data(static_cast<const T*>(x.const_data_ptr())),
        rows(x.size(1)),
        units(x.size(2)),
        sample_stride(x.stride(0)),
        row_stride(x.stride(1)),
        unit_stride(x.stride(2)),
        groups(groups_of(units)),
        shift(groups * kUnits),
        sums(groups * kUnits),
        squares(groups * kUnits),
        memory(torch::stable::new_empty(
            x, {std::min(kChunkBlocks, blocks_of(x)) * groups * kBlockSize},
            acc_dtype(x.scalar_type()))),
        blocks(static_cast<A*>(memory.mutable_data_ptr())) {
    if (given) std::copy_n(static_cast<const A*>(given->const_data_ptr()), units, shift.begin());
  }

  static int64_t blocks_of(const Tensor& x) {
    return (x.size(0) * x.size(1) + kBlockRows - 1) / kBlockRows;
  }

  A* block(int64_t index, int64_t group) const {
    return blocks + (index * groups + group) * kBlockSize;
  }

  // Rows [begin, end) of one group of units, block by block.
  void take(int64_t begin, int64_t end, int64_t group) {
    const int64_t unit = group * kUnits;
    for (int64_t first = begin; first < end; first += kBlockRows) {
      const int64_t count = std::min(kBlockRows, end - first);
      A* to = block((first - begin) / kBlockRows, group);
      for (int64_t done = 0; done < count;) {
        const int64_t sample = (first + done) / rows, row = (first + done) % rows;
        const int64_t run = std::min(count - done, rows - row);
        const T* from = data + sample * sample_stride + row * row_stride + unit * unit_stride;
        run_kernel<TakeRows<T>>(TakeRows<T>{from, row_stride, unit_stride, run,
                                            std::min(kUnits, units - unit), to, done, count});
        done += run;
      }
      run_kernel<ShiftBlock<A>>(
          ShiftBlock<A>{to, count, &shift[unit], &sums[unit], &squares[unit]});
    }
  }
};

template <typename T>
struct CrossMoments {
  using A = Acc<T>;

  Factor<T> x, y;
  int64_t rows;  // of all samples
  A* cross;

  void all() {
    cpu_level();  // may throw, which a thread may not
    for (int64_t begin = 0; begin < rows; begin += kChunkBlocks * kBlockRows) {
      const int64_t end = std::min(begin + kChunkBlocks * kBlockRows, rows);
      const int64_t values = (end - begin) * (x.units + y.units);
      for_each_item(x.groups + y.groups, values, [&](int64_t item) {
        if (item < x.groups) x.take(begin, end, item);
        else y.take(begin, end, item - x.groups);
      });
      const int64_t tiles_x = (x.groups + kTileX - 1) / kTileX;
      const int64_t tiles_y = (y.groups + kTileY - 1) / kTileY;
      const int64_t work = (end - begin) * x.units * y.units / 16;
      for_each_item(tiles_x * tiles_y, work, [&](int64_t item) {
        multiply(end - begin, item % tiles_x * kTileX, item / tiles_x * kTileY);
      });
    }
  }

  // The share of a chunk's rows in the tile of cross from these groups of x and y on.
  void multiply(int64_t count, int64_t from_x, int64_t from_y) const {
    alignas(64) A sums[kTileY][kTileX][kUnits * kUnits] = {};
    const int64_t groups_x = std::min(kTileX, x.groups - from_x);
    const int64_t groups_y = std::min(kTileY, y.groups - from_y);
    for (int64_t first = 0; first < count; first += kBlockRows)
      for (int64_t j = 0; j < groups_y; ++j)
        for (int64_t i = 0; i < groups_x; ++i)
          run_kernel<MultiplyBlocks<A>>(MultiplyBlocks<A>{
              x.block(first / kBlockRows, from_x + i), y.block(first / kBlockRows, from_y + j),
              std::min(kBlockRows, count - first), sums[j][i]});
    for (int64_t j = 0; j < groups_y; ++j)
      for (int64_t i = 0; i < groups_x; ++i) add(sums[j][i], from_x + i, from_y + j);
  }

  void add(const A* sums, int64_t group_x, int64_t group_y) const {
    const int64_t row = group_x * kUnits, column = group_y * kUnits;
    const int64_t height = std::min(kUnits, x.units - row);
    const int64_t width = std::min(kUnits, y.units - column);
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j)
        cross[(row + i) * y.units + column + j] += sums[i * kUnits + j];
  }
};

Tensor rounded(const Tensor& cross, const std::vector<double>& totals, int64_t units) {
  Tensor out = torch::stable::new_empty(cross, {units});
  visit_dtype(cross.scalar_type(), [&](auto element) {
    using A = Acc<decltype(element)>;
    std::copy_n(totals.begin(), units, static_cast<A*>(out.mutable_data_ptr()));
  });
  return out;
}

void check(const Tensor& x, const Tensor& y, const std::optional<Tensor>& x_shift,
           const std::optional<Tensor>& y_shift) {
  const char* op = "cross_moments";
  check_float(op, "x", x.scalar_type());
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) && x.size(1) == y.size(1),
                  op, ": x must be (B, T, X) and y (B, T, Y), got ", shape_text(x), " and ",
                  shape_text(y));
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), op, ": y must be ", toString(x.scalar_type()),
                  " like x, got ", toString(y.scalar_type()));
  const ScalarType acc = acc_dtype(x.scalar_type());
  if (x_shift) check_exact(op, "x_shift", *x_shift, acc, {x.size(2)});
  if (y_shift) check_exact(op, "y_shift", *y_shift, acc, {y.size(2)});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_moments(const Tensor& x, const Tensor& y,
                                                                 std::optional<Tensor> x_shift,
                                                                 std::optional<Tensor> y_shift) {
  check(x, y, x_shift, y_shift);
  Tensor cross = torch::stable::new_zeros(x, {x.size(2), y.size(2)}, acc_dtype(x.scalar_type()));
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>> results;
  visit_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    CrossMoments<T> call{{x, x_shift},
                         {y, y_shift},
                         x.size(0) * x.size(1),
                         static_cast<Acc<T>*>(cross.mutable_data_ptr())};
    call.all();
    results.emplace(cross, rounded(cross, call.x.sums, call.x.units),
                    rounded(cross, call.x.squares, call.x.units),
                    rounded(cross, call.y.sums, call.y.units),
                    rounded(cross, call.y.squares, call.y.units));
  });
  return *results;
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("cross_moments", TORCH_BOX(&neulig_fast::cross_moments));
}
