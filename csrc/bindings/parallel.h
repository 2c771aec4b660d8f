// at::parallel_for as the kernels see it: `Parallel` of csrc/cpu/kernels.h.
//
// Every thread begins with an equal share of the tasks, neighbours together: what one pass leaves in a core's
// caches the next finds there. It works through it from the front, in pieces that halve; one that is done
// takes half of what another has left, from the back. So a thread that the system delays, or whose tasks
// are longer, does not make the others wait. Who does a task changes no bit.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../cpu/kernels.h"

namespace fbc {

class TaskShare {
 public:
  void set(int64_t begin, int64_t end) { range_.store(pack(begin, end), std::memory_order_relaxed); }

  // Half of what is left, at least one; false: nothing is.
  bool take(bool front, int64_t* begin, int64_t* end) {
    uint64_t seen = range_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = static_cast<int64_t>(seen >> 32), last = static_cast<int64_t>(seen & kLow);
      if (first >= last) return false;
      const int64_t count = (last - first + 1) / 2;
      *begin = front ? first : last - count;
      *end = *begin + count;
      const uint64_t rest = front ? pack(*end, last) : pack(first, *begin);
      if (range_.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) return true;
    }
  }

 private:
  static constexpr uint64_t kLow = 0xffffffffu;
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  alignas(64) std::atomic<uint64_t> range_;
};

// Serial, as thread 0, inside another parallel region.
inline void run_parallel(int64_t tasks, void (*task)(void*, int32_t, int64_t, int64_t), void* context) {
  constexpr int64_t kMostShares = 64, kMostTasks = int64_t{1} << 31;
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), tasks);
  if (shares > kMostShares || tasks > kMostTasks) {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { task(context, at::get_thread_num(), begin, end); });
    return;
  }
  TaskShare share[kMostShares];
  for (int64_t i = 0; i < shares; ++i) share[i].set(tasks * i / shares, tasks * (i + 1) / shares);
  at::parallel_for(0, shares, 1, [&](int64_t own, int64_t) {
    int64_t begin, end;
    for (int64_t i = 0; i < shares; ++i) {
      while (share[(own + i) % shares].take(i == 0, &begin, &end)) {
        task(context, at::get_thread_num(), begin, end);
      }
    }
  });
}

inline Parallel parallel_loop() { return {at::get_num_threads(), run_parallel}; }

}  // namespace fbc
