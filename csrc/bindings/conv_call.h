// One checked convolution: what cpu_ops.cpp and cuda_ops.cpp hand to a provider. Two providers
// compute it; on the CPU:
//
//   direct    the one-pass kernels of csrc/cpu (provider_direct.cpp)
//   library   our fused sampling pass, ATen's convolution, our epilogue (provider_library.cpp)
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "../core/activation.h"
#include "../cpu/kernels.h"
#include "../cpu/select.h"
#include "signatures.h"
#include "tensor_args.h"

namespace fbc {

struct ConvCall {
  ConvShape shape;
  ConvOptions options;
  Activation activation;
  const at::Tensor* input;
  PosteriorTensors weight;
  PosteriorTensors bias;         // bias.loc null: no bias
  c10::MemoryFormat format;      // of the input, so of the output
  at::ScalarType compute_dtype;  // of the input
  FlipSigns signs = {};          // for the direct provider: Flipout by weights of rows

  bool has_bias() const { return bias.loc != nullptr; }
  bool wants_kl() const { return options.weight_kl || options.bias_kl; }
  bool is_empty() const { return shape.output_rows() == 0 || shape.P == 0 || shape.Q == 0; }
  at::ScalarType parameter_dtype() const { return weight.dtype(); }
  ConvProblem problem() const;  // for the CPU
};

// Pointers into the operator's arguments; null: absent.
struct ConvTensors {
  const at::Tensor *input, *weight_loc, *weight_rho, *bias_loc, *bias_rho, *seed, *prior_loc, *prior_scale,
      *bias_prior_loc, *bias_prior_scale;
};

// Checks everything that memory safety needs and resolves the extents.
ConvCall make_conv_call(const ConvTensors& tensors, const ConvOptions& options);

// (output rows, K, P, Q) like the input, not filled.
at::Tensor empty_output(const ConvCall& call);

// Exactly the strides of at::empty(..., format): ATen is free to choose others for extents of 1.
at::Tensor with_canonical_strides(const at::Tensor& tensor, at::ScalarType dtype, at::MemoryFormat format);

struct ConvOutputs {
  at::Tensor output;
  at::Tensor pre_activation;  // filled where defined on entry
  at::Tensor weight;          // (num_samples, K, C/G, R, S) in KRSC memory; filled where defined
  double kl;
};

// Gradients by the convolution's operands, the step before the posterior's gradients.
struct ConvBackward {
  const at::Tensor* grad_output;
  const at::Tensor* saved;   // output or pre-activation; null for linear
  const at::Tensor* weight;  // kept weight; null: drawn again
  bool wants_input, wants_weight, wants_bias;
};

// Shapes, dtypes and devices of `back`.
void check_conv_backward(const ConvCall& call, const ConvBackward& back);

// method: kDirect or one of Winograd's, likewise below.
template <typename T>
void forward_direct(const ConvCall& call, Algorithm method, ConvOutputs* out);
template <typename T>
void forward_library(const ConvCall& call, ConvOutputs* out);

// d loss / d pre-activation with the sums that make the bias gradient (num_samples, K).
struct PreActivationGradient {
  at::Tensor grad;
  at::Tensor grad_bias;  // undefined where not wanted
};

// Whether the method reads the gradient in bfloat16 (KernelTable::pairs); else in the parameters' dtype.
bool reads_bf16_gradient(const ConvCall& call, Algorithm method);
// grad as (rows, K, P, Q) in NHWC memory; grad_dtype: the parameters', or bfloat16. Bias sums are not rounded.
template <typename T>
PreActivationGradient activation_backward_direct(const ConvCall& call, const ConvBackward& back,
                                                 at::ScalarType grad_dtype);
// grad in the input's dtype and memory format.
PreActivationGradient activation_backward_library(const ConvCall& call, const ConvBackward& back);

// Input gradient into grad_input, allocated like the input. kept: the draws; null: drawn again.
template <typename T>
void dgrad_direct(const ConvCall& call, Algorithm method, const at::Tensor* kept, const at::Tensor& grad,
                  const at::Tensor& grad_input);

// Whether wgrad_of_output() is what the weight's gradients are best made with: in a first layer, where nobody
// else reads the gradient by the pre-activation.
bool reads_output_gradient(const ConvCall& call, Algorithm method, const ConvBackward& back);
// wgrad_direct() from the gradient by the output; returns what makes the bias gradient, (num_samples, K).
template <typename T>
at::Tensor wgrad_of_output(const ConvCall& call, const ConvBackward& back, const PosteriorGrads<T>& grads);

// Fills the weight's gradients from the pre-activation gradient, KL included.
template <typename T>
void wgrad_direct(const ConvCall& call, Algorithm method, const at::Tensor& grad, const PosteriorGrads<T>& grads);

// What `back` wants. weight: (num_samples, K, C/G, R, S) and bias: (num_samples, K), in the
// parameters' dtype; undefined where not wanted.
struct LibraryGradients {
  at::Tensor input, weight, bias;
};
template <typename T>
LibraryGradients backward_library(const ConvCall& call, const ConvBackward& back, const at::Tensor& grad);

// Draws every sample of the bias: (num_samples, K) in the parameters' dtype. kl as for
// draw_sample().
template <typename T>
at::Tensor draw_bias(const ConvCall& call, double* kl);

}  // namespace fbc
