// Elementary functions with the same bits on every CPU instruction set and on CUDA.
//
// Ingredients: integer arithmetic, IEEE + - * / sqrt, and fused multiply-adds that are written out.
// The build turns floating-point contraction off (-ffp-contract=off, --fmad=false), so the compiler
// adds none of its own; no fast-math flag anywhere. Every function here is branch-free in float, so
// that a loop over it vectorises. The double overloads call the C library: they serve gradcheck and
// float64 models, whose noise is float32 all the same. (So does the sum of the KL, once in 512 weights.)
//
// Largest errors of the float versions, found by sweeps over their ranges (tests/native/test_math.cpp):
//   log_positive 2.6e-7 relative to max(|log x|, 0.1)   exp_nonpositive 2.5e-7 relative
//   softplus 3.5e-7 relative                            sigmoid 3.2e-7 relative
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"
#include "types.h"

namespace fbc {

FBC_INLINE float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
FBC_INLINE double fused_multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

FBC_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FBC_INLINE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

FBC_INLINE float absolute(float x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }
FBC_INLINE double absolute(double x) { return x < 0 ? -x : x; }

// x = 2^exponent * (1 + fraction), fraction in [sqrt(1/2) - 1, sqrt(2) - 1]. x positive and normal.
struct SplitFloat {
  float exponent;
  float fraction;
};
FBC_INLINE SplitFloat split_at_sqrt2(float x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t shifted = float_to_bits(x) + (0x3f800000u - kSqrtHalf);
  SplitFloat out;
  out.exponent = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
  out.fraction = bits_to_float((shifted & 0x7fffffu) + kSqrtHalf) - 1.0f;
  return out;
}

// log(1 + f) = f + f^2 * log1p_tail(f) on the interval above; minimax polynomial of degree 6.
FBC_INLINE float log1p_tail(float f) {
  float q = -0.10080044f;
  q = fused_multiply_add(q, f, 0.161800802f);
  q = fused_multiply_add(q, f, -0.172436833f);
  q = fused_multiply_add(q, f, 0.199069366f);
  q = fused_multiply_add(q, f, -0.24971202f);
  q = fused_multiply_add(q, f, 0.333347142f);
  return fused_multiply_add(q, f, -0.500003219f);
}

constexpr float kLogOfTwo = 0.693147181f;

FBC_INLINE float log_of_split(SplitFloat s) {
  const float r = fused_multiply_add(s.fraction * s.fraction, log1p_tail(s.fraction), s.fraction);
  return fused_multiply_add(s.exponent, kLogOfTwo, r);
}
FBC_INLINE float log_positive(float x) { return log_of_split(split_at_sqrt2(x)); }
FBC_INLINE double log_positive(double x) { return std::log(x); }

// exp(x) for x <= 0, never below 1.6e-38: the clamp keeps the result normal, so that flushing of
// subnormals changes nothing and a division by it stays finite.
FBC_INLINE float exp_nonpositive(float x) {
  const float y = x > -87.0f ? x : -87.0f;
  const float shifted = fused_multiply_add(y, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: round to int
  const uint32_t n_bits = float_to_bits(shifted);
  const float n = shifted - 12582912.0f;
  float f = fused_multiply_add(n, -0.693359375f, y);  // log 2 in two parts
  f = fused_multiply_add(n, 2.12194440e-4f, f);
  float p = 0.00829765014f;
  p = fused_multiply_add(p, f, 0.0419153906f);
  p = fused_multiply_add(p, f, 0.166675746f);
  p = fused_multiply_add(p, f, 0.499988943f);
  p = fused_multiply_add(p, f, 0.999999702f);
  p = fused_multiply_add(p, f, 1.0f);
  return bits_to_float(float_to_bits(p) + (n_bits << 23));
}
FBC_INLINE double exp_nonpositive(double x) { return std::exp(x > -700.0 ? x : -700.0); }

// softplus(x) = max(x, 0) + log1p(t) with t = exp(-|x|); t is handed out because the derivative
// needs it too: sigmoid(x) = (x >= 0 ? 1 : t) / (1 + t), without cancellation on either side.
FBC_INLINE float log1p_unit(float t) {  // t in [0, 1]
  float p = 0.00523262424f;
  p = fused_multiply_add(p, t, -0.0295049567f);
  p = fused_multiply_add(p, t, 0.0782254934f);
  p = fused_multiply_add(p, t, -0.13663207f);
  p = fused_multiply_add(p, t, 0.191059887f);
  p = fused_multiply_add(p, t, -0.248429775f);
  p = fused_multiply_add(p, t, 0.333190948f);
  p = fused_multiply_add(p, t, -0.499994934f);
  return fused_multiply_add(p, t, 0.99999994f) * t;
}
FBC_INLINE double log1p_unit(double t) { return std::log1p(t); }

template <typename T>
FBC_INLINE T exp_minus_absolute(T x) {
  return exp_nonpositive(-absolute(x));
}

template <typename T>
FBC_INLINE T softplus_from(T x, T t) {
  return log1p_unit(t) + (x < T(0) ? T(0) : x);  // NaN stays NaN
}

template <typename T>
FBC_INLINE T softplus(T x, T* t) {
  *t = exp_minus_absolute(x);
  return softplus_from(x, *t);
}

template <typename T>
FBC_INLINE T sigmoid_from(T x, T t) {
  return (x >= T(0) ? T(1) : t) / (T(1) + t);
}

}  // namespace fbc
