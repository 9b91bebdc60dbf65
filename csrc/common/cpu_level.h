// Which x86-64 level the CPU kernels run at, and how a kernel is compiled once per level.
//
// A kernel is a struct with `template <int kBytes> static NF_INLINE void run(const Args&)`, kBytes
// being the width of a vector register. kernel_at<Kernel, Args>(level) returns the function that
// runs it with the instructions of that level. Every level gives the same bits: the kernels
// multiply then add (-ffp-contract=off) in an order that does not depend on kBytes.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define NF_INLINE inline __attribute__((always_inline))

// gcc 12 and clang 17 know the levels by name in both the target attribute and the CPU test.
#if defined(__x86_64__) && \
    ((defined(__clang__) && __clang_major__ >= 17) || (!defined(__clang__) && __GNUC__ >= 12))
#define NF_HAVE_LEVELS 1
#define NF_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#define NF_TARGET_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#endif

namespace neulig_fast {

enum class CpuLevel { kBaseline = 0, kV3 = 3, kV4 = 4 };  // SSE2 or other CPUs, AVX2, AVX-512

inline CpuLevel best_cpu_level() {
#ifdef NF_HAVE_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return CpuLevel::kV4;
  if (__builtin_cpu_supports("x86-64-v3")) return CpuLevel::kV3;
#endif
  return CpuLevel::kBaseline;
}

inline CpuLevel choose_cpu_level() {
  const CpuLevel best = best_cpu_level();
  const char* forced = std::getenv("NEULIG_FAST_CPU");
  if (forced == nullptr || *forced == '\0') return best;
  for (const CpuLevel level : {CpuLevel::kBaseline, CpuLevel::kV3, CpuLevel::kV4}) {
    if (forced != std::to_string(static_cast<int>(level))) continue;
    if (level <= best) return level;
    throw std::runtime_error(std::string("NEULIG_FAST_CPU=") + forced +
                             ": the best level this CPU and build support is " +
                             std::to_string(static_cast<int>(best)));
  }
  throw std::runtime_error(
      std::string("NEULIG_FAST_CPU must be 0 (baseline), 3 (x86-64-v3) or 4 (x86-64-v4), got '") +
      forced + "'");
}

// Chosen on the first call; a choice that throws is made, and throws, again.
inline CpuLevel cpu_level() {
  static const CpuLevel level = choose_cpu_level();
  return level;
}

template <typename Args>
using KernelFn = void (*)(const Args&);

template <typename Kernel, typename Args>
void run_baseline(const Args& args) {
  Kernel::template run<16>(args);
}

#ifdef NF_HAVE_LEVELS
template <typename Kernel, typename Args>
NF_TARGET_V3 void run_v3(const Args& args) {
  Kernel::template run<32>(args);
}

template <typename Kernel, typename Args>
NF_TARGET_V4 void run_v4(const Args& args) {
  Kernel::template run<64>(args);
}
#endif

template <typename Kernel, typename Args>
KernelFn<Args> kernel_at([[maybe_unused]] CpuLevel level) {
#ifdef NF_HAVE_LEVELS
  if (level == CpuLevel::kV4) return run_v4<Kernel, Args>;
  if (level == CpuLevel::kV3) return run_v3<Kernel, Args>;
#endif
  return run_baseline<Kernel, Args>;
}

// Runs the kernel at the level of this process. Whoever calls it from several threads has asked for
// cpu_level() before, which may throw.
template <typename Kernel, typename Args>
void run_kernel(const Args& args) {
  static const KernelFn<Args> chosen = kernel_at<Kernel, Args>(cpu_level());
  chosen(args);
}

}  // namespace neulig_fast
