// What a thread of blend_telemetry.cu does. Plain C++ without CUDA syntax under g++, so that a test
// can run it on a CPU.
#pragma once

#include "cuda/blend_telemetry.h"
#include "cuda/pieces.h"

#include <cmath>
#include <type_traits>

#ifdef __CUDACC__
#define NF_UNROLL_8 _Pragma("unroll 8")
#else
#define NF_UNROLL_8
#endif

namespace neulig_fast {
namespace {

constexpr int64_t kTelemetryColumns = 16384;  // of a piece; two of its counts share 32 bits

// What a thread adds up: columns of shared memory, `stride` values apart.
struct Tally {
  double* squares;   // of every expert, then of every output
  uint32_t* counts;  // conflicts; nonfinite + saturated << 16 of every output
  int stride;
};

NF_DEVICE double add_square(double sum, double value) {
#ifdef __CUDA_ARCH__
  return __fma_rn(value, value, sum);  // exact for fp32 values, up to the addition
#else
  return sum + value * value;
#endif
}

NF_DEVICE uint32_t count_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

template <typename A>
NF_DEVICE A offset(A x, A origin, A mean) {
  return add(add(x, -origin), -mean);
}

// Via fp32 to the 16-bit types, as PyTorch converts fp64.
template <typename O, typename A, int kLanes>
NF_DEVICE void store_as(const BlendTelemetryCall& call, int64_t at, const A (&sum)[kLanes]) {
  using Via = std::conditional_t<std::is_same_v<O, double>, double, float>;
  Pack<O, kLanes> theta;
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) narrow(static_cast<Via>(sum[lane]), theta.lane[lane]);
  store_pack<kLanes>(static_cast<O*>(call.theta) + at, theta);
}

// Writes the sums of output k and adds to its counts.
template <typename A, int kLanes>
NF_DEVICE void finish_output(const BlendTelemetryCall& call, int64_t k, int64_t p,
                             const A (&sum)[kLanes], uint32_t& counts) {
  const A limit = static_cast<A>(call.limit), infinity = static_cast<A>(INFINITY);
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) {
    A narrow = sum[lane];
    if (call.out != Element::kDouble) narrow = static_cast<float>(narrow);
    const bool fits = narrow < limit && narrow > -limit;
    const bool finite = sum[lane] < infinity && sum[lane] > -infinity;
    if (!fits) counts += finite ? 0x10001u : 1u;
  }
  const int64_t at = k * call.columns + p;
  switch (call.out) {
    case Element::kFloat: return store_as<float>(call, at, sum);
    case Element::kDouble: return store_as<double>(call, at, sum);
    case Element::kBFloat16: return store_as<__nv_bfloat16>(call, at, sum);
    case Element::kHalf: return store_as<__half>(call, at, sum);
    default: return;  // no fp8
  }
}

// One pack of columns of every expert: kept, of up to kExperts, or with kExperts = 0 read again
// whenever it is asked for.
template <typename T, int kExperts, int kLanes>
struct Columns {
  const T* from;
  int64_t row_stride;
  int experts;
  Pack<T, kLanes> held[kExperts > 0 ? kExperts : 1];

  NF_DEVICE Columns(const BlendTelemetryCall& call, int64_t p)
      : from(static_cast<const T*>(call.params) + p),
        row_stride(call.row_stride),
        experts(static_cast<int>(call.experts)) {
    NF_UNROLL
    for (int i = 0; i < kExperts; ++i)
      if (i < experts) held[i] = read(i);
  }
  NF_DEVICE Pack<T, kLanes> read(int64_t i) const {
    return load_pack<kLanes>(from + i * row_stride);
  }
  // Calls body(i, pack) for every expert in order.
  template <typename Body>
  NF_DEVICE void each(const Body& body) const {
    if constexpr (kExperts > 0) {
      NF_UNROLL
      for (int i = 0; i < kExperts; ++i) {
        if (i == experts) break;
        body(i, held[i]);
      }
    } else {
      NF_UNROLL_8
      for (int i = 0; i < experts; ++i) body(i, read(i));
    }
  }
};

// What offsets of these columns are taken from.
template <typename T, int kLanes>
struct Center {
  Accumulator<T> origin[kLanes], mean[kLanes];
};

template <typename T, int kExperts, int kLanes>
NF_DEVICE Center<T, kLanes> find_center(const BlendTelemetryCall& call,
                                        const Columns<T, kExperts, kLanes>& x) {
  using A = Accumulator<T>;
  Center<T, kLanes> center = {};
  const Pack<T, kLanes> origin = x.read(most(call.base, 0));
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) center.origin[lane] = widen(origin.lane[lane]);
  if (call.base >= 0) return center;
  x.each([&](int, const Pack<T, kLanes>& pack) {
    NF_UNROLL
    for (int lane = 0; lane < kLanes; ++lane)
      center.mean[lane] = add(center.mean[lane], add(widen(pack.lane[lane]), -center.origin[lane]));
  });
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane)
    center.mean[lane] = multiply(center.mean[lane], static_cast<A>(call.share));
  return center;
}

