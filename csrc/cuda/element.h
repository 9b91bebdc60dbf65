// Element types, 16-byte packs of them, and arithmetic that the compiler may not contract.
// Plain C++ without CUDA syntax under g++, so that a test can run a thread's work on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__
#define NF_DEVICE __host__ __device__ __forceinline__
#define NF_UNROLL _Pragma("unroll")
#define NF_NO_UNROLL _Pragma("unroll 1")
#define NF_UNROLL_EIGHT _Pragma("unroll 8")
#else
#define NF_DEVICE inline
#define NF_UNROLL
#define NF_NO_UNROLL
#define NF_UNROLL_EIGHT
#endif

namespace neulig_fast {

constexpr int kThreads = 256;  // of a block, unless a launch says otherwise

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// What a thread moves at once. Aligned to its size: one access.
template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Pack {
  T lane[kLanes];
};

template <typename T>
constexpr int kWideLanes = 16 / sizeof(T);

template <int kLanes, typename T>
NF_DEVICE Pack<T, kLanes> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kLanes>*>(from);
}

template <int kLanes, typename T>
NF_DEVICE void store_pack(T* to, const Pack<T, kLanes>& pack) {
  *reinterpret_cast<Pack<T, kLanes>*>(to) = pack;
}

NF_DEVICE float widen(float x) {
  return x;
}
NF_DEVICE double widen(double x) {
  return x;
}
NF_DEVICE float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
NF_DEVICE float widen(__half x) {
  return __half2float(x);
}

// Lane `lane` of a pack, widened. Two bf16 are a word: a shift or a mask.
template <typename T, int kLanes>
NF_DEVICE Accumulator<T> widen_lane(const Pack<T, kLanes>& pack, int lane) {
  return widen(pack.lane[lane]);
}
#ifdef __CUDA_ARCH__
template <int kLanes>
NF_DEVICE float widen_lane(const Pack<__nv_bfloat16, kLanes>& pack, int lane) {
  const uint32_t word = reinterpret_cast<const uint32_t*>(&pack)[lane / 2];
  return __uint_as_float(lane % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
}
#endif

// narrow(x, to): x rounded to nearest even.
NF_DEVICE void narrow(float x, float& to) {
  to = x;
}
NF_DEVICE void narrow(double x, double& to) {
  to = x;
}
NF_DEVICE void narrow(float x, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(x);
}
NF_DEVICE void narrow(float x, __half& to) {
  to = __float2half_rn(x);
}

// sum + a * b, rounded twice. On the host this needs -ffp-contract=off.
NF_DEVICE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

NF_DEVICE double multiply(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

NF_DEVICE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

NF_DEVICE double add(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

// sum + a * b, rounded once on a GPU and twice on the host.
NF_DEVICE float multiply_add(float a, float b, float sum) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, sum);
#else
  return a * b + sum;
#endif
}

NF_DEVICE double multiply_add(double a, double b, double sum) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, sum);
#else
  return a * b + sum;
#endif
}

}  // namespace neulig_fast
