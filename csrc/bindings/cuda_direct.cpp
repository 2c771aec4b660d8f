// The direct provider of CUDA: the one-pass kernels. The weight is sampled inside the launch unless
// it was given or kept; a bias is drawn before, in a launch of its own.
#include "cuda_conv.h"

#include <ATen/ops/empty.h>

namespace fbc::device {

namespace {

// NHWC memory up to the strides of n, h and w.
at::Tensor with_dense_channels(const at::Tensor& image) {
  if (image.size(1) == 1 || image.stride(1) == 1) return image;
  return image.contiguous(at::MemoryFormat::ChannelsLast);
}

at::TensorOptions float_options(const ConvCall& call) {
  return call.input->options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
}

// How a launch gets its weights, and what it points to.
struct BoundWeight {
  cuda::ConvWeight weight = {};
  at::Tensor seed, given, scale;
};

// kept: (num_samples, K, C/G, R, S), or null.
BoundWeight bind_weight(const ConvCall& call, const at::Tensor* kept, const Site& site) {
  BoundWeight out;
  const ConvShape& s = call.shape;
  if (kept != nullptr || !is_sampled(call.weight)) {
    const at::Tensor draws = kept != nullptr ? *kept
                                             : in_dtype(*call.weight.loc, call.compute_dtype)
                                                   .expand({s.num_samples, s.K, s.channels_per_group(), s.R, s.S});
    out.given = draws.permute({0, 1, 3, 4, 2}).contiguous();
    out.weight.source = cuda::WeightSource::kGiven;
    out.weight.given = out.given.const_data_ptr();
    return out;
  }
  out.seed = call.weight.seed->contiguous();
  out.weight.source = cuda::best_source(s);
  out.weight.posterior = posterior_params<float>(call.weight);
  out.weight.seed = out.seed.const_data_ptr<int64_t>();
  if (out.weight.source == cuda::WeightSource::kPrivate && s.num_samples > 1) {
    // A softplus for each weight and draw would cost more than the draw.
    out.scale = at::empty({s.K, s.R, s.S, s.channels_per_group()}, float_options(call));
    out.weight.scale = out.scale.const_data_ptr<float>();
    check_launch(cuda::scale_of(out.weight.posterior, out.scale.mutable_data_ptr<float>(), current_stream(*call.input)),
                 site);
  }
  return out;
}

at::Tensor grad_input(const ConvCall& call, const ConvBackward& back, const at::Tensor& grad) {
  const Site site = backward_site(call);
  const BoundWeight bound = bind_weight(call, back.weight, site);
  const at::Tensor out = at::empty(call.input->sizes(), call.input->options().memory_format(call.format));
  cuda::DgradParams d = {};
  d.shape = call.shape;
  d.dtype = dtype_of(call.compute_dtype);
  d.grad = grad.const_data_ptr();
  d.grad_stride = image_strides(grad);
  d.grad_input = out.mutable_data_ptr();
  d.grad_input_stride = image_strides(out);
  const Workspace workspace(cuda::dgrad_workspace(d, bound.weight), grad);
  check_launch(cuda::dgrad(d, bound.weight, workspace.data(), current_stream(grad)), site);
  return out;
}

void grad_weight(const ConvCall& call, const at::Tensor& grad, Operands* out) {
  const ConvShape& s = call.shape;
  const at::Tensor input = with_dense_channels(*call.input);
  const at::Tensor seed = call.weight.seed->contiguous();
  cuda::WgradParams w = {};
  w.shape = s;
  w.dtype = dtype_of(call.compute_dtype);
  w.input = input.const_data_ptr();
  w.input_stride = image_strides(input);
  w.grad = grad.const_data_ptr();
  w.grad_stride = image_strides(grad);
  if (is_sampled(call.weight)) {
    w.posterior = posterior_params<float>(call.weight);
  } else {  // no noise: the sums weighed by it are not used
    w.posterior.K = s.K;
    w.posterior.R = s.R;
    w.posterior.S = s.S;
    w.posterior.C = s.channels_per_group();
  }
  w.seed = seed.const_data_ptr<int64_t>();
  const std::array<int64_t, 5> sizes = {cuda::wgrad_slabs(w), s.K, s.R, s.S, s.channels_per_group()};
  out->slabs = at::empty(sizes, float_options(call));
  w.slabs = out->slabs.mutable_data_ptr<float>();
  if (s.num_samples > 1) {
    out->slabs_eps = at::empty(sizes, float_options(call));
    w.slabs_eps = out->slabs_eps.mutable_data_ptr<float>();
  }
  check_launch(cuda::wgrad(w, current_stream(grad)), backward_site(call));
}

}  // namespace

void forward_direct(const ConvCall& call, Forward* out) {
  const Site site = forward_site(call);
  bool drawn = false;
  const at::Tensor bias = bias_rows(call, at::kFloat, &drawn);
  const at::Tensor weight_kl = out->weight_kl;
  out->weight_kl = at::Tensor();  // of the launch below
  if (drawn || out->bias_kl.defined()) draw_parameters(call, {}, drawn ? bias : at::Tensor(), *out);
  const BoundWeight bound = bind_weight(call, nullptr, site);
  const at::Tensor input = with_dense_channels(*call.input);
  out->output = empty_output(call);
  cuda::FpropParams f = {};
  f.shape = call.shape;
  f.dtype = dtype_of(call.compute_dtype);
  f.input = input.const_data_ptr();
  f.input_stride = image_strides(input);
  f.output = out->output.mutable_data_ptr();
  f.output_stride = image_strides(out->output);
  if (out->pre_activation.defined()) f.pre_activation = out->pre_activation.mutable_data_ptr();
  if (bias.defined()) f.bias = bias.const_data_ptr<float>();
  f.activation = call.activation;
  f.activation_param = static_cast<float>(call.options.activation_param);
  if (out->weight.defined()) {
    if (is_sampled(call.weight)) {
      f.kept_weight = out->weight.mutable_data_ptr();
    } else {
      out->weight.copy_(*call.weight.loc);
    }
  }
  if (weight_kl.defined()) f.kl = weight_kl.mutable_data_ptr<float>();
  const Workspace workspace(cuda::fprop_workspace(f, bound.weight), input);
  check_launch(cuda::fprop(f, bound.weight, workspace.data(), current_stream(input)), site);
}

Operands backward_direct(const ConvCall& call, const ConvBackward& back) {
  const PreActivation z = activation_backward(call, back, at::MemoryFormat::ChannelsLast);
  Operands out;
  out.bias = z.grad_bias;
  if (!back.wants_input && !back.wants_weight) return out;
  const at::Tensor grad = with_dense_channels(z.grad);
  if (back.wants_input) out.input = grad_input(call, back, grad);
  if (back.wants_weight) grad_weight(call, grad, &out);
  return out;
}

}  // namespace fbc::device
