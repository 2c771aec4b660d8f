// Activations whose kind is known at run time only, as device functions: one branch for all values
// of a call, so that a warp never diverges. The formulas are those of core/activation.h.
#pragma once

#include "../core/activation.h"
#include "gpu.cuh"

namespace fbc::cuda {

// apply(name) for every activation.
#define FBC_ACTIVATIONS(apply)                                                                                        \
  apply(kLinear) apply(kRelu) apply(kRelu6) apply(kLeakyRelu) apply(kElu) apply(kSelu) apply(kSigmoid) apply(kTanh)   \
      apply(kSoftplus) apply(kSoftsign) apply(kExponential) apply(kHardSigmoid) apply(kHardSigmoidTorch) apply(kSilu) \
          apply(kMish) apply(kGelu) apply(kGeluTanh)

// z[i] <- activation(z[i]).
template <typename T, int kCount>
FBC_DEVICE void activate_each(Activation activation, T (&z)[kCount], T param) {
  switch (activation) {
#define FBC_CASE(name)                                                                  \
  case Activation::name:                                                                \
    FBC_UNROLL                                                                          \
    for (int i = 0; i < kCount; ++i) z[i] = activate<Activation::name, T>(z[i], param); \
    break;
    FBC_ACTIVATIONS(FBC_CASE)
#undef FBC_CASE
  }
}

// grad[i] <- grad[i] * activation'(saved[i]). A masked gradient is zero even where it is infinite.
template <typename T, int kCount>
FBC_DEVICE void differentiate_each(Activation activation, const T (&saved)[kCount], T (&grad)[kCount], T param) {
  switch (activation) {
#define FBC_CASE(name)                                                             \
  case Activation::name:                                                           \
    FBC_UNROLL                                                                     \
    for (int i = 0; i < kCount; ++i) {                                             \
      const T slope = activation_derivative<Activation::name, T>(saved[i], param); \
      grad[i] = slope == T(0) ? T(0) : grad[i] * slope;                            \
    }                                                                              \
    break;
    FBC_ACTIVATIONS(FBC_CASE)
#undef FBC_CASE
  }
}
#undef FBC_ACTIVATIONS

FBC_DEVICE float activate_at_run_time(Activation activation, float z, float param) {
  float value[1] = {z};
  activate_each(activation, value, param);
  return value[0];
}

}  // namespace fbc::cuda
