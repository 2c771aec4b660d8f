// bconv2d and bconv2d_backward under the CPU key: check, allocate, choose a provider, call it.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "conv_entry.h"
#include "posterior_pass.h"

namespace fbc {

namespace {

Algorithm resolve(const ConvCall& call, Direction direction) {
  const auto requested = static_cast<Algorithm>(call.options.algorithm);
  const Choice choice = select_algorithm(call.problem(), direction, requested);
  TORCH_CHECK_NOT_IMPLEMENTED(choice.reason == nullptr, "algorithm: expected one that can compute the ",
                              direction_name(direction), " of this convolution, got '", choice.name,
                              "': ", choice.reason);
  return choice.algorithm;
}

// The output itself is left to the provider: ATen's convolution brings its own.
ConvOutputs allocate_outputs(const ConvCall& call, bool keep_weight, bool save_pre_activation) {
  const ConvShape& s = call.shape;
  const auto options = call.input->options();
  ConvOutputs out = {};
  if (save_pre_activation) out.pre_activation = empty_output(call);
  if (keep_weight) {
    out.weight = at::empty({s.num_samples, s.K, s.R, s.S, s.channels_per_group()}, options).permute({0, 1, 4, 2, 3});
  }
  return out;
}

// No pixel to compute: the KL is what it is, and a weight that was asked for is drawn.
template <typename T>
void forward_empty(const ConvCall& call, ConvOutputs* out) {
  out->output = empty_output(call);
  const auto p = host_posterior_params<T>(call.weight);
  if (call.options.weight_kl) out->kl += kl_divergence(p);
  if (call.has_bias() && call.options.bias_kl) out->kl += kl_divergence(host_posterior_params<T>(call.bias));
  if (!out->weight.defined()) return;
  for (int64_t sample = 0; sample < call.shape.num_samples; ++sample) {
    const at::Tensor weight = out->weight.select(0, sample);
    draw_sample(p, sample, {weight.mutable_data_ptr(), dtype_of(call.compute_dtype), posterior_strides(weight, 4)},
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

// A weight or bias that was sampled before, in the 16-bit dtype of the input, as float32: its
// rounding gives the same bits again. `call` is then bound to the tensors in here.
struct WideParameters {
  explicit WideParameters(ConvCall* call) {
    widen(&call->weight, &weight);
    if (call->has_bias()) widen(&call->bias, &bias);
  }
  at::Tensor weight, bias;

 private:
  static void widen(PosteriorTensors* t, at::Tensor* wide) {
    if (t->loc->scalar_type() == t->dtype()) return;
    *wide = t->loc->to(t->dtype());
    t->loc = wide;
  }
};

Tensors4 forward_cpu(const ConvCall& given, bool keep_weight, bool save_pre_activation) {
  ConvCall call = given;
  const WideParameters wide(&call);
  ConvOutputs out = allocate_outputs(call, keep_weight, save_pre_activation);
  if (call.parameter_dtype() == at::kDouble) {
    forward<double>(call, &out);
  } else {
    forward<float>(call, &out);
  }
  const auto options = call.input->options();
  if (!save_pre_activation) out.pre_activation = at::empty({0}, options);
  if (!keep_weight) out.weight = at::empty({0}, options);
  const at::Tensor kl = call.wants_kl() ? scalar_like(*call.weight.loc, out.kl) : empty_gradient(*call.weight.loc);
  return {out.output, kl, out.pre_activation, out.weight};
}

// The noise that dgrad draws, for the gradients of the posterior that follow in the same call. Larger weights'
// would go through memory: drawing it again is faster.
constexpr int64_t kMostSharedNoise = int64_t{1} << 20;

at::Tensor shared_noise(const ConvCall& call, const ConvBackward& back) {
  const int64_t elements = call.weight.loc->numel();
  const bool shares = back.wants_input && back.wants_weight && back.weight == nullptr && call.weight.rho != nullptr &&
                      call.shape.num_samples == 1 && elements <= kMostSharedNoise;
  return shares ? at::empty({elements}, at::kFloat) : at::Tensor();
}

// What the library reads beside kernels of ours. Theirs is NHWC, which ATen would copy for images in planes;
// that takes longer than making another.
at::Tensor library_gradient(const ConvCall& call, const ConvBackward& back, const at::Tensor& own) {
  if (call.format != at::MemoryFormat::Contiguous) return own;
  ConvBackward without_bias = back;
  without_bias.wants_bias = false;
  return activation_backward_library(call, without_bias).grad;
}

// Gradient by each draw of weight and bias, and by the input; undefined where not wanted.
template <typename T>
LibraryGradients backward_convolution(ConvCall& call, ConvBackward back, GradientBinder<T>* weight_grads,
                                      bool* weight_done) {
  const Algorithm dgrad = back.wants_input ? resolve(call, Direction::kDgrad) : Algorithm::kAuto;
  const Algorithm wgrad = back.wants_weight || back.wants_bias ? resolve(call, Direction::kWgrad) : Algorithm::kAuto;
  // In half precision the library would round the sums of the bias gradient.
  const bool library_sums_bias = wgrad == Algorithm::kLibrary && back.wants_weight && back.wants_bias &&
                                 call.compute_dtype == call.parameter_dtype();
  ConvBackward first = back;
  first.wants_bias = back.wants_bias && !library_sums_bias;
  const bool own_dgrad = back.wants_input && dgrad != Algorithm::kLibrary;
  const bool own_wgrad = back.wants_weight && wgrad != Algorithm::kLibrary;
  // The library's sums depend on the number of threads: a bias alone follows the choice for wgrad.
  const bool own_bias = back.wants_bias && wgrad != Algorithm::kLibrary;
  LibraryGradients out;
  if (own_wgrad && reads_output_gradient(call, wgrad, back)) {
    out.bias = wgrad_of_output<T>(call, back, weight_grads->grads);
    *weight_done = true;
    return out;
  }
  // The library reads the dtype of the input in any case.
  const bool narrow = (own_dgrad || own_wgrad) && (!own_dgrad || reads_bf16_gradient(call, dgrad)) &&
                      (!own_wgrad || reads_bf16_gradient(call, wgrad));
  const at::ScalarType grad_dtype = narrow ? at::kBFloat16 : call.parameter_dtype();
  const bool own_any = own_dgrad || own_wgrad || own_bias;
  const PreActivationGradient z =
      own_any ? activation_backward_direct<T>(call, first, grad_dtype) : activation_backward_library(call, first);
  ConvBackward rest = back;
  rest.wants_bias = library_sums_bias;
  rest.wants_input = back.wants_input && dgrad == Algorithm::kLibrary;
  rest.wants_weight = back.wants_weight && wgrad == Algorithm::kLibrary;
  if (rest.wants_input || rest.wants_weight) {
    out = backward_library<T>(call, rest, own_any ? library_gradient(call, back, z.grad) : z.grad);
  }
  if (own_dgrad) {
    out.input = advised(at::empty(call.input->sizes(), call.input->options().memory_format(call.format)));
    dgrad_direct<T>(call, dgrad, back.weight, z.grad, out.input);
  }
  call.weight.eps_drawn = call.weight.eps != nullptr;  // in place of the weight's noise, from here on
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
  binder->run(host_posterior_params<T>(posterior));
  return binder->finish();
}

template <typename T>
Tensors9 backward(ConvCall call, ConvBackward back, double grad_kl, const std::array<bool, 9>& mask) {
  const ConvOptions& o = call.options;
  GradientBinder<T> weight(call.weight, {mask[1], mask[2], mask[5], mask[6]}, o.weight_kl ? grad_kl : 0);
  LibraryGradients conv;
  at::Tensor noise;
  bool weight_done = false;
  if (call.is_empty()) {
    if (mask[0]) conv.input = at::zeros_like(*call.input, call.input->options(), call.format);
  } else if (back.wants_input || back.wants_weight || back.wants_bias) {
    if (mask[2]) noise = shared_noise(call, back);
    if (noise.defined()) call.weight.eps = &noise;
    conv = backward_convolution<T>(call, back, &weight, &weight_done);
  }
  const PosteriorGradients w = weight_done ? weight.finish() : finish_posterior(call.weight, &weight, conv.weight);
  PosteriorGradients b;
  for (at::Tensor* grad : {&b.loc, &b.rho, &b.prior_loc, &b.prior_scale}) {
    *grad = empty_gradient(*call.weight.loc);  // results of an operator share no memory
  }
  if (call.has_bias()) {
    GradientBinder<T> bias(call.bias, {mask[3], mask[4], mask[7], mask[8]}, o.bias_kl ? grad_kl : 0);
    b = finish_posterior(call.bias, &bias, conv.bias);
  }
  if (!conv.input.defined()) conv.input = at::empty({0}, call.input->options());
  return {conv.input, w.loc, w.rho, b.loc, b.rho, w.prior_loc, w.prior_scale, b.prior_loc, b.prior_scale};
}

Tensors9 backward_cpu(const ConvCall& given, const ConvBackward& back, const at::Tensor* grad_kl,
                      const std::array<bool, 9>& mask) {
  ConvCall call = given;
  const WideParameters wide(&call);
  const double kl = grad_kl == nullptr ? 0.0 : grad_kl->item().toDouble();
  Tensors9 out = call.parameter_dtype() == at::kDouble ? backward<double>(call, back, kl, mask)
                                                       : backward<float>(call, back, kl, mask);
  // Each gradient in its argument's dtype.
  std::get<1>(out) = std::get<1>(out).to(given.weight.loc->scalar_type());
  if (call.has_bias()) std::get<3>(out) = std::get<3>(out).to(given.bias.loc->scalar_type());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, CPU, m) {
  m.impl("bconv2d", bconv2d_entry<forward_cpu>);
  m.impl("bconv2d_backward", bconv2d_backward_entry<backward_cpu>);
}

}  // namespace fbc
