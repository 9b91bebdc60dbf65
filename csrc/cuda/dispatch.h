// From an element type known at run time to one known at compile time.
#pragma once

#include "cuda/launch.h"
#include "cuda/rounding.h"

#ifdef __CUDACC__
namespace neulig_fast {

// Blocks of a launch. Too many become a launch error, not the few that are left of 32 bits.
inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks < UINT32_MAX ? blocks : UINT32_MAX);
}

template <typename T>
constexpr Element kElementOf = Element::kFloat;
template <>
constexpr Element kElementOf<double> = Element::kDouble;
template <>
constexpr Element kElementOf<__nv_bfloat16> = Element::kBFloat16;
template <>
constexpr Element kElementOf<__half> = Element::kHalf;
template <>
constexpr Element kElementOf<Float8E4M3> = Element::kFloat8E4M3;
template <>
constexpr Element kElementOf<Float8E5M2> = Element::kFloat8E5M2;

// Calls launch(T{}) for the one of Types that is `element`. Null, or why it failed.
template <typename... Types, typename Launch>
const char* launch_for(Element element, const Launch& launch) {
  const bool launched = ((kElementOf<Types> == element && (launch(Types{}), true)) || ...);
  if (!launched) return "there is no kernel for this element type";
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace neulig_fast
#endif
