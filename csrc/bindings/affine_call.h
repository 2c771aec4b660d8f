// Flipout (provider_flipout.cpp) and local reparameterisation (provider_local.cpp) of one checked
// convolution, on the CPU.
#pragma once

#include <ATen/ops/empty.h>

#include "../core/estimator.h"
#include "conv_call.h"

namespace fbc {

struct AffineOutputs {
  at::Tensor output;
  at::Tensor pre_activation;  // filled where defined on entry
  at::Tensor deviation;       // local: (images, K, P, Q) in NHWC memory; else undefined
  double kl;
};

// (rows, channels, height, width) in NHWC memory and the parameters' dtype.
inline at::Tensor empty_nhwc(const ConvCall& call, int64_t rows, int64_t height, int64_t width, int64_t channels) {
  const at::Tensor dense = advised(at::empty({rows, height, width, channels},
                                             call.weight.loc->options().memory_format(at::MemoryFormat::Contiguous)));
  return dense.permute({0, 3, 1, 2});
}

template <typename T>
void forward_flipout(const ConvCall& call, AffineOutputs* out);
template <typename T>
void forward_local(const ConvCall& call, AffineOutputs* out);

// Gradients by the input and by the weight's posterior from that by the pre-activation: grad
// (output rows, K, P, Q) in NHWC memory and the parameters' dtype. grad_input is allocated like the
// input, undefined where it is not wanted; grads says what is wanted of the posterior.
template <typename T>
void backward_flipout(const ConvCall& call, const at::Tensor& grad, const at::Tensor& grad_input,
                      const PosteriorGrads<T>& grads);
template <typename T>
void backward_local(const ConvCall& call, const at::Tensor& grad, const at::Tensor& deviation,
                    const at::Tensor& grad_input, const PosteriorGrads<T>& grads);

}  // namespace fbc
