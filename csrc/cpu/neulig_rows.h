// Rows of any width for the kernels of NeuLig's ops: read in whole steps, handled in groups.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "common/cpu_level.h"
#include "cpu/neulig_kernels.h"

namespace neulig_fast {

// Zeros that start at a cache line.
template <typename A>
class Lines {
 public:
  explicit Lines(int64_t count) : lines_((count * sizeof(A) + 63) / 64) {}
  A* data() {
    return reinterpret_cast<A*>(lines_.data());
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;
};

// The distance between rows in scratch memory, an odd number of steps: with powers of two, all
// would compete for a few cache lines.
inline int64_t padded_stride(int64_t columns) {
  return (whole_steps(columns) / kStep | 1) * kStep;
}

// Some of up to `most` rows that lie anywhere. Their last columns, less than a step, are read from
// zero-padded copies.
template <typename T>
class Rows {
 public:
  Rows(int64_t most, int64_t width)
      : whole_(width / kStep * kStep),
        rest_(width - whole_),
        rows_((most + kBlock - 1) / kBlock * kBlock),
        tails_(rows_.size()),
        shifted_(rows_.size()),
        padded_(rows_.size() * kStep) {}

  // From here on these are row(k) for k < count, and beyond, to read in vain, the last again.
  template <typename Row>
  void take(int64_t count, const Row& row) {
    count_ = count;
    for (int64_t k = 0; k < count; ++k) {
      rows_[k] = row(k);
      T* tail = padded_.data() + k * kStep;
      std::memcpy(tail, rows_[k] + whole_, rest_ * sizeof(T));
      tails_[k] = tail;
    }
    std::fill(rows_.begin() + count, rows_.end(), rows_[count - 1]);
    std::fill(tails_.begin() + count, tails_.end(), tails_[count - 1]);
  }

  // Calls body(x, column, columns) for columns [begin, end), whole steps, in pieces of at most
  // `most`; x: where the rows' pieces begin.
  template <typename Body>
  void for_pieces(int64_t begin, int64_t end, int64_t most, const Body& body) {
    for (int64_t p = begin; p < std::min(end, whole_); p += most) {
      for (size_t k = 0; k < rows_.size(); ++k) shifted_[k] = rows_[k] + p;
      body(shifted_.data(), p, std::min({most, end - p, whole_ - p}));
    }
    if (whole_ < end && rest_ > 0) body(tails_.data(), whole_, int64_t{kStep});
  }

  const T* operator[](int64_t k) const {
    return rows_[k];
  }
  int64_t count() const {
    return count_;
  }
  int64_t columns() const {
    return whole_ + (rest_ > 0 ? kStep : 0);
  }

 private:
  int64_t whole_, rest_, count_ = 0;
  std::vector<const T*> rows_, tails_, shifted_;
  Lines<T> padded_;
};

template <typename T>
struct RowKernels {
  std::array<KernelFn<RowDots<T>>, kMaxRows> dots;
  std::array<KernelFn<OuterSums<T>>, kMaxRows> outer;
};

template <typename T, int... kIndex>
RowKernels<T> make_row_kernels(CpuLevel level, std::integer_sequence<int, kIndex...>) {
  return {{kernel_at<Dots<T, kIndex + 1>, RowDots<T>>(level)...},
          {kernel_at<Outer<T, kIndex + 1>, OuterSums<T>>(level)...}};
}

template <typename T>
const RowKernels<T>& row_kernels() {
  static const auto kernels =
      make_row_kernels<T>(cpu_level(), std::make_integer_sequence<int, kMaxRows>{});
  return kernels;
}

// Calls body(i, rows) for `count` rows in as few and as equal groups as kernels take.
template <typename Body>
void for_row_groups(int64_t count, const Body& body) {
  const int64_t groups = (count + kMaxRows - 1) / kMaxRows;
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t begin = k * count / groups;
    body(begin, (k + 1) * count / groups - begin);
  }
}

// lanes (x, count, kStep) = the lanes of <x_s, w_i> for `count` rows of w.
template <typename T>
void row_dots(Rows<T>& x, const Acc<T>* w, int64_t stride, int64_t count, Acc<T>* lanes) {
  constexpr int64_t kColumns = 512;  // so that these of w and of x stay in the first-level cache
  const auto& kernels = row_kernels<T>().dots;
  x.for_pieces(0, x.columns(), kColumns, [&](const T* const* piece, int64_t p, int64_t columns) {
    for_row_groups(count, [&](int64_t i, int64_t rows) {
      kernels[rows - 1]({piece, w + i * stride + p, stride, columns, lanes + i * kStep,
                         count * kStep, x.count(), p == 0});
    });
  });
}

// sums (count, stride) = sum_s c[s, i] x_s over columns [begin, end), added to what is there unless
// `first`; sums begin at column `begin`.
template <typename T>
void outer_sums(Rows<T>& x, const Acc<T>* c, int64_t c_step, int64_t begin, int64_t end,
                Acc<T>* sums, int64_t stride, int64_t count, bool first) {
  const auto& kernels = row_kernels<T>().outer;
  x.for_pieces(begin, end, end, [&](const T* const* piece, int64_t p, int64_t columns) {
    for_row_groups(count, [&](int64_t i, int64_t rows) {
      kernels[rows - 1]({piece, c + i, c_step, x.count(), sums + i * stride + (p - begin), stride,
                         columns, first});
    });
  });
}

}  // namespace neulig_fast
