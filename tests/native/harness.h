// A minimal native test harness: checks that count failures, deterministic data, a Parallel that runs
// its ranges serially in a chosen number of pieces (threads are simulated, so sanitizers see all memory).
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace harness {

inline int failures = 0;
inline int checks = 0;

inline void check(bool ok, const char* what, const char* file, int line) {
  ++checks;
  if (ok) return;
  ++failures;
  if (failures <= 20) std::printf("FAILED %s:%d: %s\n", file, line, what);
}
#define CHECK(condition) harness::check((condition), #condition, __FILE__, __LINE__)

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

inline int32_t pieces = 1;

// The pieces run last to first: results must not depend on the order.
inline void run_serially(int64_t tasks, void (*task)(void*, int32_t, int64_t, int64_t), void* context) {
  for (int32_t i = pieces - 1; i >= 0; --i) {
    const int64_t begin = tasks * i / pieces, end = tasks * (i + 1) / pieces;
    if (begin < end) task(context, i, begin, end);
  }
}

inline fbc::Parallel parallel_in(int32_t count) {
  pieces = count;
  return {count, run_serially};
}

class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes) {
    // The exact size, so that AddressSanitizer sees one byte too many; poisoned with NaN patterns.
    const size_t size = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, size > 0 ? size : 64);
    unsigned char* p = static_cast<unsigned char*>(data_);
    for (size_t i = 0; i < size; ++i) p[i] = 0xff;
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() { return data_; }

 private:
  int64_t bytes_;
  void* data_;
};

inline int report(const char* name) {
  std::printf("%s: %d checks, %d failures\n", name, checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace harness
