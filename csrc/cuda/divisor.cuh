// Division of an int32 by an extent that the host knows: one wide multiplication and a shift.
//
//   floor(x / d) = x * multiplier >> (31 + shift)     shift = ceil(log2 d),
//                                                     multiplier = ceil(2^(31 + shift) / d)
// for 0 <= x < 2^31, 1 <= d < 2^31: with e = multiplier * d - 2^(31 + shift) < d <= 2^shift the
// product exceeds x * 2^(31 + shift) / d by x * e / d < 2^(31 + shift) / d, too little to reach the
// next quotient. (T. Granlund, P. L. Montgomery, "Division by invariant integers using
// multiplication", PLDI 1994, theorem 4.2.)
#pragma once

#include <cstdint>

#include "../core/macros.h"

namespace fbc::cuda {

struct Divisor {
  int32_t value;
  uint32_t multiplier;
  int32_t shift;

  FBC_INLINE int32_t divide(int32_t x) const {
    return static_cast<int32_t>(static_cast<uint64_t>(multiplier) * static_cast<uint32_t>(x) >> (31 + shift));
  }
};

// An extent of 0 divides as 1: nothing is enumerated then, but the value must not trap.
inline Divisor divisor(int64_t extent) {
  Divisor d{static_cast<int32_t>(extent > 0 ? extent : 1), 0, 0};
  while ((int64_t{1} << d.shift) < d.value) ++d.shift;
  const uint64_t power = uint64_t{1} << (31 + d.shift);
  d.multiplier = static_cast<uint32_t>((power + static_cast<uint64_t>(d.value) - 1) / static_cast<uint64_t>(d.value));
  return d;
}

}  // namespace fbc::cuda
