// What the test programs of this folder share: arguments, data, comparisons, the report.
//
//   int main(int argc, char** argv) {
//     fbc::test::Suite suite(argc, argv);              // program [seed of the schedule [quick]]
//     suite.group("sums");
//     auto x = fbc::test::integers<float>(100, -4, 4, suite.random);
//     auto y = fbc::test::poisoned<float>(1);          // NaN until written
//     suite.launched("sum", sum(x.data(), y.data()));  // status of a launcher
//     suite.exact("sum of 100", y, reference);
//     return suite.finish();
//   }
//
// Under nvcc the same program runs on a GPU: a Buffer then lies in memory that both sides see, and
// launched() waits. So everything that a kernel touches lives in a Buffer.
#pragma once

#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/types.h"
#include "cuda/gpu.cuh"
#include "device_memory.h"

namespace fbc::test {

// ---- memory -------------------------------------------------------------------------------------
template <typename T>
using Buffer = std::vector<T, DeviceAllocator<T>>;

// All bits set: NaN in every floating type, -1 in every integer.
template <typename T>
Buffer<T> poisoned(int64_t count) {
  Buffer<T> memory(static_cast<size_t>(count));
  if (count > 0) std::memset(static_cast<void*>(memory.data()), 0xff, memory.size() * sizeof(T));
  return memory;
}
template <typename T>
void poison(Buffer<T>& memory) {
  if (!memory.empty()) {
    std::memset(static_cast<void*>(memory.data()), 0xff, memory.size() * sizeof(T));
  }
}

// ---- values -------------------------------------------------------------------------------------
template <typename T>
double as_double(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<double>(value);
  } else {
    return static_cast<double>(load_as_acc(&value));
  }
}
template <typename T>
T from_double(double value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<T>(value);
  } else {
    T stored;
    store_from_acc(&stored, static_cast<float>(value));
    return stored;
  }
}
// Unit of the last place: the largest relative error of one rounding is half of it.
template <typename T>
constexpr double kUlp = std::is_same_v<T, double>     ? 0x1p-52
                        : std::is_same_v<T, float>    ? 0x1p-23
                        : std::is_same_v<T, BFloat16> ? 0x1p-7
                                                      : 0x1p-10;

// The data of a test: the same on every run, whatever the scheduling seed.
class Random {
 public:
  explicit Random(uint64_t seed = 1) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  double uniform(double low = 0.0, double high = 1.0) {
    return low + (high - low) * (static_cast<double>(next() >> 11) * 0x1p-53);
  }

 private:
  uint64_t state_;
};

// Small whole numbers, for sums that are exact in any order.
template <typename T>
Buffer<T> integers(int64_t count, int64_t low, int64_t high, Random& random) {
  Buffer<T> memory(static_cast<size_t>(count));
  for (T& x : memory) x = from_double<T>(static_cast<double>(random.between(low, high)));
  return memory;
}
template <typename T>
Buffer<T> uniforms(int64_t count, double low, double high, Random& random) {
  Buffer<T> memory(static_cast<size_t>(count));
  for (T& x : memory) x = from_double<T>(random.uniform(low, high));
  return memory;
}

// ---- the report ---------------------------------------------------------------------------------
class Suite {
 public:
  uint32_t seed = 0;
  bool quick = false;
  Random random;

  Suite(int argc, char** argv) {
#if !defined(__CUDACC__)
    seed = simt::settings().seed;
#endif
    if (argc > 1) seed = static_cast<uint32_t>(std::strtoul(argv[1], nullptr, 10));
    for (int i = 1; i < argc; ++i) quick = quick || std::strcmp(argv[i], "quick") == 0;
#if !defined(__CUDACC__)
    simt::settings().seed = seed;
#endif
  }

  // Ends the group before, with a line about it, and begins the next.
  void group(std::string name) {
    close_group();
    group_ = std::move(name);
  }
  // 0 for success, and for nothing else.
  int finish() {
    close_group();
    std::printf("%" PRId64 " checks, %" PRId64 " failures, seed %" PRIu32 "\n", checks_, failures_, seed);
    return failures_ == 0 && checks_ > 0 ? 0 : 1;
  }

