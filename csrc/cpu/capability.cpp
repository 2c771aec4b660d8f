#include "capability.h"

#include <atomic>

namespace fbc {

namespace {

// Asks for exactly what the targets of the isa_*.cpp files name: a virtual machine may hide
// any single feature.
Isa detect() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

bool detect_bf16() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  return detected_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

std::atomic<Isa> limit{Isa::kAvx512};

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

bool detected_bf16() {
  static const bool bf16 = detect_bf16();
  return bf16;
}

bool current_bf16() { return detected_bf16() && current_isa() == Isa::kAvx512; }

Isa current_isa() {
  const Isa most = limit.load(std::memory_order_relaxed), own = detected_isa();
  return most < own ? most : own;
}

void limit_isa(Isa isa) { limit.store(isa, std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline: return "baseline";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
  }
  return "unknown";
}

}  // namespace fbc
