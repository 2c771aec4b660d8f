// What the two CUDA providers share: drawing parameters, and the passes before and after a
// convolution.
#include "cuda_conv.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "cuda_pass.h"

namespace fbc::device {

namespace {

at::ScalarType sum_dtype(const ConvCall& call) { return call.compute_dtype == at::kDouble ? at::kDouble : at::kFloat; }

template <typename T>
void draw(const ConvCall& call, const at::Tensor& weight, const at::Tensor& bias, const Forward& forward) {
  SampleLaunch<T> launch;
  if (is_sampled(call.weight)) launch.add(call.weight, weight, forward.weight_kl);
  if (call.has_bias() && is_sampled(call.bias)) launch.add(call.bias, bias, forward.bias_kl);
  launch.run(*call.input, forward_site(call));
}

}  // namespace

Site forward_site(const ConvCall& call) {
  return {"fastbconv::bconv2d", "input", call.input->sizes(), "weight", call.weight.loc->sizes()};
}
Site backward_site(const ConvCall& call) {
  return {"fastbconv::bconv2d_backward", "input", call.input->sizes(), "weight", call.weight.loc->sizes()};
}

void draw_parameters(const ConvCall& call, const at::Tensor& weight, const at::Tensor& bias, const Forward& forward) {
  if (call.parameter_dtype() == at::kDouble) {
    draw<double>(call, weight, bias, forward);
  } else {
    draw<float>(call, weight, bias, forward);
  }
  if (weight.defined() && !is_sampled(call.weight)) weight.copy_(*call.weight.loc);
}

at::Tensor bias_rows(const ConvCall& call, at::ScalarType dtype, bool* drawn) {
  *drawn = call.has_bias() && is_sampled(call.bias);
  if (!call.has_bias()) return {};
  const ConvShape& s = call.shape;
  if (*drawn) return at::empty({s.num_samples, s.K}, call.bias.loc->options().dtype(dtype));
  const at::Tensor row = in_dtype(*call.bias.loc, dtype).unsqueeze(0);
  return s.num_samples == 1 ? row.contiguous() : row.expand({s.num_samples, s.K}).contiguous();
}

at::Tensor empty_weight(const ConvCall& call, int64_t draws, at::MemoryFormat format) {
  const ConvShape& s = call.shape;
  const auto options = call.input->options().memory_format(at::MemoryFormat::Contiguous);
  if (format == at::MemoryFormat::ChannelsLast) {
    return at::empty({draws, s.K, s.R, s.S, s.channels_per_group()}, options).permute({0, 1, 4, 2, 3});
  }
  return at::empty({draws, s.K, s.channels_per_group(), s.R, s.S}, options);
}

void apply_bias_activation(const ConvCall& call, const at::Tensor& bias, const at::Tensor& output,
                           const at::Tensor& pre_activation) {
  const ConvShape& s = call.shape;
  if (!bias.defined() && call.activation == Activation::kLinear) {
    if (pre_activation.defined()) pre_activation.copy_(output);
    return;
  }
  cuda::BiasActivationParams p = {};
  p.rows = s.output_rows();
  p.P = s.P;
  p.Q = s.Q;
  p.K = s.K;
  p.num_samples = s.num_samples;
  p.dtype = dtype_of(call.compute_dtype);
  p.z = output.mutable_data_ptr();
  p.z_stride = image_strides(output);
  if (pre_activation.defined()) p.pre_activation = pre_activation.mutable_data_ptr();
  if (bias.defined()) p.bias = bias.const_data_ptr();
  p.activation = call.activation;
  p.activation_param = call.options.activation_param;
  check_launch(cuda::bias_activation(p, current_stream(output)), forward_site(call));
}

PreActivation activation_backward(const ConvCall& call, const ConvBackward& back, at::MemoryFormat format) {
  const ConvShape& s = call.shape;
  const bool linear = back.saved == nullptr;
  PreActivation out;
  if (linear) out.grad = *back.grad_output;
  if (linear && !back.wants_bias) return out;
  cuda::ActivationGradParams a = {};
  a.rows = s.output_rows();
  a.P = s.P;
  a.Q = s.Q;
  a.K = s.K;
  a.num_samples = s.num_samples;
  a.dtype = dtype_of(call.compute_dtype);
  a.grad_output = back.grad_output->const_data_ptr();
  a.grad_output_stride = image_strides(*back.grad_output);
  a.activation = call.activation;
  a.activation_param = call.options.activation_param;
  if (!linear) {
    a.saved = back.saved->const_data_ptr();
    a.saved_stride = image_strides(*back.saved);
    out.grad = at::empty(back.grad_output->sizes(), back.grad_output->options().memory_format(format));
    a.grad = out.grad.mutable_data_ptr();
    a.grad_stride = image_strides(out.grad);
  }
  if (back.wants_bias) {
    const auto options = call.input->options().memory_format(at::MemoryFormat::Contiguous);
    out.grad_bias = at::empty({s.num_samples, s.K}, options.dtype(sum_dtype(call)));
    a.grad_bias = out.grad_bias.mutable_data_ptr();
  }
  const Workspace workspace(cuda::activation_grad_workspace(a), *back.grad_output);
  check_launch(cuda::activation_grad(a, workspace.data(), current_stream(*back.grad_output)), backward_site(call));
  return out;
}

}  // namespace fbc::device
