// The mean-field normal posterior of one weight, its KL divergence from a normal prior, and every
// derivative, in closed form. One function per formula; kernels on all backends call these.
//
//   scale  = floor + softplus(rho)                      weight = loc + scale * eps
//   KL     = 1/2 d^2 + 1/2 (r^2 - 1) - log r            d = (loc - prior_loc) / prior_scale, nats
//                                                       r = scale / prior_scale
//   dKL/dloc         =  d / prior_scale                 dKL/dscale       = (r - 1/r) / prior_scale
//   dKL/dprior_loc   = -d / prior_scale                 dKL/dprior_scale = (1 - d^2 - r^2) / prior_scale
//   dscale/drho      = sigmoid(rho)
#pragma once

#include "macros.h"
#include "math.h"

namespace fbc {

template <typename T>
FBC_INLINE T scale_from_rho(T rho, T scale_floor, T* t) {
  return scale_floor + softplus(rho, t);
}

template <typename T>
FBC_INLINE T weight_from_eps(T loc, T scale, T eps) {
  return fused_multiply_add(scale, eps, loc);
}

// log(1 + f) = f + f^2 * tail(f) as in log1p_tail(), but exact at f = 0 and of degree 7: the divergence
// of a scale near the prior's is a difference of f^2 and f^2 * tail, where log1p_tail() would leave
// 3.5e-6 of it as error.
FBC_INLINE float kl_log1p_tail(float f) {
  float q = 0.0878131241f;
  q = fused_multiply_add(q, f, -0.141764507f);
  q = fused_multiply_add(q, f, 0.148416057f);
  q = fused_multiply_add(q, f, -0.165868461f);
  q = fused_multiply_add(q, f, 0.199716240f);
  q = fused_multiply_add(q, f, -0.250011504f);
  q = fused_multiply_add(q, f, 0.333336651f);
  return fused_multiply_add(q, f, -0.5f);
}

// 1/2 (r^2 - 1) - log r >= 0. Near r = 1 both halves are r - 1 to first order and would cancel, so
// with r = 1 + f their difference f^2 (1/2 - tail) is formed directly. Relative error below 5e-7.
FBC_INLINE float kl_scale_term(float r) {
  const SplitFloat s = split_at_sqrt2(r);
  const float f = s.fraction;
  const float tail = kl_log1p_tail(f);
  const float near_one = f * f * (0.5f - tail);
  const float log_r = fused_multiply_add(s.exponent, kLogOfTwo, fused_multiply_add(f * f, tail, f));
  const float far = fused_multiply_add(0.5f * r, r, -0.5f) - log_r;
  return s.exponent == 0.0f ? near_one : far;
}
FBC_INLINE double kl_scale_term(double r) {
  const double l = std::log(r);
  return 0.5 * std::expm1(2.0 * l) - l;
}

template <typename T>
FBC_INLINE T kl_normal_normal(T loc, T scale, T prior_loc, T inverse_prior_scale) {
  const T d = (loc - prior_loc) * inverse_prior_scale;
  return fused_multiply_add(T(0.5) * d, d, kl_scale_term(scale * inverse_prior_scale));
}

template <typename T>
struct PosteriorGrad {
  T loc;
  T rho;
};

// grad_weight: gradient of the loss by the sampled weight; grad_kl: by the KL; t = exp(-|rho|). One division
// serves sigmoid(rho) and 1 / scale: both have the factor 1 / ((1 + t) scale).
template <typename T>
FBC_INLINE PosteriorGrad<T> posterior_grad_from(T t, T scale, T grad_weight, T grad_weight_eps, T grad_kl, T loc, T rho,
                                                T prior_loc, T inverse_prior_scale) {
  const T inverse_variance = inverse_prior_scale * inverse_prior_scale;
  const T factor = (rho >= T(0) ? T(1) : t) / ((T(1) + t) * scale);  // sigmoid(rho) / scale
  const T by_scale = fused_multiply_add(grad_kl * scale, inverse_variance, grad_weight_eps);
  return {fused_multiply_add(grad_kl * (loc - prior_loc), inverse_variance, grad_weight),
          factor * fused_multiply_add(by_scale, scale, -grad_kl)};
}

template <typename T>
FBC_INLINE PosteriorGrad<T> posterior_grad(T grad_weight, T grad_weight_eps, T grad_kl, T loc, T rho, T prior_loc,
                                           T inverse_prior_scale, T scale_floor) {
  T t;
  const T scale = scale_from_rho(rho, scale_floor, &t);
  return posterior_grad_from(t, scale, grad_weight, grad_weight_eps, grad_kl, loc, rho, prior_loc, inverse_prior_scale);
}

template <typename T>
struct PriorGrad {
  T loc;
  T scale;
};

template <typename T>
FBC_INLINE PriorGrad<T> kl_prior_grad(T grad_kl, T loc, T scale, T prior_loc, T inverse_prior_scale) {
  const T d = (loc - prior_loc) * inverse_prior_scale;
  const T r = scale * inverse_prior_scale;
  const T g = grad_kl * inverse_prior_scale;
  return {-g * d, g * (T(1) - d * d - r * r)};
}

}  // namespace fbc
