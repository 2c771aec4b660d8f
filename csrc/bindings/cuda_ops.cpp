// bconv2d and bconv2d_backward under the CUDA key: check, allocate, choose a provider, call it.
#include "device.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "conv_entry.h"
#include "cuda_conv.h"
#include "cuda_pass.h"

namespace fbc {

namespace {

using device::Forward;
using device::Operands;

Algorithm resolve(const ConvCall& call, Direction direction) {
  const cuda::ConvProblem problem = {call.shape, dtype_of(call.compute_dtype), device::tf32_convolutions()};
  const auto requested = static_cast<Algorithm>(call.options.algorithm);
  const Choice choice = cuda::select_algorithm(problem, direction, requested);
  TORCH_CHECK_NOT_IMPLEMENTED(choice.reason == nullptr, "algorithm: expected one that can compute the ",
                              direction_name(direction), " of this convolution, got '", choice.name,
                              "': ", choice.reason);
  return choice.algorithm;
}

at::Tensor empty_scalars(const ConvCall& call, at::IntArrayRef sizes) {
  const auto options = call.weight.loc->options().dtype(call.parameter_dtype());
  return at::empty(sizes, options.memory_format(at::MemoryFormat::Contiguous));
}

// The kernels write each KL where it belongs; the sum of two is one small operator more.
at::Tensor allocate_kl(const ConvCall& call, Forward* out) {
  const bool weight = call.options.weight_kl && device::is_sampled(call.weight);
  const bool bias = call.options.bias_kl && call.has_bias() && device::is_sampled(call.bias);
  if (weight != bias) {
    at::Tensor& only = weight ? out->weight_kl : out->bias_kl;
    only = empty_scalars(call, {});
    return only;
  }
  const at::Tensor values = empty_scalars(call, {weight ? 2 : 0});
  if (weight) out->weight_kl = values.select(0, 0);
  if (bias) out->bias_kl = values.select(0, 1);
  return values;
}

at::Tensor total_kl(const ConvCall& call, const at::Tensor& values) {
  if (!call.wants_kl()) return values;  // (0,)
  if (values.dim() == 0) return values;
  return values.size(0) == 2 ? values.sum() : at::zeros({}, values.options());
}

// No pixel to compute: the KL is what it is, and a weight that was asked for is drawn.
void forward_empty(const ConvCall& call, Forward* out) {
  out->output = empty_output(call);
  device::draw_parameters(call, out->weight, {}, *out);
}

Tensors4 forward_cuda(const ConvCall& call, bool keep_weight, bool save_pre_activation) {
  const device::Guard guard(*call.input);
  const auto options = call.input->options().memory_format(at::MemoryFormat::Contiguous);
  Forward out;
  if (save_pre_activation) out.pre_activation = empty_output(call);
  if (keep_weight) {
    out.weight = device::empty_weight(call, call.shape.num_samples, at::MemoryFormat::ChannelsLast);
  }
  const at::Tensor kl = allocate_kl(call, &out);
  if (call.is_empty()) {
    forward_empty(call, &out);
  } else if (resolve(call, Direction::kFprop) == Algorithm::kLibrary) {
    device::forward_library(call, &out);
  } else {
    device::forward_direct(call, &out);
  }
  if (!save_pre_activation) out.pre_activation = at::empty({0}, options);
  if (!keep_weight) out.weight = at::empty({0}, options);
  return {out.output, total_kl(call, kl), out.pre_activation, out.weight};
}

// What the chosen providers give; undefined where not wanted.
Operands convolution_gradients(const ConvCall& call, const ConvBackward& back) {
  if (call.is_empty()) {
    Operands out;
    if (back.wants_input) {
      out.input = at::zeros_like(*call.input, call.input->options(), call.format);
    }
    return out;
  }
  if (!back.wants_input && !back.wants_weight && !back.wants_bias) return {};
  const Algorithm algorithm = resolve(call, back.wants_input ? Direction::kDgrad : Direction::kWgrad);
  return algorithm == Algorithm::kLibrary ? device::backward_library(call, back) : device::backward_direct(call, back);
}

// A weight or bias without noise needs no kernel of ours: by_draw is (draws, shape of loc), and its
// prior has no influence.
std::array<at::Tensor, 4> plain_gradients(const PosteriorTensors& t, const at::Tensor& by_draw,
                                          const std::array<bool, 4>& mask) {
  const auto options = t.loc->options().memory_format(at::MemoryFormat::Contiguous);
  const auto nothing = [&] { return at::empty({0}, options.dtype(t.dtype())); };
  std::array<at::Tensor, 4> out = {mask[0] ? at::Tensor() : at::empty({0}, options), nothing(),
                                   mask[2] ? at::zeros_like(*t.prior_loc) : nothing(),
                                   mask[3] ? at::zeros_like(*t.prior_scale) : nothing()};
  if (!mask[0]) return out;
  if (!by_draw.defined()) {
    out[0] = at::zeros_like(*t.loc);
    return out;
  }
  const at::Tensor sum = by_draw.size(0) == 1 ? by_draw.select(0, 0) : by_draw.sum(0);
  const bool fits = sum.scalar_type() == t.loc->scalar_type() && sum.strides() == t.loc->strides();
  out[0] = fits ? sum : at::empty_like(*t.loc).copy_(sum);
  return out;
}

// By draw, from slabs where the one-pass kernels have left some.
at::Tensor weight_by_draw(const Operands& operands) {
  if (!operands.slabs.defined()) return operands.weight;
  return operands.slabs.sum(0).permute({0, 3, 1, 2}).unsqueeze(0);
}

struct ParameterGradients {
  std::array<at::Tensor, 4> weight, bias;  // loc, rho, prior_loc, prior_scale
};

template <typename T>
ParameterGradients parameter_gradients(const ConvCall& call, const Operands& operands, const at::Tensor& grad_kl,
                                       const std::array<bool, 9>& mask) {
  const std::array<bool, 4> weight_mask = {mask[1], mask[2], mask[5] && call.weight.prior_loc,
                                           mask[6] && call.weight.prior_scale};
  const std::array<bool, 4> bias_mask = {mask[3], mask[4], mask[7] && call.bias.prior_loc,
                                         mask[8] && call.bias.prior_scale};
  ParameterGradients out;
  if (!call.has_bias())  // results share no memory
    for (at::Tensor& grad : out.bias) grad = empty_scalars(call, {0});
  GradientLaunch<T> launch;
  std::vector<std::array<at::Tensor, 4>*> order;
  if (device::is_sampled(call.weight)) {
    launch.add(call.weight, {operands.weight, operands.slabs, operands.slabs_eps},
               call.options.weight_kl ? grad_kl : at::Tensor(), weight_mask);
    order.push_back(&out.weight);
  } else {
    out.weight = plain_gradients(call.weight, weight_by_draw(operands), weight_mask);
  }
  if (call.has_bias() && device::is_sampled(call.bias)) {
    launch.add(call.bias, {operands.bias, {}, {}}, call.options.bias_kl ? grad_kl : at::Tensor(), bias_mask);
    order.push_back(&out.bias);
  } else if (call.has_bias()) {
    out.bias = plain_gradients(call.bias, operands.bias, bias_mask);
  }
  auto results = launch.run(device::backward_site(call));
  for (size_t i = 0; i < order.size(); ++i) *order[i] = std::move(results[i].grad);
  return out;
}

Tensors9 backward_cuda(const ConvCall& call, const ConvBackward& back, const at::Tensor* grad_kl,
                       const std::array<bool, 9>& mask) {
  const device::Guard guard(*call.input);
  const Operands operands = convolution_gradients(call, back);
  const at::Tensor by_kl = grad_kl == nullptr ? at::Tensor() : in_dtype(*grad_kl, call.parameter_dtype());
  const auto [w, b] = call.parameter_dtype() == at::kDouble ? parameter_gradients<double>(call, operands, by_kl, mask)
                                                            : parameter_gradients<float>(call, operands, by_kl, mask);
  const auto options = call.input->options().memory_format(at::MemoryFormat::Contiguous);
  const at::Tensor input = operands.input.defined() ? operands.input : at::empty({0}, options);
  return {input, w[0], w[1], b[0], b[1], w[2], w[3], b[2], b[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, FBC_CUDA_KEY, m) {
  m.impl("bconv2d", bconv2d_entry<forward_cuda>);
  m.impl("bconv2d_backward", bconv2d_backward_entry<backward_cuda>);
}

}  // namespace fbc
