// The convolution operators on the device: what cuda_ops.cpp hands to the two providers.
//
//   library   one sampling launch, ATen's (cuDNN's) convolution, one launch for bias and activation
//   direct    the one-pass kernels of csrc/cuda: sampling, convolution, bias, activation at once
//
// Nothing here waits for the device or reads its memory.
#pragma once

#include "device.h"

#include "../cuda/candidates.h"
#include "../cuda/kernels.h"
#include "conv_call.h"

namespace fbc::device {

// Tensors of a forward pass. pre_activation and weight are filled where defined on entry; kl where
// an element of the parameters' dtype stands.
struct Forward {
  at::Tensor output, pre_activation, weight;
  at::Tensor weight_kl, bias_kl;
};

// Gradients by the convolution's operands.
struct Operands {
  at::Tensor input;             // undefined where not wanted, likewise below
  at::Tensor weight;            // (draws, K, C/G, R, S), any dtype and strides; draws is num_samples or 1
  at::Tensor slabs, slabs_eps;  // or this: of the one-pass kernels
  at::Tensor bias;              // (num_samples, K) in acc_t of the input
};

// Where a weight or bias has no noise, its draws are all the same: one is enough.
inline bool is_sampled(const PosteriorTensors& t) { return t.rho != nullptr; }

Site forward_site(const ConvCall& call);
Site backward_site(const ConvCall& call);

// Draws the weight into `weight` (num_samples or 1 of them, undefined: not) and the bias into
// `bias`, with the KLs that `forward` wants, in one launch.
void draw_parameters(const ConvCall& call, const at::Tensor& weight, const at::Tensor& bias, const Forward& forward);

// (num_samples, K) in `dtype`: drawn by draw_parameters(), or what the layer was given. `drawn`
// tells which.
at::Tensor bias_rows(const ConvCall& call, at::ScalarType dtype, bool* drawn);

// (draws, K, C/G, R, S), not filled. KRSC memory, or with `format` contiguous that of the
// parameters.
at::Tensor empty_weight(const ConvCall& call, int64_t draws, at::MemoryFormat format);

// out <- activation(out + bias), with out + bias in pre_activation where that is defined.
void apply_bias_activation(const ConvCall& call, const at::Tensor& bias, const at::Tensor& output,
                           const at::Tensor& pre_activation);

// Gradient by the pre-activation in the input's dtype and the given format, and its sums
// (num_samples, K). A linear layer's gradient is passed on as it is.
struct PreActivation {
  at::Tensor grad, grad_bias;
};
PreActivation activation_backward(const ConvCall& call, const ConvBackward& back, at::MemoryFormat format);

void forward_library(const ConvCall& call, Forward* out);
Operands backward_library(const ConvCall& call, const ConvBackward& back);

void forward_direct(const ConvCall& call, Forward* out);
// direct: the directions that the one-pass kernels compute.
Operands backward_direct(const ConvCall& call, const ConvBackward& back);

}  // namespace fbc::device
