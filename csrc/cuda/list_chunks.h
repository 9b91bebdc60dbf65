// What the CUDA kernels over lists of tensors share: which elements a block works on, whether they
// can be read in packs, and element types that are known only when the kernel runs.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/lists.h"
#include "cuda/launch.h"
#include "cuda/pieces.h"

namespace neulig_fast {

constexpr int kGroup = 8;  // experts whose loads are in flight together

// Elements [begin, end) of a tensor; begin is a multiple of the chunk.
struct ListChunk {
  int64_t tensor, begin, end;
};

// Asked for by whole warps.
NF_DEVICE ListChunk find_list_chunk(const ListTable& lists, int64_t chunk) {
  const int64_t* bounds = lists.bounds;
  const int64_t tensor =
      find_last_by_warp(lists.tensors, [=](int64_t t) { return bounds[t] <= chunk; });
  const int64_t begin = (chunk - bounds[tensor]) * lists.chunk;
  return {tensor, begin, least(begin + lists.chunk, lists.lengths[tensor])};
}

// Whether the N tensors and the other one begin at multiples of 16 bytes; all threads agree.
NF_DEVICE bool is_wide(const int64_t* addresses, int64_t count, int64_t other) {
  int64_t bits = other;
  for (int64_t i = 0; i < count; ++i) bits |= addresses[i];
  return bits % 16 == 0;
}

template <typename T>
NF_DEVICE T* at_address(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// Bits as wide as a pack.
template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = unsigned short;
};
template <>
struct BitsOf<4> {
  using type = int;
};
template <>
struct BitsOf<8> {
  using type = int2;
};
template <>
struct BitsOf<16> {
  using type = int4;
};

// A pack from or to global memory, which the compiler cannot know an address of a table to be in.
// What is read here is written by nobody meanwhile.
template <int kLanes, typename T>
NF_DEVICE Pack<T, kLanes> load_global(const T* from) {
#ifdef __CUDA_ARCH__
  using Bits = typename BitsOf<sizeof(Pack<T, kLanes>)>::type;
  const Bits bits = __ldg(reinterpret_cast<const Bits*>(from));
  Pack<T, kLanes> pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
#else
  return load_pack<kLanes>(from);
#endif
}

template <int kLanes, typename T>
NF_DEVICE void store_global(T* to, const Pack<T, kLanes>& pack) {
#ifdef __CUDA_ARCH__
  using Bits = typename BitsOf<sizeof pack>::type;
  Bits bits;
  memcpy(&bits, &pack, sizeof pack);
  __stwb(reinterpret_cast<Bits*>(to), bits);
#else
  store_pack<kLanes>(to, pack);
#endif
}

// x rounded to Out; fp64 becomes a 2-byte type by way of fp32, as torch rounds.
template <typename Out, typename A>
NF_DEVICE Out rounded(A x) {
  Out to;
  if constexpr (std::is_same_v<Out, double>) to = x;
  else narrow(static_cast<float>(x), to);
  return to;
}

// kLanes elements at a multiple of kLanes, moved in packs of 16 bytes, or one smaller pack.
template <typename T, int kLanes>
constexpr int kPackLanes = kLanes < kWideLanes<T> ? kLanes : kWideLanes<T>;

template <typename Out, int kLanes, typename A>
NF_DEVICE void store_as(Out* to, const A (&sums)[kLanes]) {
  constexpr int kPart = kPackLanes<Out, kLanes>;
  NF_UNROLL
  for (int part = 0; part < kLanes; part += kPart) {
    Pack<Out, kPart> pack;
    NF_UNROLL
    for (int lane = 0; lane < kPart; ++lane) pack.lane[lane] = rounded<Out>(sums[part + lane]);
    store_global<kPart>(to + part, pack);
  }
}

template <int kLanes, typename A>
NF_DEVICE void store_sums(Element element, int64_t address, int64_t p, const A (&sums)[kLanes]) {
  switch (element) {
    case Element::kFloat: return store_as(at_address<float>(address) + p, sums);
    case Element::kDouble: return store_as(at_address<double>(address) + p, sums);
    case Element::kBFloat16: return store_as(at_address<__nv_bfloat16>(address) + p, sums);
    case Element::kHalf: return store_as(at_address<__half>(address) + p, sums);
    default: return;  // no fp8
  }
}

template <typename From, int kLanes, typename A>
NF_DEVICE void load_as(const From* from, A (&values)[kLanes]) {
  constexpr int kPart = kPackLanes<From, kLanes>;
  NF_UNROLL
  for (int part = 0; part < kLanes; part += kPart) {
    const Pack<From, kPart> pack = load_global<kPart>(from + part);
    NF_UNROLL
    for (int lane = 0; lane < kPart; ++lane)
      values[part + lane] = static_cast<A>(widen(pack.lane[lane]));
  }
}

template <int kLanes, typename A>
NF_DEVICE void load_values(Element element, int64_t address, int64_t p, A (&values)[kLanes]) {
  switch (element) {
    case Element::kFloat: return load_as(at_address<const float>(address) + p, values);
    case Element::kDouble: return load_as(at_address<const double>(address) + p, values);
    case Element::kBFloat16: return load_as(at_address<const __nv_bfloat16>(address) + p, values);
    case Element::kHalf: return load_as(at_address<const __half>(address) + p, values);
    default: return;  // no fp8
  }
}

}  // namespace neulig_fast
