// How a thread stores the sums of its columns, whatever the type of the output. The type is asked
// for at each store, by all threads alike, so that kernels need not be compiled for every pair.
#pragma once

#include "cuda/blend.h"
#include "cuda/rounding.h"

namespace neulig_fast {

// kLanes values from `to` on, in accesses of 16 bytes or less, each aligned to its size.
template <typename Out, int kLanes>
NF_DEVICE void store_parts(Out* to, const Out (&value)[kLanes]) {
  constexpr int kPart = kLanes < kWideLanes<Out> ? kLanes : kWideLanes<Out>;
  NF_UNROLL
  for (int first = 0; first < kLanes; first += kPart) {
    Pack<Out, kPart> part;
    NF_UNROLL
    for (int lane = 0; lane < kPart; ++lane) part.lane[lane] = value[first + lane];
    store_pack<kPart>(to + first, part);
  }
}

template <typename Out>
NF_DEVICE Out* theta_at(const BlendCall& call, int64_t k, int64_t p) {
  return static_cast<Out*>(call.theta) + k * call.theta_stride + p;
}

template <typename Out, int kLanes, typename A>
NF_DEVICE void store_nearest_as(const BlendCall& call, int64_t k, int64_t p,
                                const A (&sum)[kLanes]) {
  Out value[kLanes];
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) narrow(sum[lane], value[lane]);
  store_parts(theta_at<Out>(call, k, p), value);
}

// Columns p .. of output k.
template <int kLanes, typename A>
NF_DEVICE void store_nearest(const BlendCall& call, int64_t k, int64_t p, const A (&sum)[kLanes]) {
  switch (call.out) {
    case Element::kFloat: return store_nearest_as<float>(call, k, p, sum);
    case Element::kDouble: return store_nearest_as<double>(call, k, p, sum);
    case Element::kBFloat16: return store_nearest_as<__nv_bfloat16>(call, k, p, sum);
    case Element::kHalf: return store_nearest_as<__half>(call, k, p, sum);
    case Element::kFloat8E4M3: return store_nearest_as<Float8E4M3>(call, k, p, sum);
    case Element::kFloat8E5M2: return store_nearest_as<Float8E5M2>(call, k, p, sum);
  }
}

template <typename Out, int kLanes, typename A>
NF_DEVICE void store_randomly_as(const BlendCall& call, int64_t k, int64_t p,
                                 const A (&sum)[kLanes], const uint32_t (&random)[kLanes]) {
  Out value[kLanes];
  NF_UNROLL
  for (int lane = 0; lane < kLanes; ++lane)
    narrow_randomly(static_cast<float>(sum[lane]), random[lane], value[lane]);
  store_parts(theta_at<Out>(call, k, p), value);
}

NF_DEVICE int64_t segment_start(const BlendCall& call, int64_t segment) {
  return call.segments > 1 ? call.bounds[segment] : 0;
}

// The same stochastically. Random words come in fours from the start of a segment.
template <int kLanes, typename A>
NF_DEVICE void store_randomly(const BlendCall& call, int64_t k, int64_t segment, int64_t p,
                              const A (&sum)[kLanes]) {
  uint32_t random[kLanes];
  random_words(call.seed, p - segment_start(call, segment), segment, k, random);
  switch (call.out) {
    case Element::kBFloat16: return store_randomly_as<__nv_bfloat16>(call, k, p, sum, random);
    case Element::kHalf: return store_randomly_as<__half>(call, k, p, sum, random);
    case Element::kFloat8E4M3: return store_randomly_as<Float8E4M3>(call, k, p, sum, random);
    case Element::kFloat8E5M2: return store_randomly_as<Float8E5M2>(call, k, p, sum, random);
    default: return;  // check_theta has refused all others
  }
}

}  // namespace neulig_fast
