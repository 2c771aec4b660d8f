// Storage types and the type their sums are kept in.
//
//   storage   float  double  BFloat16  Half        what a tensor in memory holds
//   acc_t     float  double  float     float       what products are summed in
//
// BFloat16 and Half are plain 16-bit patterns with IEEE round-to-nearest-even conversions, so that
// kernels need no framework type. Sources of the conversions: IEEE 754-2019 sections 3.4 and 4.3.1.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace fbc {

enum class Dtype : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

FBC_INLINE uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FBC_INLINE float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename scalar_t>
struct AccType {
  using type = float;
};
template <>
struct AccType<double> {
  using type = double;
};
template <typename scalar_t>
using acc_t = typename AccType<scalar_t>::type;

FBC_INLINE float load_as_acc(const float* p) { return *p; }
FBC_INLINE double load_as_acc(const double* p) { return *p; }
FBC_INLINE float load_as_acc(const BFloat16* p) { return bits_to_float(static_cast<uint32_t>(p->bits) << 16); }

// Half -> float, exact. Subnormals are small integers times 2^-24, and never pass through a float
// subnormal, which a processor may be told to flush to zero.
FBC_INLINE float load_as_acc(const Half* p) {
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  const uint32_t exponent = p->bits & 0x7c00u, mantissa = p->bits & 0x3ffu;
  const uint32_t shifted = static_cast<uint32_t>(p->bits & 0x7fffu) << 13;
  uint32_t bits = shifted + 0x38000000u;  // exponent bias 15 -> 127
  if (exponent == 0x7c00u) bits = shifted | 0x7f800000u;
  if (exponent == 0) bits = float_to_bits(static_cast<float>(mantissa) * 5.960464477539063e-08f);
  return bits_to_float(bits | sign);
}

FBC_INLINE void store_from_acc(float* p, float value) { *p = value; }
FBC_INLINE void store_from_acc(double* p, double value) { *p = value; }
FBC_INLINE void store_from_acc(BFloat16* p, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = static_cast<uint16_t>((is_nan ? (bits | 0x400000u) : rounded) >> 16);
}

// float -> Half, to nearest even. Normal results round in integer arithmetic; subnormal results let
// one float addition round (0.5 has its last bit at 2^-24, the spacing of subnormal halves).
FBC_INLINE void store_from_acc(Half* p, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(half | sign);
}

}  // namespace fbc
