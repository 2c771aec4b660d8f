// bconv2d and bconv2d_backward under the CPU key: check, allocate, choose a provider, call it.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "conv_call.h"
#include "posterior_pass.h"

namespace fbc {

namespace {

Algorithm resolve(const ConvCall& call, Direction direction) {
  const auto requested = static_cast<Algorithm>(call.options.algorithm);
  const Choice choice = select_algorithm(call.problem(), direction, requested);
  TORCH_CHECK_NOT_IMPLEMENTED(
      choice.reason == nullptr, "algorithm: expected one that can compute the ",
      direction_name(direction), " of this convolution, got '", choice.name, "': ", choice.reason);
  return choice.algorithm;
}

// The output itself is left to the provider: ATen's convolution brings its own.
ConvOutputs allocate_outputs(const ConvCall& call, bool keep_weight, bool save_pre_activation) {
  const ConvShape& s = call.shape;
  const auto options = call.input->options();
  ConvOutputs out = {};
  if (save_pre_activation) out.pre_activation = empty_output(call);
  if (keep_weight) {
    out.weight = at::empty({s.num_samples, s.K, s.R, s.S, s.channels_per_group()}, options)
                     .permute({0, 1, 4, 2, 3});
  }
  return out;
}

// No pixel to compute: the KL is what it is, and a weight that was asked for is drawn.
template <typename T>
void forward_empty(const ConvCall& call, ConvOutputs* out) {
  out->output = empty_output(call);
  const auto p = posterior_params<T>(call.weight);
  if (call.options.weight_kl) out->kl += kl_divergence(p);
  if (call.has_bias() && call.options.bias_kl)
    out->kl += kl_divergence(posterior_params<T>(call.bias));
  if (!out->weight.defined()) return;
  for (int64_t sample = 0; sample < call.shape.num_samples; ++sample) {
    const at::Tensor weight = out->weight.select(0, sample);
    draw_sample(
        p, sample,
        {weight.mutable_data_ptr(), dtype_of(call.compute_dtype), posterior_strides(weight, 4)},
        nullptr);
  }
}

template <typename T>
void forward(const ConvCall& call, ConvOutputs* out) {
  if (call.is_empty()) {
    forward_empty<T>(call, out);
    return;
  }
  const Algorithm method = resolve(call, Direction::kFprop);
  if (method == Algorithm::kLibrary) {
    forward_library<T>(call, out);
  } else {
    forward_direct<T>(call, method, out);
  }
}

Tensors4 bconv2d_cpu(const at::Tensor& input, const at::Tensor& weight_loc,
                     const OptionalTensor& weight_rho, const OptionalTensor& bias_loc,
                     const OptionalTensor& bias_rho, const at::Tensor& seed,
                     const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                     const OptionalTensor& bias_prior_loc, const OptionalTensor& bias_prior_scale,
                     Doubles prior, bool weight_kl, bool bias_kl, double scale_floor,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                     int64_t groups, int64_t activation, double activation_param,
                     int64_t num_samples, bool share_input, int64_t offset_add,
                     at::IntArrayRef element_offset, int64_t algorithm, bool keep_weight,
                     bool save_pre_activation) {
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
      tensors, conv_options(prior, weight_kl, bias_kl, scale_floor, stride, padding, dilation,
                            groups, activation, activation_param, num_samples, share_input,
                            offset_add, element_offset, algorithm));
  ConvOutputs out = allocate_outputs(call, keep_weight, save_pre_activation);
  if (weight_loc.scalar_type() == at::kDouble) {
    forward<double>(call, &out);
  } else {
    forward<float>(call, &out);
  }
  if (!save_pre_activation) out.pre_activation = at::empty({0}, input.options());
  if (!keep_weight) out.weight = at::empty({0}, input.options());
  return {out.output, scalar_like(weight_loc, out.kl), out.pre_activation, out.weight};
}

// Gradient by each draw of weight and bias, and by the input; undefined where not wanted.
template <typename T>
LibraryGradients backward_convolution(const ConvCall& call, ConvBackward back,
                                      GradientBinder<T>* weight_grads, bool* weight_done) {
  const Algorithm dgrad = back.wants_input ? resolve(call, Direction::kDgrad) : Algorithm::kAuto;
  const Algorithm wgrad =
      back.wants_weight || back.wants_bias ? resolve(call, Direction::kWgrad) : Algorithm::kAuto;
  // In half precision the library would round the sums of the bias gradient.
  const bool library_sums_bias = wgrad == Algorithm::kLibrary && back.wants_weight &&
                                 back.wants_bias && call.compute_dtype == call.parameter_dtype();
  ConvBackward first = back;
  first.wants_bias = back.wants_bias && !library_sums_bias;
  const bool own_dgrad = back.wants_input && dgrad != Algorithm::kLibrary;
  const bool own_wgrad = back.wants_weight && wgrad != Algorithm::kLibrary;
  // The library's sums depend on the number of threads: a bias alone follows the choice for wgrad.
  const bool own_bias = back.wants_bias && wgrad != Algorithm::kLibrary;
  const PreActivationGradient z = own_dgrad || own_wgrad || own_bias
                                      ? activation_backward_direct<T>(call, first)
                                      : activation_backward_library(call, first);
  LibraryGradients out;
  ConvBackward rest = back;
  rest.wants_bias = library_sums_bias;
  rest.wants_input = back.wants_input && dgrad == Algorithm::kLibrary;
  rest.wants_weight = back.wants_weight && wgrad == Algorithm::kLibrary;
  if (rest.wants_input || rest.wants_weight) out = backward_library<T>(call, rest, z.grad);
  if (own_dgrad) {
    out.input =
        advised(at::empty(call.input->sizes(), call.input->options().memory_format(call.format)));
    dgrad_direct<T>(call, dgrad, z.grad, out.input);
  }
  if (own_wgrad) {
    wgrad_direct<T>(call, wgrad, z.grad, weight_grads->grads);
    *weight_done = true;
  }
  if (z.grad_bias.defined()) out.bias = z.grad_bias;
  return out;
}

template <typename T>
PosteriorGradients finish_posterior(const PosteriorTensors& posterior, GradientBinder<T>* binder,
                                    const at::Tensor& grad_sample) {
  if (grad_sample.defined()) binder->set_grad_sample(grad_sample);
  binder->run(posterior_params<T>(posterior));
  return binder->finish();
}

template <typename T>
Tensors9 backward(const ConvCall& call, ConvBackward back, double grad_kl,
                  const std::array<bool, 9>& mask) {
  const ConvOptions& o = call.options;
  GradientBinder<T> weight(call.weight, {mask[1], mask[2], mask[5], mask[6]},
                           o.weight_kl ? grad_kl : 0);
  LibraryGradients conv;
  bool weight_done = false;
  if (call.is_empty()) {
    if (mask[0]) conv.input = at::zeros_like(*call.input, call.input->options(), call.format);
  } else if (back.wants_input || back.wants_weight || back.wants_bias) {
    conv = backward_convolution<T>(call, back, &weight, &weight_done);
  }
  const PosteriorGradients w =
      weight_done ? weight.finish() : finish_posterior(call.weight, &weight, conv.weight);
  PosteriorGradients b;
  for (at::Tensor* grad : {&b.loc, &b.rho, &b.prior_loc, &b.prior_scale}) {
    *grad = empty_gradient(*call.weight.loc);  // results of an operator share no memory
  }
  if (call.has_bias()) {
    GradientBinder<T> bias(call.bias, {mask[3], mask[4], mask[7], mask[8]},
                           o.bias_kl ? grad_kl : 0);
    b = finish_posterior(call.bias, &bias, conv.bias);
  }
  if (!conv.input.defined()) conv.input = at::empty({0}, call.input->options());
  return {conv.input,  w.loc,         w.rho,       b.loc,        b.rho,
          w.prior_loc, w.prior_scale, b.prior_loc, b.prior_scale};
}

void check_backward(const ConvCall& call, const ConvBackward& back) {
  const ConvShape& s = call.shape;
  const std::array<int64_t, 4> image = {s.output_rows(), s.K, s.P, s.Q};
  expect_defined("grad_output", *back.grad_output);
  expect_dtype("grad_output", call.compute_dtype, *back.grad_output);
  expect_shape("grad_output", image, back.grad_output->sizes());
  expect_cpu("grad_output", *back.grad_output);
  const bool linear = call.activation == Activation::kLinear;
  TORCH_CHECK_VALUE(linear || back.saved != nullptr,
                    "saved: expected the output or the pre-activation of "
                    "a convolution with an activation, got None");
  if (back.saved != nullptr) {
    expect_dtype("saved", call.compute_dtype, *back.saved);
    expect_shape("saved", image, back.saved->sizes());
    expect_cpu("saved", *back.saved);
  }
  if (back.weight != nullptr) {
    expect_dtype("weight", call.compute_dtype, *back.weight);
    expect_shape("weight", {s.num_samples, s.K, s.channels_per_group(), s.R, s.S},
                 back.weight->sizes());
    expect_cpu("weight", *back.weight);
  }
}

double scalar_value(const char* name, const at::Tensor* value) {
  if (value == nullptr) return 0.0;
  expect_shape(name, {}, value->sizes());
  return value->item().toDouble();
}

Tensors9 bconv2d_backward_cpu(const at::Tensor& grad_output, const OptionalTensor& grad_kl,
                              const at::Tensor& input, const OptionalTensor& saved,
                              const OptionalTensor& weight, const at::Tensor& weight_loc,
                              const OptionalTensor& weight_rho, const OptionalTensor& bias_loc,
                              const OptionalTensor& bias_rho, const at::Tensor& seed,
                              const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                              const OptionalTensor& bias_prior_loc,
                              const OptionalTensor& bias_prior_scale, Doubles prior, bool weight_kl,
                              bool bias_kl, double scale_floor, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                              int64_t activation, double activation_param, int64_t num_samples,
                              bool share_input, int64_t offset_add, at::IntArrayRef element_offset,
                              int64_t algorithm, std::array<bool, 9> output_mask) {
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
      tensors, conv_options(prior, weight_kl, bias_kl, scale_floor, stride, padding, dilation,
                            groups, activation, activation_param, num_samples, share_input,
                            offset_add, element_offset, algorithm));
  const bool linear = call.activation == Activation::kLinear;
  const ConvBackward back = {&grad_output,
                             linear ? nullptr : get_if_defined(saved),
                             get_if_defined(weight),
                             output_mask[0],
                             output_mask[1] || output_mask[2],
                             call.has_bias() && (output_mask[3] || output_mask[4])};
  check_backward(call, back);
  const double kl = scalar_value("grad_kl", get_if_defined(grad_kl));
  return weight_loc.scalar_type() == at::kDouble ? backward<double>(call, back, kl, output_mask)
                                                 : backward<float>(call, back, kl, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, CPU, m) {
  m.impl("bconv2d", bconv2d_cpu);
  m.impl("bconv2d_backward", bconv2d_backward_cpu);
}

}  // namespace fbc
