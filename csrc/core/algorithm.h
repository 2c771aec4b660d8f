// The names of the ways to compute a convolution, and its three directions. Which device has which,
// and which of them `auto` takes, stands in cpu/select.cpp and cuda/candidates.cpp.
#pragma once

#include <cstdint>

namespace fbc {

enum class Algorithm : int32_t {
  kAuto = 0,
  kDirect = 1,       // our one-pass kernels
  kWinograd2 = 2,    // F(2x2, 3x3)
  kWinograd4 = 3,    // F(4x4, 3x3), on request only
  kLibrary = 4,      // fused sampling pass, then the framework's convolution
  kWinograd2x4 = 5,  // F(2x4, 3x3)
};
constexpr int32_t kNumAlgorithms = 6;

enum class Direction : int32_t { kFprop = 0, kDgrad = 1, kWgrad = 2 };

inline const char* direction_name(Direction direction) {
  switch (direction) {
    case Direction::kFprop: return "fprop";
    case Direction::kDgrad: return "dgrad";
    case Direction::kWgrad: return "wgrad";
  }
  return "";
}

struct Choice {
  Algorithm algorithm;
  const char* reason;  // null, or why the requested algorithm cannot do it
  const char* name;
};

}  // namespace fbc
