// The dispatcher's kernels of bconv2d and bconv2d_backward for one device: they gather and check
// the arguments, then run what the device brings.
//
//   forward    (call, keep_weight, save_pre_activation) -> the four results
//   backward   (call, back, grad_kl or null, output_mask) -> the nine gradients
#pragma once

#include "conv_call.h"

namespace fbc {

template <Tensors4 (*forward)(const ConvCall&, bool, bool)>
Tensors4 bconv2d_entry(const at::Tensor& input, const at::Tensor& weight_loc, const OptionalTensor& weight_rho,
                       const OptionalTensor& bias_loc, const OptionalTensor& bias_rho, const at::Tensor& seed,
                       const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                       const OptionalTensor& bias_prior_loc, const OptionalTensor& bias_prior_scale, Doubles prior,
                       bool weight_kl, bool bias_kl, double scale_floor, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t activation,
                       double activation_param, int64_t num_samples, bool share_input, int64_t offset_add,
                       at::IntArrayRef element_offset, int64_t algorithm, bool keep_weight, bool save_pre_activation) {
  const ConvTensors tensors = {&input,
                               &weight_loc,
                               get_if_defined(weight_rho),
                               get_if_defined(bias_loc),
                               get_if_defined(bias_rho),
                               &seed,
                               get_if_defined(prior_loc),
                               get_if_defined(prior_scale),
                               get_if_defined(bias_prior_loc),
                               get_if_defined(bias_prior_scale)};
  const ConvCall call = make_conv_call(
      tensors, conv_options(prior, weight_kl, bias_kl, scale_floor, stride, padding, dilation, groups, activation,
                            activation_param, num_samples, share_input, offset_add, element_offset, algorithm));
  return forward(call, keep_weight, save_pre_activation);
}

template <Tensors9 (*backward)(const ConvCall&, const ConvBackward&, const at::Tensor*, const std::array<bool, 9>&)>
Tensors9 bconv2d_backward_entry(const at::Tensor& grad_output, const OptionalTensor& grad_kl, const at::Tensor& input,
                                const OptionalTensor& saved, const OptionalTensor& weight, const at::Tensor& weight_loc,
                                const OptionalTensor& weight_rho, const OptionalTensor& bias_loc,
                                const OptionalTensor& bias_rho, const at::Tensor& seed, const OptionalTensor& prior_loc,
                                const OptionalTensor& prior_scale, const OptionalTensor& bias_prior_loc,
                                const OptionalTensor& bias_prior_scale, Doubles prior, bool weight_kl, bool bias_kl,
                                double scale_floor, at::IntArrayRef stride, at::IntArrayRef padding,
                                at::IntArrayRef dilation, int64_t groups, int64_t activation, double activation_param,
                                int64_t num_samples, bool share_input, int64_t offset_add,
                                at::IntArrayRef element_offset, int64_t algorithm, std::array<bool, 9> output_mask) {
  const ConvTensors tensors = {&input,
                               &weight_loc,
                               get_if_defined(weight_rho),
                               get_if_defined(bias_loc),
                               get_if_defined(bias_rho),
                               &seed,
                               get_if_defined(prior_loc),
                               get_if_defined(prior_scale),
                               get_if_defined(bias_prior_loc),
                               get_if_defined(bias_prior_scale)};
  const ConvCall call = make_conv_call(
      tensors, conv_options(prior, weight_kl, bias_kl, scale_floor, stride, padding, dilation, groups, activation,
                            activation_param, num_samples, share_input, offset_add, element_offset, algorithm));
  const bool linear = call.activation == Activation::kLinear;
  const ConvBackward back = {
      &grad_output,   linear ? nullptr : get_if_defined(saved), get_if_defined(weight),
      output_mask[0], output_mask[1] || output_mask[2],         call.has_bias() && (output_mask[3] || output_mask[4])};
  check_conv_backward(call, back);
  const at::Tensor* by_kl = call.wants_kl() ? get_if_defined(grad_kl) : nullptr;
  if (by_kl != nullptr) {
    expect_shape("grad_kl", {}, by_kl->sizes());
    expect_device("grad_kl", input.device(), *by_kl);
  }
  return backward(call, back, by_kl, output_mask);
}

}  // namespace fbc
