// The head of neulig_loss on a block of samples: logits in tiles of classes, and what softmax makes
// of them. No logit is kept: a pass over the classes holds one tile.
//
// A tile y is (kBlock classes, kBlock samples), so that all steps run side by side over samples.
// Sums over classes are of a tile's classes in order, then of the tiles in order.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/neulig_rows.h"

namespace neulig_fast {

template <typename A>
struct LossHead {
  const A* weight;  // (C, D), rows `stride` apart
  int64_t stride, classes, width;
  const A* bias;  // (C,) or null
  bool entropy;   // the boosting term
};

// Of every sample of a block, over the classes that were passed.
template <typename A>
struct Softmax {
  Bits<A> target[kBlock];  // for the entropy no class
  A top[kBlock];           // the largest logit
  A rest[kBlock];          // sum of e^(y - top), without the target's: small where p is sure of it
  A total[kBlock];         // the same with the target's
  A at_target[kBlock];     // its logit
  A plogp[kBlock];         // sum p log(p + d)
  A mean[kBlock];          // sum p g, g = log(p + d) + p / (p + d)

  void begin(const int64_t* targets, int64_t count) {
    *this = {};
    for (int64_t s = 0; s < kBlock; ++s) {
      target[s] = static_cast<Bits<A>>(targets != nullptr && s < count ? targets[s] : -1);
      top[s] = std::numeric_limits<A>::lowest();
      at_target[s] = -std::numeric_limits<A>::infinity();
    }
  }
};

template <typename A>
struct SoftmaxTile {
  A* y;
  int64_t first;  // class
  Softmax<A>* s;
  bool entropy;
  A* factor;  // (kBlock,), of AbsorbTile
};

// From logits to e^(y - top), 0 for the target, and `rest` with them. `factor` is what exponentials
// of earlier tiles are to be multiplied with, as top may have risen.
template <typename A>
struct AbsorbTile {
  template <int kBytes>
  static NF_INLINE void run(const SoftmaxTile<A>& t) {
    constexpr int kLanes = kBytes / sizeof(A);
    using V = Vec<A, kLanes>;
    using U = Vec<Bits<A>, kLanes>;
    for (int s = 0; s < kBlock; s += kLanes) {
      const V before = load<kLanes>(t.s->top + s);
      const U target = load_bits<U>(t.s->target + s);
      V top = before, own = load<kLanes>(t.s->at_target + s), sum = {};
      for (int c = 0; c < kBlock; ++c) {
        const V y = load<kLanes>(t.y + c * kBlock + s);
        top = select((U)(y > top), y, top);
        own = select((U)(target == Bits<A>(t.first + c)), y, own);
      }
      for (int c = 0; c < kBlock; ++c) {
        A* y = t.y + c * kBlock + s;
        const V e = exp_nonpositive<kLanes>(load<kLanes>(y) - top);
        const V other = select((U)(target == Bits<A>(t.first + c)), V{}, e);
        store<kLanes>(y, other);
        sum = sum + other;
      }
      const V factor = exp_nonpositive<kLanes>(before - top);
      store<kLanes>(t.s->rest + s, multiply_add<kLanes>(load<kLanes>(t.s->rest + s), factor, sum));
      store<kLanes>(t.s->top + s, top);
      store<kLanes>(t.s->at_target + s, own);
      store<kLanes>(t.factor + s, factor);
    }
  }
};

// Adds the tile of logits to `plogp` and `mean`.
template <typename A>
struct EntropyTile {
  template <int kBytes>
  static NF_INLINE void run(const SoftmaxTile<A>& t) {
    constexpr int kLanes = kBytes / sizeof(A);
    using V = Vec<A, kLanes>;
    for (int s = 0; s < kBlock; s += kLanes) {
      const V top = load<kLanes>(t.s->top + s), total = load<kLanes>(t.s->total + s);
      V plogp = {}, mean = {};
      for (int c = 0; c < kBlock; ++c) {
        const V p = exp_nonpositive<kLanes>(load<kLanes>(t.y + c * kBlock + s) - top) / total;
        const V more = p + A(kEntropyEpsilon), logarithm = log_positive<kLanes>(more);
        plogp = multiply_add<kLanes>(p, logarithm, plogp);
        mean = multiply_add<kLanes>(p, logarithm + p / more, mean);
      }
      store<kLanes>(t.s->plogp + s, load<kLanes>(t.s->plogp + s) + plogp);
      store<kLanes>(t.s->mean + s, load<kLanes>(t.s->mean + s) + mean);
    }
  }
};

// From logits to B dL_b/dy.
template <typename A>
struct SlopeTile {
  template <int kBytes>
  static NF_INLINE void run(const SoftmaxTile<A>& t) {
    constexpr int kLanes = kBytes / sizeof(A);
    using V = Vec<A, kLanes>;
    using U = Vec<Bits<A>, kLanes>;
    for (int s = 0; s < kBlock; s += kLanes) {
      const V top = load<kLanes>(t.s->top + s), total = load<kLanes>(t.s->total + s);
      const V mean = load<kLanes>(t.s->mean + s), at_target = -load<kLanes>(t.s->rest + s) / total;
      const U target = load_bits<U>(t.s->target + s);
      for (int c = 0; c < kBlock; ++c) {
        A* y = t.y + c * kBlock + s;
        const V p = exp_nonpositive<kLanes>(load<kLanes>(y) - top) / total;
        V slope = select((U)(target == Bits<A>(t.first + c)), at_target, p);
        if (t.entropy) {
          const V more = p + A(kEntropyEpsilon);
          slope = p * (mean - (log_positive<kLanes>(more) + p / more));
        }
        store<kLanes>(y, slope);
      }
    }
  }
};

// y (+)= the products of a few classes with a block of samples, over some columns.
template <typename A>
struct LogitRows {
  const A* weight;  // row 0
  int64_t stride;
  const A* turned;  // (columns, kBlock)
  int64_t columns;
  A* y;
  bool first;  // nothing is there to add to
};

template <typename A, int kRows>
struct Logits {
  template <int kBytes>
  static NF_INLINE void run(const LogitRows<A>& r) {
    constexpr int kLanes = kBytes / sizeof(A);
    constexpr int kVectors = kLanes == kBlock ? 1 : 2;  // 12 sums at most
    for (int s = 0; s < kBlock; s += kVectors * kLanes) {
      Vec<A, kLanes> sum[kRows][kVectors] = {};
      for (int64_t p = 0; p < r.columns; ++p) {
        Vec<A, kLanes> e[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          e[v] = load<kLanes>(r.turned + p * kBlock + s + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const auto w = broadcast<kLanes>(r.weight + i * r.stride + p);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add<kLanes>(e[v], w, sum[i][v]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          A* y = r.y + i * kBlock + s + v * kLanes;
          store<kLanes>(y, r.first ? sum[i][v] : load<kLanes>(y) + sum[i][v]);
        }
    }
  }
};

template <typename A, int... kIndex>
std::array<KernelFn<LogitRows<A>>, kMaxRows> make_logit_kernels(
    CpuLevel level, std::integer_sequence<int, kIndex...>) {
  return {kernel_at<Logits<A, kIndex + 1>, LogitRows<A>>(level)...};
}

template <typename A>
void run_logits(int64_t rows, const LogitRows<A>& arguments) {
  static const auto kernels =
      make_logit_kernels<A>(cpu_level(), std::make_integer_sequence<int, kMaxRows>{});
  kernels[rows - 1](arguments);
}

// A few rows times a factor each.
template <typename A>
struct ScaledRows {
  A* rows;
  int64_t stride, columns, count;
  const A* factors;
};

template <typename A>
struct ScaleRows {
  template <int kBytes>
  static NF_INLINE void run(const ScaledRows<A>& r) {
    constexpr int kLanes = kBytes / sizeof(A);
    for (int64_t k = 0; k < r.count; ++k) {
      if (r.factors[k] == A(1)) continue;
      for (A *x = r.rows + k * r.stride, *end = x + r.columns; x < end; x += kLanes)
        store<kLanes>(x, load<kLanes>(x) * r.factors[k]);
    }
  }
};

// A worker's passes over the classes for blocks of kBlock samples. `turned` (D, kBlock): what the
// head multiplies; of samples that are not there, any numbers.
template <typename A>
class HeadPasses {
 public:
  explicit HeadPasses(const LossHead<A>& head)
      : head_(head),
        stride_(padded_stride(head.width)),
        rows_(kBlock, head.width),
        y_(kBlock * kBlock) {}

  // Logits of the kBlock classes from `first` on; -inf beyond the last.
  A* logits(int64_t first, const A* turned) {
    constexpr int64_t kColumns = 256;  // so that these of `turned` stay in the first-level cache
    const int64_t classes = std::min<int64_t>(kBlock, head_.classes - first);
    const A* weight = head_.weight + first * head_.stride;
    A* y = y_.data();
    for (int64_t p = 0; p < head_.width; p += kColumns)
      for_row_groups(classes, [&](int64_t c, int64_t rows) {
        run_logits(rows,
                   LogitRows<A>{weight + c * head_.stride + p, head_.stride, turned + p * kBlock,
                                std::min(kColumns, head_.width - p), y + c * kBlock, p == 0});
      });
    if (head_.bias != nullptr)
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t s = 0; s < kBlock; ++s) y[c * kBlock + s] += head_.bias[first + c];
    std::fill(y + classes * kBlock, y + kBlock * kBlock, -std::numeric_limits<A>::infinity());
    return y;
  }

  // Everything of s for the loss.
  void statistics(const A* turned, Softmax<A>& s) {
    absorb(turned, s, 0, nullptr);
    if (!head_.entropy) return;
    for (int64_t first = 0; first < head_.classes; first += kBlock)
      run_kernel<EntropyTile<A>>(tile(first, turned, s));
  }

  // The same, and d (count, stride) = H' B dL_b/dy, times s.total if not of the entropy: then a
  // single pass is enough.
  void gradient(const A* turned, int64_t count, Softmax<A>& s, A* d) {
    std::fill(d, d + count * stride_, A(0));
    if (head_.entropy) {
      statistics(turned, s);
      for (int64_t first = 0; first < head_.classes; first += kBlock) {
        run_kernel<SlopeTile<A>>(tile(first, turned, s));
        add_rows(first, count, d);
      }
      return;
    }
    absorb(turned, s, count, d);
    for (int64_t k = 0; k < count; ++k) {
      rows_.take(1, [&](int64_t) { return head_.weight + s.target[k] * head_.stride; });
      const A less = -s.rest[k];
      outer_sums(rows_, &less, 1, 0, rows_.columns(), d + k * stride_, stride_, 1, false);
    }
  }

  // B dL_b/dy of the kBlock classes from `first` on; s is complete.
  const A* slopes(int64_t first, const A* turned, Softmax<A>& s) {
    run_kernel<SlopeTile<A>>(tile(first, turned, s));
    return y_.data();
  }

 private:
  SoftmaxTile<A> tile(int64_t first, const A* turned, Softmax<A>& s) {
    return {logits(first, turned), first, &s, head_.entropy, factor_};
  }

  // d += y' H for the tile's classes.
  void add_rows(int64_t first, int64_t count, A* d) {
    rows_.take(std::min<int64_t>(kBlock, head_.classes - first),
               [&](int64_t c) { return head_.weight + (first + c) * head_.stride; });
    outer_sums(rows_, y_.data(), kBlock, 0, rows_.columns(), d, stride_, count, false);
  }

  // s.top, rest, total and at_target; d (or null) += sum of e^(y - top) H without the targets'.
  void absorb(const A* turned, Softmax<A>& s, int64_t count, A* d) {
    for (int64_t first = 0; first < head_.classes; first += kBlock) {
      run_kernel<AbsorbTile<A>>(tile(first, turned, s));
      if (d == nullptr) continue;
      run_kernel<ScaleRows<A>>(ScaledRows<A>{d, stride_, rows_.columns(), count, factor_});
      add_rows(first, count, d);
    }
    for (int k = 0; k < kBlock; ++k) s.total[k] = s.rest[k] + std::exp(s.at_target[k] - s.top[k]);
  }

  const LossHead<A>& head_;
  const int64_t stride_;
  Rows<A> rows_;  // of a tile's classes
  Lines<A> y_;
  A factor_[kBlock];
};

}  // namespace neulig_fast