  bool expect(bool good, const char* format, ...) __attribute__((format(printf, 3, 4))) {
    ++checks_, ++group_checks_;
    if (good) return true;
    ++failures_, ++group_failures_;
    if (group_failures_ <= kShown) {
      std::printf("FAILED %s: ", group_.c_str());
      va_list arguments;
      va_start(arguments, format);
      std::vprintf(format, arguments);
      va_end(arguments);
      std::printf("\n");
      std::fflush(stdout);
    }
    return false;
  }

  bool launched(const char* what, int status) {
#if defined(__CUDACC__)
    if (const cudaError_t error = cudaDeviceSynchronize()) {
      expect(false, "%s: %s", what, cudaGetErrorString(error));
      give_up(error);
    }
#endif
    return expect(status == 0, "%s: launch status %d", what, status);
  }

  // Equal values, element by element (0 == -0; NaN equals NaN, so poison must be in `want` to
  // pass).
  template <typename Got, typename Want>
  bool exact(const std::string& what, const Got& got, const Want& want) {
    return compare(what, got, want, 0.0, 0.0);
  }
  // |got - want| <= absolute + relative * |want|.
  template <typename Got, typename Want>
  bool close(const std::string& what, const Got& got, const Want& want, double relative, double absolute = 0.0) {
    return compare(what, got, want, relative, absolute);
  }
  // |got - want| <= relative * bound[i]: bound is for example the sum of |products| of an element.
  template <typename Got, typename Want, typename Bound>
  bool bounded(const std::string& what, const Got& got, const Want& want, const Bound& bound, double relative) {
    return compare_with(what, got, want, [&](size_t i) { return relative * as_double(bound[i]); });
  }
  // Equal bytes: for two runs that have to agree in every bit.
  template <typename T>
  bool same_bits(const std::string& what, const Buffer<T>& got, const Buffer<T>& want) {
    if (got.size() != want.size()) return sizes_differ(what, got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) {
        return expect(false, "%s: bits differ first at %zu of %zu, got %.9g, want %.9g", what.c_str(), i, got.size(),
                      as_double(got[i]), as_double(want[i]));
      }
    }
    return expect(true, "%s", "");
  }

 private:
  static constexpr int64_t kShown = 20;  // failures printed per group

  bool sizes_differ(const std::string& what, size_t got, size_t want) {
    return expect(false, "%s: %zu elements, want %zu", what.c_str(), got, want);
  }
  template <typename Got, typename Want>
  bool compare(const std::string& what, const Got& got, const Want& want, double relative, double absolute) {
    return compare_with(what, got, want, [&](size_t i) { return absolute + relative * std::fabs(as_double(want[i])); });
  }
  template <typename Got, typename Want, typename Allowed>
  bool compare_with(const std::string& what, const Got& got, const Want& want, Allowed allowed) {
    if (got.size() != want.size()) return sizes_differ(what, got.size(), want.size());
    size_t wrong = 0, first = 0, worst = 0;
    double worst_ratio = -1.0;
    for (size_t i = 0; i < got.size(); ++i) {
      const double g = as_double(got[i]), w = as_double(want[i]);
      if (g == w || (std::isnan(g) && std::isnan(w))) continue;
      const double error = std::fabs(g - w), limit = allowed(i);
      if (error <= limit) continue;
      const double ratio = std::isnan(error) ? HUGE_VAL : error / limit;
      if (wrong++ == 0) first = i;
      if (ratio > worst_ratio) worst_ratio = ratio, worst = i;
    }
    if (wrong == 0) return expect(true, "%s", "");
    return expect(false,
                  "%s: %zu of %zu differ, first at %zu (got %.9g, want %.9g), worst at %zu (got "
                  "%.9g, want %.9g, %.3g times the allowed error)",
                  what.c_str(), wrong, got.size(), first, as_double(got[first]), as_double(want[first]), worst,
                  as_double(got[worst]), as_double(want[worst]), worst_ratio);
  }
  void close_group() {
    if (group_checks_ > 0) {
      std::printf("%-44s %6" PRId64 " checks %6" PRId64 " failures\n", group_.c_str(), group_checks_, group_failures_);
      std::fflush(stdout);
    }
    group_checks_ = group_failures_ = 0;
  }

  std::string group_ = "all";
  int64_t checks_ = 0, failures_ = 0, group_checks_ = 0, group_failures_ = 0;
};

}  // namespace fbc::test
