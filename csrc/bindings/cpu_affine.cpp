// bconv2d_affine and bconv2d_affine_backward under the CPU key.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "affine_call.h"
#include "posterior_pass.h"

namespace fbc {

namespace {

ConvCall make_affine_call(const ConvTensors& tensors, ConvOptions options, int64_t estimator, int64_t row_offset) {
  expect_defined("weight_rho", *tensors.weight_rho);
  TORCH_CHECK_VALUE(estimator > 0 && estimator < kNumEstimators, "estimator: expected 1 (flipout) or 2 (local), got ",
                    estimator);
  TORCH_CHECK_VALUE(row_offset >= 0 && row_offset <= kMaxRowOffset, "row_offset: expected a value from 0 to ",
                    kMaxRowOffset, ", got ", row_offset);
  options.estimator = estimator;
  options.row_offset = row_offset;
  return make_conv_call(tensors, options);
}

bool is_local(const ConvCall& call) { return static_cast<Estimator>(call.options.estimator) == Estimator::kLocal; }

template <typename T>
void forward(const ConvCall& call, AffineOutputs* out) {
  if (!call.is_empty()) {
    is_local(call) ? forward_local<T>(call, out) : forward_flipout<T>(call, out);
    return;
  }
  out->output = empty_output(call);
  if (call.options.weight_kl) out->kl += kl_divergence(host_posterior_params<T>(call.weight));
  if (call.has_bias() && call.options.bias_kl) out->kl += kl_divergence(host_posterior_params<T>(call.bias));
}

Tensors4 forward_affine_cpu(const ConvCall& call, bool save_pre_activation) {
  AffineOutputs out = {};
  if (save_pre_activation) out.pre_activation = empty_output(call);
  if (call.parameter_dtype() == at::kDouble) {
    forward<double>(call, &out);
  } else {
    forward<float>(call, &out);
  }
  if (!save_pre_activation) out.pre_activation = at::empty({0}, call.input->options());
  if (!out.deviation.defined()) {
    const ConvShape& s = call.shape;
    out.deviation = is_local(call) ? empty_nhwc(call, s.N, s.P, s.Q, s.K) : empty_gradient(*call.weight.loc);
  }
  const at::Tensor kl = call.wants_kl() ? scalar_like(*call.weight.loc, out.kl) : empty_gradient(*call.weight.loc);
  return {out.output, kl, out.pre_activation, out.deviation};
}

Tensors4 bconv2d_affine_cpu(const at::Tensor& input, const at::Tensor& weight_loc, const at::Tensor& weight_rho,
                            const OptionalTensor& bias_loc, const OptionalTensor& bias_rho, const at::Tensor& seed,
                            const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                            const OptionalTensor& bias_prior_loc, const OptionalTensor& bias_prior_scale,
                            int64_t estimator, Doubles prior, bool weight_kl, bool bias_kl, double scale_floor,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                            int64_t activation, double activation_param, int64_t num_samples, bool share_input,
                            int64_t offset_add, at::IntArrayRef element_offset, int64_t row_offset, int64_t algorithm,
                            bool save_pre_activation) {
  const ConvTensors tensors = {&input,
                               &weight_loc,
                               &weight_rho,
                               get_if_defined(bias_loc),
                               get_if_defined(bias_rho),
                               &seed,
                               get_if_defined(prior_loc),
                               get_if_defined(prior_scale),
                               get_if_defined(bias_prior_loc),
                               get_if_defined(bias_prior_scale)};
  const ConvCall call = make_affine_call(
      tensors,
      conv_options(prior, weight_kl, bias_kl, scale_floor, stride, padding, dilation, groups, activation,
                   activation_param, num_samples, share_input, offset_add, element_offset, algorithm),
      estimator, row_offset);
  return forward_affine_cpu(call, save_pre_activation);
}

// ---- backward -----------------------------------------------------------------------------------

// In the memory that kernels read; null where there is none.
at::Tensor checked_deviation(const ConvCall& call, const OptionalTensor& given) {
  const ConvShape& s = call.shape;
  const at::Tensor* deviation = get_if_defined(given);
  if (!is_local(call)) return {};
  TORCH_CHECK_VALUE(deviation != nullptr, "deviation: expected the fourth result of the forward pass, got None");
  const std::array<int64_t, 4> image = {s.N, s.K, s.P, s.Q};
  expect_shape("deviation", image, deviation->sizes());
  expect_dtype("deviation", call.parameter_dtype(), *deviation);
  expect_device("deviation", call.input->device(), *deviation);
  return deviation->permute({0, 2, 3, 1}).contiguous().permute({0, 3, 1, 2});
}

template <typename T>
PosteriorGradients bias_gradients(const ConvCall& call, const at::Tensor& grad_bias, double grad_kl,
                                  const std::array<bool, 9>& mask) {
  PosteriorGradients out;
  for (at::Tensor* grad : {&out.loc, &out.rho, &out.prior_loc, &out.prior_scale}) {
    *grad = empty_gradient(*call.weight.loc);  // results of an operator share no memory
  }
  if (!call.has_bias()) return out;
  GradientBinder<T> bias(call.bias, {mask[3], mask[4], mask[7], mask[8]}, call.options.bias_kl ? grad_kl : 0);
  if (grad_bias.defined()) bias.set_grad_sample(grad_bias);
  bias.run(host_posterior_params<T>(call.bias));
  return bias.finish();
}

template <typename T>
Tensors9 backward(const ConvCall& call, const ConvBackward& back, const at::Tensor& deviation, double grad_kl,
                  const std::array<bool, 9>& mask) {
  GradientBinder<T> weight(call.weight, {mask[1], mask[2], mask[5], mask[6]}, call.options.weight_kl ? grad_kl : 0);
  at::Tensor grad_input = at::empty({0}, call.input->options()), grad_bias;
  const auto format = call.input->options().memory_format(call.format);
  if (call.is_empty()) {
    if (mask[0]) grad_input = at::zeros_like(*call.input, call.input->options(), call.format);
    weight.run(host_posterior_params<T>(call.weight));
  } else {
    const PreActivationGradient z = activation_backward_direct<T>(call, back, call.parameter_dtype());
    grad_bias = z.grad_bias;
    if (mask[0]) grad_input = advised(at::empty(call.input->sizes(), format));
    const at::Tensor wanted_input = mask[0] ? grad_input : at::Tensor();
    if (!mask[0] && !weight.wants_anything()) {
      // A bias alone.
    } else if (is_local(call)) {
      backward_local<T>(call, z.grad, deviation, wanted_input, weight.grads);
    } else {
      backward_flipout<T>(call, z.grad, wanted_input, weight.grads);
    }
  }
  const PosteriorGradients w = weight.finish();
  const PosteriorGradients b = bias_gradients<T>(call, grad_bias, grad_kl, mask);
  return {grad_input, w.loc, w.rho, b.loc, b.rho, w.prior_loc, w.prior_scale, b.prior_loc, b.prior_scale};
}

Tensors9 bconv2d_affine_backward_cpu(
    const at::Tensor& grad_output, const OptionalTensor& grad_kl, const at::Tensor& input, const OptionalTensor& saved,
    const OptionalTensor& deviation, const at::Tensor& weight_loc, const at::Tensor& weight_rho,
    const OptionalTensor& bias_loc, const OptionalTensor& bias_rho, const at::Tensor& seed,
    const OptionalTensor& prior_loc, const OptionalTensor& prior_scale, const OptionalTensor& bias_prior_loc,
    const OptionalTensor& bias_prior_scale, int64_t estimator, Doubles prior, bool weight_kl, bool bias_kl,
    double scale_floor, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    int64_t activation, double activation_param, int64_t num_samples, bool share_input, int64_t offset_add,
    at::IntArrayRef element_offset, int64_t row_offset, int64_t algorithm, std::array<bool, 9> mask) {
  const ConvTensors tensors = {&input,
                               &weight_loc,
                               &weight_rho,
                               get_if_defined(bias_loc),
                               get_if_defined(bias_rho),
                               &seed,
                               get_if_defined(prior_loc),
                               get_if_defined(prior_scale),
                               get_if_defined(bias_prior_loc),
                               get_if_defined(bias_prior_scale)};
  const ConvCall call = make_affine_call(
      tensors,
      conv_options(prior, weight_kl, bias_kl, scale_floor, stride, padding, dilation, groups, activation,
                   activation_param, num_samples, share_input, offset_add, element_offset, algorithm),
      estimator, row_offset);
  const bool linear = call.activation == Activation::kLinear;
  const ConvBackward back = {&grad_output,       linear ? nullptr : get_if_defined(saved),
                             /*weight=*/nullptr, mask[0],
                             mask[1] || mask[2], call.has_bias() && (mask[3] || mask[4])};
  check_conv_backward(call, back);
  const at::Tensor sums = checked_deviation(call, deviation);
  double by_kl = 0.0;
  if (const at::Tensor* kl = call.wants_kl() ? get_if_defined(grad_kl) : nullptr) {
    expect_shape("grad_kl", {}, kl->sizes());
    expect_device("grad_kl", call.input->device(), *kl);
    by_kl = kl->item().toDouble();
  }
  return call.parameter_dtype() == at::kDouble ? backward<double>(call, back, sums, by_kl, mask)
                                               : backward<float>(call, back, sums, by_kl, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, CPU, m) {
  m.impl("bconv2d_affine", bconv2d_affine_cpu);
  m.impl("bconv2d_affine_backward", bconv2d_affine_backward_cpu);
}

}  // namespace fbc
