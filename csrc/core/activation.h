// Activations of the kernel epilogue and their derivatives: the one native list.
//
// `param` is the slope of leaky_relu and the alpha of elu. activation_derivative() receives what
// backward has saved: the output where the derivative can be had from it (needs_pre_activation()
// false), else the pre-activation. The Python list is fastbconv/activations.py; a test compares them.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"
#include "math.h"

namespace fbc {

enum class Activation : int32_t {
  kLinear = 0,
  kRelu = 1,
  kRelu6 = 2,
  kLeakyRelu = 3,
  kElu = 4,
  kSelu = 5,
  kSigmoid = 6,
  kTanh = 7,
  kSoftplus = 8,
  kSoftsign = 9,
  kExponential = 10,
  kHardSigmoid = 11,       // Keras: clip(0.2 z + 0.5, 0, 1)
  kHardSigmoidTorch = 12,  // torch: clip(z / 6 + 0.5, 0, 1)
  kSilu = 13,
  kMish = 14,
  kGelu = 15,
  kGeluTanh = 16,
};
constexpr int32_t kNumActivations = 17;

FBC_INLINE bool needs_pre_activation(Activation a) {
  return static_cast<int32_t>(a) >= static_cast<int32_t>(Activation::kSilu);
}

template <typename T>
struct ActivationConstants {
  static constexpr T kSeluScale = T(1.0507009873554804934193349852946);
  static constexpr T kSeluAlpha = T(1.6732632423543772848170429916717);
  static constexpr T kInverseSqrt2 = T(0.70710678118654752440);
  static constexpr T kInverseSqrt2Pi = T(0.39894228040143267794);
  static constexpr T kSqrt2OverPi = T(0.79788456080286535588);
  static constexpr T kGeluCubic = T(0.044715);
};

template <typename T>
FBC_INLINE T sigmoid_of(T z) {
  return sigmoid_from(z, T(std::exp(-std::fabs(z))));
}
template <typename T>
FBC_INLINE T softplus_of(T z) {
  return std::log1p(std::exp(-std::fabs(z))) + (z > T(0) ? z : T(0));
}
template <typename T>
FBC_INLINE T clip(T z, T lo, T hi) {  // NaN stays NaN
  return z < lo ? lo : (z > hi ? hi : z);
}

template <Activation kActivation, typename T>
FBC_INLINE T activate(T z, T param) {
  using Const = ActivationConstants<T>;
  switch (kActivation) {
    case Activation::kLinear: return z;
    case Activation::kRelu: return z < T(0) ? T(0) : z;
    case Activation::kRelu6: return clip(z, T(0), T(6));
    case Activation::kLeakyRelu: return z < T(0) ? param * z : z;
    case Activation::kElu: return z < T(0) ? param * T(std::expm1(z)) : z;
    case Activation::kSelu: return Const::kSeluScale * (z < T(0) ? Const::kSeluAlpha * T(std::expm1(z)) : z);
    case Activation::kSigmoid: return sigmoid_of(z);
    case Activation::kTanh: return std::tanh(z);
    case Activation::kSoftplus: return softplus_of(z);
    case Activation::kSoftsign: return z / (T(1) + std::fabs(z));
    case Activation::kExponential: return std::exp(z);
    case Activation::kHardSigmoid: return clip(T(0.2) * z + T(0.5), T(0), T(1));
    case Activation::kHardSigmoidTorch: return clip(z / T(6) + T(0.5), T(0), T(1));
    case Activation::kSilu: return z * sigmoid_of(z);
    case Activation::kMish: return z * T(std::tanh(softplus_of(z)));
    case Activation::kGelu: return T(0.5) * z * (T(1) + T(std::erf(z * Const::kInverseSqrt2)));
    case Activation::kGeluTanh: {
      const T inner = Const::kSqrt2OverPi * (z + Const::kGeluCubic * z * z * z);
      return T(0.5) * z * (T(1) + T(std::tanh(inner)));
    }
  }
  return z;
}

// d activation / d z from y (the output), or from z for the last four. Comparisons are such that NaN goes
// where it goes in torch, whose vectors decide where its scalar tails differ (elu, selu): a gradient that
// meets it passes relu. Of relu6 torch's vectors give 0 and its tails 1: as relu, so that it shows.
template <Activation kActivation, typename T>
FBC_INLINE T activation_derivative(T saved, T param) {
  using Const = ActivationConstants<T>;
  const T y = saved, z = saved;
  switch (kActivation) {
    case Activation::kLinear: return T(1);
    case Activation::kRelu: return y <= T(0) ? T(0) : T(1);
    case Activation::kRelu6: return (y <= T(0) || y >= T(6)) ? T(0) : T(1);
    case Activation::kLeakyRelu: return y > T(0) ? T(1) : param;
    case Activation::kElu: return y > T(0) ? T(1) : y + param;
    case Activation::kSelu: return y > T(0) ? Const::kSeluScale : y + Const::kSeluScale * Const::kSeluAlpha;
    case Activation::kSigmoid: return y * (T(1) - y);
    case Activation::kTanh: return T(1) - y * y;
    case Activation::kSoftplus: return -T(std::expm1(-y));
    case Activation::kSoftsign: {
      const T a = T(1) - std::fabs(y);
      return a * a;
    }
    case Activation::kExponential: return y;
    case Activation::kHardSigmoid: return (y > T(0) && y < T(1)) ? T(0.2) : T(0);
    case Activation::kHardSigmoidTorch: return (y > T(0) && y < T(1)) ? T(1) / T(6) : T(0);
    case Activation::kSilu: {
      const T s = sigmoid_of(z);
      return s * (T(1) + z * (T(1) - s));
    }
    case Activation::kMish: {
      const T tau = T(std::tanh(softplus_of(z)));
      return tau + z * (T(1) - tau * tau) * sigmoid_of(z);
    }
    case Activation::kGelu: {
      const T cdf = T(0.5) * (T(1) + T(std::erf(z * Const::kInverseSqrt2)));
      return cdf + z * Const::kInverseSqrt2Pi * T(std::exp(T(-0.5) * z * z));
    }
    case Activation::kGeluTanh: {
      const T inner = Const::kSqrt2OverPi * (z + Const::kGeluCubic * z * z * z);
      const T tau = T(std::tanh(inner));
      const T slope = Const::kSqrt2OverPi * (T(1) + T(3) * Const::kGeluCubic * z * z);
      return T(0.5) * (T(1) + tau) + T(0.5) * z * (T(1) - tau * tau) * slope;
    }
  }
  return T(1);
}

}  // namespace fbc
