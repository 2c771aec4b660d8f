// How noise enters z = conv(x, w), w ~ N(loc, scale^2); delta = scale * eps.
//
//   reparameterization  z = conv(x, loc + delta)                            one draw for all rows
//   flipout             z = conv(x, loc) + t * conv(x * r, delta)           signs r (n, c), t (n, k)
//   local               z = conv(x, loc) + e * sqrt(conv(x^2, scale^2))     noise e (n, p, q, k)
//
// Sources: fastbconv/estimators.py.
#pragma once

#include <cstdint>

namespace fbc {

enum class Estimator : int32_t { kReparameterization = 0, kFlipout = 1, kLocal = 2 };
constexpr int32_t kNumEstimators = 3;

// Of the number of a call's first row: with it those of elements, row * elements of a row, are 64-bit
// integers.
constexpr int64_t kMaxRowOffset = int64_t{1} << 32;

}  // namespace fbc
