// The library provider: our fused sampling pass into one weight tensor, ATen's convolution,
// activation in place. Backward draws the weight again unless it was kept.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "conv_call.h"
#include "epilogue.h"
#include "posterior_pass.h"

namespace fbc {

namespace {

// ATen's float16 convolution needs particular processors; everywhere else it goes through float32.
at::ScalarType arithmetic_dtype(const ConvCall& call) {
  return call.compute_dtype == at::kHalf ? at::kFloat : call.compute_dtype;
}

// Whether zeros are put around the image first: where the four sides differ, and where the image is
// nothing but padding, which ATen refuses.
bool pads_first(const ConvShape& s) {
  return s.pad_top != s.pad_bottom || s.pad_left != s.pad_right || s.H == 0 || s.W == 0;
}

// The image as the convolution wants it.
at::Tensor prepare_input(const ConvCall& call, const at::Tensor& image) {
  const ConvShape& s = call.shape;
  const at::Tensor in = image.to(arithmetic_dtype(call));
  if (!pads_first(s)) return in;
  return at::constant_pad_nd(in, {s.pad_left, s.pad_right, s.pad_top, s.pad_bottom});
}

std::array<int64_t, 2> remaining_padding(const ConvShape& s) {
  return pads_first(s) ? std::array<int64_t, 2>{0, 0} : std::array<int64_t, 2>{s.pad_top, s.pad_left};
}

// (K, C/G, R, S), not filled. ATen's convolution takes the output's memory format from its weight
// as well as from its input, so the weight has the format of the input.
at::Tensor empty_weight(const ConvCall& call) {
  const auto options = call.weight.loc->options().dtype(call.compute_dtype);
  return at::empty(call.weight.loc->sizes(), options.memory_format(call.format));
}

template <typename T>
at::Tensor draw_weight(const ConvCall& call, const PosteriorParams<T>& p, int64_t sample, double* kl) {
  at::Tensor weight = empty_weight(call);
  draw_sample(p, sample, {weight.mutable_data_ptr(), dtype_of(call.compute_dtype), posterior_strides(weight, 4)}, kl);
  return weight;
}

at::Tensor as_convolution_weight(const ConvCall& call, const at::Tensor& weight) {
  return weight.to(arithmetic_dtype(call)).contiguous(call.format);
}

// Rows [begin, end) of `image` that draw `sample` reads or writes.
at::Tensor rows_of_sample(const ConvCall& call, const at::Tensor& image, int64_t sample, bool shared) {
  if (shared || call.shape.num_samples == 1) return image;
  const int64_t rows = call.shape.rows_per_sample();
  return image.narrow(0, sample * rows, rows);
}

template <typename T>
at::Tensor convolve_sample(const ConvCall& call, const PosteriorParams<T>& p, int64_t sample, const at::Tensor& input,
                           const OptionalTensor& bias, ConvOutputs* out) {
  double* kl = sample == 0 && call.options.weight_kl ? &out->kl : nullptr;
  at::Tensor weight = draw_weight(call, p, sample, kl);
  if (out->weight.defined()) out->weight.select(0, sample).copy_(weight);
  const ConvOptions& o = call.options;
  const auto padding = remaining_padding(call.shape);
  return at::convolution(input, as_convolution_weight(call, weight), bias, o.stride, padding, o.dilation,
                         /*transposed=*/false, /*output_padding=*/{0, 0}, o.groups);
}

}  // namespace

template <typename T>
void forward_library(const ConvCall& call, ConvOutputs* out) {
  const ConvShape& s = call.shape;
  const auto p = host_posterior_params<T>(call.weight);
  const at::Tensor input = prepare_input(call, *call.input);
  at::Tensor biases;
  if (call.has_bias()) {
    biases = draw_bias<T>(call, call.options.bias_kl ? &out->kl : nullptr).to(arithmetic_dtype(call));
  }
  if (s.num_samples > 1) out->output = empty_output(call);
  for (int64_t sample = 0; sample < s.num_samples; ++sample) {
    const at::Tensor rows = rows_of_sample(call, input, sample, s.share_input);
    const OptionalTensor bias = biases.defined() ? OptionalTensor(biases.select(0, sample)) : std::nullopt;
    const at::Tensor y = convolve_sample(call, p, sample, rows, bias, out);
    if (s.num_samples == 1) {
      out->output = with_canonical_strides(y, call.compute_dtype, call.format);
    } else {
      out->output.narrow(0, sample * s.rows_per_sample(), s.rows_per_sample()).copy_(y);
    }
  }
  if (out->pre_activation.defined()) out->pre_activation.copy_(out->output);
  activate_in_place(out->output, call.activation, call.options.activation_param);
}

PreActivationGradient activation_backward_library(const ConvCall& call, const ConvBackward& back) {
  const ConvShape& s = call.shape;
  PreActivationGradient out;
  out.grad = *back.grad_output;
  if (back.saved != nullptr) {
    out.grad = activation_gradient(back.grad_output->contiguous(call.format), back.saved->contiguous(call.format),
                                   call.activation, call.options.activation_param);
  }
  if (back.wants_bias) {
    const auto by_sample = out.grad.unflatten(0, {s.num_samples, s.rows_per_sample()});
    out.grad_bias = by_sample.sum({1, 3, 4}, /*keepdim=*/false, call.parameter_dtype());
  }
  return out;
}

namespace {

// Cuts the padding of prepare_input() off its gradient.
at::Tensor without_padding(const ConvCall& call, const at::Tensor& grad) {
  const ConvShape& s = call.shape;
  if (grad.size(2) == s.H && grad.size(3) == s.W) return grad;
  return grad.narrow(2, s.pad_top, s.H).narrow(3, s.pad_left, s.W);
}

// oneDNN's weight gradient of 1 x 1 filters with a stride writes past its workspace where channels come last
// and are less than a vector (uxlfoundation/oneDNN issue 6035).
bool breaks_weight_gradient(const ConvShape& s) {
  return s.R * s.S == 1 && s.stride_h * s.stride_w > 1 && s.channels_per_group() < 16;
}

// Of such filters: by the pixels that they meet, without a stride. With the bias: asked for that alone, too,
// ATen computes both.
LibraryGradients gradients_of_pixels(const ConvCall& call, const at::Tensor& grad, const at::Tensor& input,
                                     const at::Tensor& weight, std::array<bool, 3> wanted) {
  const ConvOptions& o = call.options;
  const auto padding = remaining_padding(call.shape);
  const at::Tensor padded = at::constant_pad_nd(input, {padding[1], padding[1], padding[0], padding[0]});
  const at::Tensor pixels = padded.slice(2, 0, std::nullopt, o.stride[0]).slice(3, 0, std::nullopt, o.stride[1]);
  const auto grads =
      at::convolution_backward(grad, pixels, weight, /*bias_sizes=*/at::IntArrayRef(call.shape.K), /*stride=*/{1, 1},
                               /*padding=*/{0, 0}, /*dilation=*/{1, 1}, /*transposed=*/false, /*output_padding=*/{0, 0},
                               o.groups, {false, wanted[1], wanted[2]});
  return {at::Tensor(), std::get<1>(grads), std::get<2>(grads)};
}

// wanted: input, weight, bias.
template <typename T>
LibraryGradients backward_sample(const ConvCall& call, const PosteriorParams<T>& p, const ConvBackward& back,
                                 int64_t sample, const at::Tensor& input, const at::Tensor& grad,
                                 std::array<bool, 3> wanted) {
  at::Tensor weight;
  if (wanted[0]) {
    weight = back.weight != nullptr ? back.weight->select(0, sample) : draw_weight(call, p, sample, nullptr);
  } else {
    weight = empty_weight(call);  // only its extents are read
  }
  const ConvOptions& o = call.options;
  const auto padding = remaining_padding(call.shape);
  const at::Tensor rows = rows_of_sample(call, input, sample, call.shape.share_input);
  const at::Tensor filter = as_convolution_weight(call, weight);
  LibraryGradients out;
  if ((wanted[1] || wanted[2]) && breaks_weight_gradient(call.shape)) {
    out = gradients_of_pixels(call, grad, rows, filter, wanted);
    wanted = {wanted[0], false, false};
  }
  if (!wanted[0] && !wanted[1] && !wanted[2]) return out;
  const auto grads = at::convolution_backward(grad, rows, filter, /*bias_sizes=*/at::IntArrayRef(call.shape.K),
                                              o.stride, padding, o.dilation,
                                              /*transposed=*/false, /*output_padding=*/{0, 0}, o.groups, wanted);
  if (wanted[0]) out.input = std::get<0>(grads);
  if (wanted[1]) out.weight = std::get<1>(grads);
  if (wanted[2]) out.bias = std::get<2>(grads);
  return out;
}

// For several draws: one slice each, and the sum by the input in the parameters' dtype.
LibraryGradients empty_gradients(const ConvCall& call, const at::Tensor& input, std::array<bool, 3> wanted) {
  const ConvShape& s = call.shape;
  const auto options = call.weight.loc->options();
  LibraryGradients out;
  if (wanted[0]) out.input = at::zeros(input.sizes(), options).contiguous(call.format);
  if (wanted[1]) {
    out.weight = at::empty({s.num_samples, s.K, s.R, s.S, s.channels_per_group()}, options).permute({0, 1, 4, 2, 3});
  }
  if (wanted[2]) out.bias = at::empty({s.num_samples, s.K}, options);
  return out;
}

}  // namespace

template <typename T>
LibraryGradients backward_library(const ConvCall& call, const ConvBackward& back, const at::Tensor& grad) {
  const ConvShape& s = call.shape;
  const auto p = host_posterior_params<T>(call.weight);
  const at::Tensor input = prepare_input(call, *call.input);
  const at::Tensor grad_z = grad.to(arithmetic_dtype(call));
  const std::array<bool, 3> wanted = {back.wants_input, back.wants_weight, back.wants_bias};
  LibraryGradients sum;
  if (s.num_samples == 1) {
    sum = backward_sample(call, p, back, 0, input, grad_z, wanted);
    if (sum.weight.defined()) sum.weight = sum.weight.to(call.parameter_dtype()).unsqueeze(0);
    if (sum.bias.defined()) sum.bias = sum.bias.unsqueeze(0);
  } else {
    sum = empty_gradients(call, input, wanted);
    for (int64_t sample = 0; sample < s.num_samples; ++sample) {
      const at::Tensor grad_rows = rows_of_sample(call, grad_z, sample, false);
      const auto part = backward_sample(call, p, back, sample, input, grad_rows, wanted);
      if (back.wants_weight) sum.weight.select(0, sample).copy_(part.weight);
      if (back.wants_bias) sum.bias.select(0, sample).copy_(part.bias);
      if (back.wants_input) {
        rows_of_sample(call, sum.input, sample, s.share_input).add_(part.input);
      }
    }
  }
  if (back.wants_input) {
    sum.input = with_canonical_strides(without_padding(call, sum.input), call.compute_dtype, call.format);
  }
  return sum;
}

template void forward_library<float>(const ConvCall&, ConvOutputs*);
template void forward_library<double>(const ConvCall&, ConvOutputs*);
template LibraryGradients backward_library<float>(const ConvCall&, const ConvBackward&, const at::Tensor&);
template LibraryGradients backward_library<double>(const ConvCall&, const ConvBackward&, const at::Tensor&);

}  // namespace fbc
