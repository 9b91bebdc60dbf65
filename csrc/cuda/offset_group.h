// What a thread of offset_gram.cu computes: offsets from the mean, and sums of their products.
#pragma once

#include "common/offsets.h"
#include "cuda/offset_gram.h"
#include "cuda/pieces.h"

namespace neulig_fast {

// Rows (common/offsets.h) whose offsets a thread multiplies: kRows rows from `a` on among
// themselves, and their sums (kOthers = 0), or with kOthers rows from `b` on. kIsAll: these are all
// experts but number 0, which has no row; their mean is formed on the way. Otherwise it is given,
// and expert 0 has a row, one of those that are missing and read as expert 0.
template <typename T, int kRowCount, int kOtherCount, int kLaneCount, int kPackCount, bool kIsAll>
struct Offsets {
  static constexpr int kRows = kRowCount, kOthers = kOtherCount, kLanes = kLaneCount;
  static constexpr int kPacks = kPackCount;  // of each row in flight at once
  static constexpr bool kAll = kIsAll;
  static constexpr int kSums = kOthers > 0 ? kRows * kOthers : kRows * (kRows + 3) / 2;
  using A = Accumulator<T>;
  using Row = Pack<T, kLanes>;

  const T* first;
  const T* a;
  const T* b;
  int64_t stride;
  int rows, others;  // those that are not missing
  bool wide;         // packs are aligned
  A share;           // 1 / N
  const A* means;    // of the differences, by column of a piece's block; not read if kAll
  int64_t block;

  NF_DEVICE A mean_at(int64_t p) const {
    if constexpr (kAll) return 0;
    else return means[p - block];
  }

  // Offsets of the first row of a group and on, over one column.
  template <int kCount, typename Column>
  NF_DEVICE void subtract(A first, A mean, const Column& column, A (&d)[kCount]) const {
    NF_UNROLL
    for (int i = 0; i < kCount; ++i) d[i] = widen(column(i)) - first;
    if constexpr (kAll) {
      A total = d[0];
      NF_UNROLL
      for (int i = 1; i < kCount; ++i) total += d[i];
      NF_UNROLL
      for (int i = 0; i < kCount; ++i) d[i] = multiply_add(total, -share, d[i]);
    } else {
      NF_UNROLL
      for (int i = 0; i < kCount; ++i) d[i] -= mean;
    }
  }

  static NF_DEVICE void multiply(const A (&d)[kRows], const A (&e)[kOthers + 1], A (&sums)[kSums]) {
    NF_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kOthers > 0) {
        NF_UNROLL
        for (int j = 0; j < kOthers; ++j)
          sums[i * kOthers + j] = multiply_add(d[i], e[j], sums[i * kOthers + j]);
      } else {
        sums[i] += d[i];
        NF_UNROLL
        for (int j = i; j < kRows; ++j) {
          const int at = kRows + j * (j + 1) / 2 + i;
          sums[at] = multiply_add(d[i], d[j], sums[at]);
        }
      }
    }
  }

  template <int kCount>
  NF_DEVICE void load_rows(const T* from, int count, int64_t p, const Row& missing,
                           Row (&x)[kCount]) const {
    NF_UNROLL
    for (int i = 0; i < kCount; ++i) {
      x[i] = missing;
      if (kAll || i < count) x[i] = load_pack<kLanes>(from + i * stride + p);
    }
  }

  // kCount packs of every row, kThreads packs apart: every load before any use.
  template <int kCount>
  NF_DEVICE void add_packs(int64_t p, A (&sums)[kSums]) const {
    Row base[kCount], x[kCount][kRows], y[kCount][kOthers + 1];
    NF_UNROLL
    for (int n = 0; n < kCount; ++n) {
      const int64_t at = p + n * kThreads * kLanes;
      base[n] = load_pack<kLanes>(first + at);
      load_rows(a, rows, at, base[n], x[n]);
      if constexpr (kOthers > 0) load_rows(b, others, at, base[n], y[n]);
    }
    NF_UNROLL
    for (int n = 0; n < kCount; ++n) {
      NF_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        const A origin = widen(base[n].lane[lane]);
        A d[kRows], e[kOthers + 1] = {};
        const A mean = mean_at(p + n * kThreads * kLanes + lane);
        subtract(origin, mean, [&](int i) { return x[n][i].lane[lane]; }, d);
        if constexpr (kOthers > 0)
          subtract(origin, mean, [&](int i) { return y[n][i].lane[lane]; }, e);
        multiply(d, e, sums);
      }
    }
  }

  NF_DEVICE void add_columns(int64_t begin, int64_t end, A (&sums)[kSums]) const {
    NF_NO_UNROLL
    for (int64_t p = begin; p < end; ++p) {
      const A origin = widen(first[p]), mean = mean_at(p);
      A d[kRows], e[kOthers + 1] = {};
      subtract(origin, mean, [&](int i) { return i < rows ? a[i * stride + p] : first[p]; }, d);
      if constexpr (kOthers > 0)
        subtract(origin, mean, [&](int i) { return i < others ? b[i * stride + p] : first[p]; }, e);
      multiply(d, e, sums);
    }
  }

  // Thread t's share of a piece: pack t of every kThreads packs of its block.
  NF_DEVICE void add_piece(const Piece& piece, int thread, int64_t width, A (&sums)[kSums]) const {
    constexpr int64_t kStep = kThreads * kLanes, kRound = kPacks * kStep;
    NF_NO_UNROLL
    for (int64_t offset = thread * kLanes; offset < width; offset += kRound) {
      const int64_t p = piece.block + offset, last = p + kRound - kStep;
      if constexpr (kPacks > 1) {
        if (wide && p >= piece.begin && last + kLanes <= piece.end) {
          add_packs<kPacks>(p, sums);
          continue;
        }
      }
      NF_NO_UNROLL
      for (int64_t q = p; q <= last && q < piece.end; q += kStep) {
        if (wide && q >= piece.begin && q + kLanes <= piece.end) add_packs<1>(q, sums);
        else add_columns(most(q, piece.begin), least(q + kLanes, piece.end), sums);
      }
    }
  }

  // Which total a thread's sum n is, for rows i .. and j .. of R; -1: there is no such row.
  static NF_DEVICE int64_t place(int n, int64_t R, int64_t i, int64_t j) {
    if constexpr (kOthers > 0) {
      i += n / kOthers, j += n % kOthers;
    } else if (n < kRows) {
      return i + n < R ? i + n : -1;
    } else {
      int row = n - kRows, column = 0;
      while (row > column) row -= ++column;
      j = i + column, i += row;
    }
    return j < R ? product_index(R, i, j) : -1;
  }

  // Rows i .. and j ..
  static NF_DEVICE Offsets make(const OffsetGramCall& call, bool wide, int64_t i, int64_t j,
                                const A* means = nullptr, int64_t block = 0) {
    const T* params = static_cast<const T*>(call.params);
    const int64_t stride = call.row_stride, there = call.experts - 1;
    return {params,
            params + (i + 1) * stride,
            params + (j + 1) * stride,
            stride,
            static_cast<int>(least(kRows, there - i)),
            static_cast<int>(least(kOthers, there - j)),
            wide,
            A{1} / static_cast<A>(call.experts),
            means,
            block};
  }
};

}  // namespace neulig_fast