template <typename T, int kExperts, int kLanes>
NF_DEVICE void tally_experts(const Columns<T, kExperts, kLanes>& x, const Center<T, kLanes>& center,
                             const Tally& tally) {
  uint32_t above = 0, below = 0;
  x.each([&](int i, const Pack<T, kLanes>& pack) {
    double squares = tally.squares[i * tally.stride];
    NF_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto xi = offset(widen(pack.lane[lane]), center.origin[lane], center.mean[lane]);
      squares = add_square(squares, xi);
      above |= static_cast<uint32_t>(xi > 0) << lane;
      below |= static_cast<uint32_t>(xi < 0) << lane;
    }
    tally.squares[i * tally.stride] = squares;
  });
  tally.counts[0] += count_bits(above & below);
}

// The columns from p on for outputs first .. first + outputs - 1; w: weights of output 0.
template <typename T, int kExperts, int kLanes>
NF_DEVICE void tally_columns(const BlendTelemetryCall& call, const Accumulator<T>* w, int64_t p,
                             int64_t first, int outputs, const Tally& tally) {
  const Columns<T, kExperts, kLanes> x(call, p);
  const Center<T, kLanes> center = find_center(call, x);
  if (first == 0) tally_experts(x, center, tally);
  NF_NO_UNROLL
  for (int r = 0; r < outputs; ++r) {
    const Accumulator<T>* weights = w + (first + r) * call.segments * call.experts;
    Accumulator<T> sum[kLanes] = {};
    x.each([&](int i, const Pack<T, kLanes>& pack) {
      NF_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        const Accumulator<T> term = multiply(weights[i], widen(pack.lane[lane]));
        sum[lane] = i == 0 ? term : add(sum[lane], term);
      }
    });
    double squares = tally.squares[(x.experts + r) * tally.stride];
    NF_UNROLL
    for (int lane = 0; lane < kLanes; ++lane)
      squares = add_square(squares, offset(sum[lane], center.origin[lane], center.mean[lane]));
    tally.squares[(x.experts + r) * tally.stride] = squares;
    finish_output(call, first + r, p, sum, tally.counts[(1 + r) * tally.stride]);
  }
}

// Thread t's share of a piece: pack t of every `threads` packs of its block.
template <typename T, int kExperts>
NF_DEVICE void tally_piece(const BlendTelemetryCall& call, const Piece& piece, int64_t segment,
                           bool wide, int thread, int threads, int64_t first, int outputs,
                           const Tally& tally) {
  constexpr int kLanes = kWideLanes<T>;
  const auto* w = static_cast<const Accumulator<T>*>(call.weights) + segment * call.experts;
  NF_NO_UNROLL
  for (int64_t at = thread * kLanes; at < kTelemetryColumns; at += threads * kLanes) {
    const int64_t p = piece.block + at;
    if (wide && p >= piece.begin && p + kLanes <= piece.end) {
      tally_columns<T, kExperts, kLanes>(call, w, p, first, outputs, tally);
    } else {
      NF_NO_UNROLL
      for (int64_t q = most(p, piece.begin); q < least(p + kLanes, piece.end); ++q)
        tally_columns<T, kExperts, 1>(call, w, q, first, outputs, tally);
    }
  }
}

// Thread t's share of the sum over a segment of a row of partial sums.
template <typename V, typename Partial>
NF_DEVICE V add_row(const BlendTelemetryCall& call, const Partial* partials, int64_t row,
                    int64_t segment, int thread) {
  const SlotRange range =
      find_slots(call.bounds, call.segments, call.slots, segment, kTelemetryColumns);
  V sum = 0;
  for (int64_t slot = range.begin + thread; slot < range.end; slot += kThreads)
    sum += partials[row * call.slots + slot];
  return sum;
}

NF_DEVICE double* place_of_squares(const BlendTelemetryCall& call, int64_t row, int64_t segment) {
  if (row < call.experts) return call.expert_squares + segment * call.experts + row;
  return call.merged_squares + (row - call.experts) * call.segments + segment;
}

NF_DEVICE int64_t* place_of_count(const BlendTelemetryCall& call, int64_t row, int64_t segment) {
  return row == 0 ? call.conflicts + segment : call.counts + (row - 1) * call.segments + segment;
}

}  // namespace

}  // namespace neulig_fast
