// The library provider of CUDA: weight and bias of all draws in one sampling launch, ATen's
// convolution (cuDNN), one launch for bias and activation, or cuDNN's own fused bias and relu.
// Draws that share their input are one convolution with num_samples * K filters.
#include "cuda_conv.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>

#include "cuda_fused_relu.h"

namespace fbc::device {

namespace {

using Mask = std::array<bool, 3>;

// Whether zeros are put around the image first: where the four sides differ, and where the image is
// nothing but padding, which ATen refuses.
bool pads_first(const ConvShape& s) {
  return s.pad_top != s.pad_bottom || s.pad_left != s.pad_right || s.H == 0 || s.W == 0;
}

at::Tensor prepare_input(const ConvCall& call) {
  const ConvShape& s = call.shape;
  const at::Tensor in = in_dtype(*call.input, convolution_dtype(call.compute_dtype));
  if (!pads_first(s)) return in;
  return at::constant_pad_nd(in, {s.pad_left, s.pad_right, s.pad_top, s.pad_bottom});
}

std::array<int64_t, 2> remaining_padding(const ConvShape& s) {
  return pads_first(s) ? std::array<int64_t, 2>{0, 0} : std::array<int64_t, 2>{s.pad_top, s.pad_left};
}

// ATen's convolution takes the output's memory format from its weight as well as from its input, so
// the weight has the format of the input.
at::Tensor as_filters(const ConvCall& call, const at::Tensor& weight) {
  return in_dtype(weight, convolution_dtype(call.compute_dtype)).contiguous(call.format);
}

// (draws, K, C/G, R, S) with one draw where the weight has no noise.
at::Tensor plain_weight(const ConvCall& call) { return in_dtype(*call.weight.loc, call.compute_dtype).unsqueeze(0); }

// The draws as filters of one convolution, in the order group, draw, filter of the group:
// (G S K/G, C/G, R, S).
at::Tensor stack_filters(const ConvCall& call, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  const auto all = weight.expand({s.num_samples, s.K, s.channels_per_group(), s.R, s.S});
  return all.unflatten(1, {s.groups, s.filters_per_group()}).transpose(0, 1).flatten(0, 2);
}
// And back: (S, K, C/G, R, S).
at::Tensor unstack_filters(const ConvCall& call, const at::Tensor& filters) {
  const ConvShape& s = call.shape;
  return filters.unflatten(0, {s.groups, s.num_samples, s.filters_per_group()}).transpose(0, 1).flatten(1, 2);
}

// (S N, K, P, Q) seen as (N, G, S, K/G, P, Q).
at::Tensor by_row_and_group(const ConvCall& call, const at::Tensor& images) {
  const ConvShape& s = call.shape;
  return images.unflatten(0, {s.num_samples, s.N})
      .unflatten(2, {s.groups, s.filters_per_group()})
      .permute({1, 2, 0, 3, 4, 5});
}

at::Tensor convolve(const ConvCall& call, const at::Tensor& input, const at::Tensor& filters) {
  const ConvOptions& o = call.options;
  return at::convolution(input, as_filters(call, filters), std::nullopt, o.stride, remaining_padding(call.shape),
                         o.dilation, /*transposed=*/false,
                         /*output_padding=*/{0, 0}, o.groups);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_backward(const ConvCall& call, const at::Tensor& grad,
                                                                 const at::Tensor& input, const at::Tensor& filters,
                                                                 const Mask& wanted) {
  const ConvOptions& o = call.options;
  return at::convolution_backward(grad, input, as_filters(call, filters), at::OptionalIntArrayRef(), o.stride,
                                  remaining_padding(call.shape), o.dilation,
                                  /*transposed=*/false, /*output_padding=*/{0, 0}, o.groups, wanted);
}

// Rows of one draw where every draw has its own.
at::Tensor rows_of_draw(const ConvCall& call, const at::Tensor& images, int64_t draw) {
  const int64_t rows = call.shape.rows_per_sample();
  return images.narrow(0, draw * rows, rows);
}

// The convolution of all draws, bias and activation to come.
at::Tensor convolve_all(const ConvCall& call, const at::Tensor& input, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  const int64_t draws = weight.size(0);
  if (draws == 1 && (s.num_samples == 1 || !s.share_input)) {
    return with_canonical_strides(convolve(call, input, weight.select(0, 0)), call.compute_dtype, call.format);
  }
  const at::Tensor output = empty_output(call);
  if (draws == 1) {
    output.unflatten(0, {s.num_samples, s.N}).copy_(convolve(call, input, weight.select(0, 0)));
  } else if (s.share_input) {
    const at::Tensor y = convolve(call, input, stack_filters(call, weight));
    by_row_and_group(call, output).copy_(y.unflatten(1, {s.groups, s.num_samples, s.filters_per_group()}));
  } else {
    for (int64_t draw = 0; draw < draws; ++draw) {
      rows_of_draw(call, output, draw).copy_(convolve(call, rows_of_draw(call, input, draw), weight.select(0, draw)));
    }
  }
  return output;
}

}  // namespace

void forward_library(const ConvCall& call, Forward* out) {
  const bool fused = can_fuse_relu(call, *out);
  const at::ScalarType sums = call.compute_dtype == at::kDouble ? at::kDouble : at::kFloat;
  bool bias_drawn = false;
  const at::Tensor bias = bias_rows(call, fused ? call.compute_dtype : sums, &bias_drawn);
  at::Tensor weight = out->weight;
  if (!is_sampled(call.weight)) {
    if (weight.defined()) weight.copy_(*call.weight.loc);
    weight = plain_weight(call);
  } else if (!weight.defined()) {
    weight = empty_weight(call, call.shape.num_samples, call.format);
  }
  draw_parameters(call, is_sampled(call.weight) ? weight : at::Tensor(), bias_drawn ? bias : at::Tensor(), *out);
  const at::Tensor input = prepare_input(call);
  if (fused) {
    const at::Tensor y = fused_relu(call, input, as_filters(call, weight.select(0, 0)), bias.select(0, 0),
                                    remaining_padding(call.shape));
    if (y.defined()) {
      out->output = with_canonical_strides(y, call.compute_dtype, call.format);
      return;
    }
  }
  out->output = convolve_all(call, input, weight);
  apply_bias_activation(call, bias.defined() ? in_dtype(bias, sums) : bias, out->output, out->pre_activation);
}

namespace {

// The weight that forward has used; only its extents count where no gradient by the input is
// wanted.
at::Tensor weight_of_backward(const ConvCall& call, const ConvBackward& back) {
  if (back.weight != nullptr) return *back.weight;
  if (!is_sampled(call.weight)) return plain_weight(call);
  const at::Tensor weight = empty_weight(call, call.shape.num_samples, call.format);
  if (back.wants_input) draw_parameters(call, weight, {}, {});
  return weight;
}

// Cuts the padding of prepare_input() off its gradient.
at::Tensor without_padding(const ConvCall& call, const at::Tensor& grad) {
  const ConvShape& s = call.shape;
  if (grad.size(2) == s.H && grad.size(3) == s.W) return grad;
  return grad.narrow(2, s.pad_top, s.H).narrow(3, s.pad_left, s.W);
}

// Each draw has its own rows: its gradients are slices of the results.
Operands backward_by_draw(const ConvCall& call, const at::Tensor& grad, const at::Tensor& input,
                          const at::Tensor& weight, const Mask& wanted) {
  Operands out;
  if (wanted[0]) out.input = at::empty(input.sizes(), input.options().memory_format(call.format));
  if (wanted[1]) out.weight = at::empty(weight.sizes(), input.options());
  for (int64_t draw = 0; draw < weight.size(0); ++draw) {
    const auto g = convolve_backward(call, rows_of_draw(call, grad, draw), rows_of_draw(call, input, draw),
                                     weight.select(0, draw), wanted);
    if (wanted[0]) rows_of_draw(call, out.input, draw).copy_(std::get<0>(g));
    if (wanted[1]) out.weight.select(0, draw).copy_(std::get<1>(g));
  }
  return out;
}

}  // namespace

Operands backward_library(const ConvCall& call, const ConvBackward& back) {
  const ConvShape& s = call.shape;
  const PreActivation z = activation_backward(call, back, call.format);
  Operands out;
  if (back.wants_input || back.wants_weight) {
    const Mask wanted = {back.wants_input, back.wants_weight, false};
    const at::Tensor grad = in_dtype(z.grad, convolution_dtype(call.compute_dtype));
    const at::Tensor input = prepare_input(call), weight = weight_of_backward(call, back);
    if (s.num_samples > 1 && s.share_input) {
      const at::Tensor stacked = by_row_and_group(call, grad).flatten(1, 3);
      const auto g =
          convolve_backward(call, stacked.contiguous(call.format), input, stack_filters(call, weight), wanted);
      out.input = std::get<0>(g);
      if (wanted[1]) out.weight = unstack_filters(call, std::get<1>(g));
    } else if (weight.size(0) > 1) {
      out = backward_by_draw(call, grad, input, weight, wanted);
    } else {
      const auto g = convolve_backward(call, grad, input, weight.select(0, 0), wanted);
      out.input = std::get<0>(g);
      if (wanted[1]) out.weight = std::get<1>(g).unsqueeze(0);
    }
    if (back.wants_input) {
      out.input = with_canonical_strides(without_padding(call, out.input), call.compute_dtype, call.format);
    }
  }
  out.bias = z.grad_bias;
  return out;
}

}  // namespace fbc::device
