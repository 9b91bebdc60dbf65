// csrc/common/vector_math.h at every instruction level, for test_vector_math.py, which compiles it.
#include "common/vector_math.h"

using namespace neulig_fast;

namespace {

template <typename A>
struct Call {
  int function;
  const A* x;
  A* y;
  int64_t count;  // a multiple of 16
};

template <typename A>
struct Evaluate {
  template <int kBytes>
  static NF_INLINE void run(const Call<A>& call) {
    constexpr int kLanes = kBytes / sizeof(A);
    for (int64_t p = 0; p < call.count; p += kLanes) {
      const auto x = load<kLanes>(call.x + p);
      if (call.function == 0) store<kLanes>(call.y + p, exp_nonpositive<kLanes>(x));
      if (call.function == 1) store<kLanes>(call.y + p, log_positive<kLanes>(x));
      if (call.function == 2) store<kLanes>(call.y + p, square_root<kLanes>(x));
    }
  }
};

template <typename A>
void evaluate(int level, const Call<A>& call) {
  kernel_at<Evaluate<A>, Call<A>>(static_cast<CpuLevel>(level))(call);
}

}  // namespace

extern "C" int best_level() {
  return static_cast<int>(best_cpu_level());
}

extern "C" void evaluate_float(int level, int function, const float* x, float* y, int64_t count) {
  evaluate<float>(level, {function, x, y, count});
}

extern "C" void evaluate_double(int level, int function, const double* x, double* y,
                                int64_t count) {
  evaluate<double>(level, {function, x, y, count});
}
