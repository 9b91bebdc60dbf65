// One parallel region over work items, on torch's own CPU threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace neulig_fast {

// Below this many elements read or written, waking a second thread costs more than it saves,
// far more when another process holds a core and the region waits for it in OpenMP's barrier.
constexpr int64_t kSerialElements = 6 * 65536;

// Calls body(item) once for each item in [0, items). Threads take items as they become free, so a
// busy core delays little and no result may depend on who ran what.
template <typename Body>
void for_each_item(int64_t items, int64_t elements, const Body& body) {
  const int64_t threads =
      elements < kSerialElements ? 1 : std::min<int64_t>(items, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) body(item);
  };
  if (threads <= 1) return worker(0, 1);
  torch::stable::parallel_for(0, threads, 1, worker);
}

}  // namespace neulig_fast
