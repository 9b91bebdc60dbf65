// Items of work in phases: one queue for all of them, with no barrier of the thread pool between.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace neulig_fast {

// Below this many multiplications before a phase ends a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 17;

// Threads for `items` items at a time.
inline int64_t workers_for(int64_t multiplications, int64_t items) {
  if (multiplications < kSerialWork) return 1;
  return std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(items, 1));
}

// Items are numbered through all phases, claimed in that order, and begun when all of the phases
// before are done. An unfinished item that one waits for was claimed before, so its thread is
// running it: nothing can deadlock, also where parallel_for runs one worker after the other.
class PhaseQueue {
 public:
  void add_phase(int64_t items) {
    starts_.push_back(starts_.back() + items);
  }

  // Calls body(worker, phase, index within the phase).
  template <typename Body>
  void run(int64_t workers, const Body& body) {
    const auto work = [&](int64_t worker, int64_t) {
      int64_t phase = 0;
      for (int64_t item = next_.fetch_add(1); item < starts_.back(); item = next_.fetch_add(1)) {
        while (item >= starts_[phase + 1]) ++phase;
        wait_for(starts_[phase]);
        body(worker, phase, item - starts_[phase]);
        done_.fetch_add(1, std::memory_order_release);
      }
    };
    if (workers <= 1) return work(0, 1);
    torch::stable::parallel_for(0, workers, 1, work);
  }

 private:
  // Items of a phase are not counted before those of the phases before are: the count says it all.
  void wait_for(int64_t items) const {
    for (int64_t look = 0; done_.load(std::memory_order_acquire) < items; ++look) {
      if (look < kSpins) pause();
      else std::this_thread::yield();
    }
  }

  static void pause() {
#ifdef __SSE2__
    _mm_pause();
#endif
  }

  static constexpr int64_t kSpins =
      2048;  // about what an item takes: its thread may not be running
  std::vector<int64_t> starts_ = {0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace neulig_fast
