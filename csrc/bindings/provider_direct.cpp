// The direct provider: the one-pass kernels of csrc/cpu (direct and Winograd), torch's threads.
#include <ATen/ops/empty.h>

#include "conv_call.h"
#include "posterior_pass.h"

namespace fbc {

namespace {

template <typename T>
const ConvKernels<T>& methods(const ConvCall& call, Algorithm method) {
  return reads_bf16_gradient(call, method) ? kernels<T>().pairs : conv_kernels<T>(method);
}

// A linear layer's incoming gradient, where it already has the memory and dtype that kernels read.
bool can_use_as_is(const ConvBackward& back, at::ScalarType grad_dtype) {
  return back.saved == nullptr && back.grad_output->scalar_type() == grad_dtype &&
         back.grad_output->is_contiguous(at::MemoryFormat::ChannelsLast);
}

// (num_samples, K, C/G, R, S) draws that forward kept, as point masses.
template <typename T>
PosteriorParams<T> kept_draws(const at::Tensor& draws) {
  const at::Tensor first = draws.select(0, 0);
  PosteriorTensors t = {};
  t.loc = &first;
  PosteriorParams<T> p = posterior_params<T>(t);
  p.loc_sample_stride = draws.stride(0);
  return p;
}

// The gradient in the dtype that the method reads; NHWC stays NHWC.
at::Tensor gradient_for(const ConvCall& call, Algorithm method, const at::Tensor& grad) {
  return grad.to(reads_bf16_gradient(call, method) ? at::kBFloat16 : call.parameter_dtype());
}

}  // namespace

bool reads_bf16_gradient(const ConvCall& call, Algorithm method) {
  return method == Algorithm::kDirect && call.compute_dtype == at::kBFloat16 && call.parameter_dtype() == at::kFloat &&
         call.signs.input == nullptr && current_bf16() && pairs_fit(call.shape);
}

template <typename T>
at::Tensor draw_bias(const ConvCall& call, double* kl) {
  const auto p = host_posterior_params<T>(call.bias);
  at::Tensor drawn = at::empty({call.shape.num_samples, call.shape.K}, call.bias.loc->options());
  for (int64_t s = 0; s < call.shape.num_samples; ++s) {
    T* row = drawn.mutable_data_ptr<T>() + s * call.shape.K;
    draw_sample(p, s, {row, dtype_of(drawn.scalar_type()), {0, 0, 0, 1}}, s == 0 ? kl : nullptr);
  }
  return drawn;
}

template <typename T>
void forward_direct(const ConvCall& call, Algorithm method, ConvOutputs* out) {
  const auto& table = methods<T>(call, method);
  const auto p = host_posterior_params<T>(call.weight);
  out->output = empty_output(call);
  FpropParams f = {};
  at::Tensor bias;
  if (call.has_bias()) {
    bias = draw_bias<T>(call, call.options.bias_kl ? &out->kl : nullptr);
    f.bias = bias.const_data_ptr();
  }
  f.shape = call.shape;
  f.dtype = f.weight_dtype = f.output_dtype = dtype_of(call.compute_dtype);
  f.input = call.input->const_data_ptr();
  f.input_stride = image_strides(*call.input);
  f.signs = call.signs;
  f.output = out->output.mutable_data_ptr();
  f.output_stride = image_strides(out->output);
  if (out->pre_activation.defined()) f.pre_activation = out->pre_activation.mutable_data_ptr();
  f.activation = call.activation;
  f.activation_param = call.options.activation_param;
  if (out->weight.defined()) f.kept_weight = out->weight.mutable_data_ptr();
  const bool with_kl = call.options.weight_kl && p.rho != nullptr;
  std::optional<KlPartials<T>> partials;
  if (with_kl) {
    partials.emplace(p);
    f.kl_partials = partials->data();
  }
  const Parallel parallel = parallel_loop();
  const at::Tensor scratch = workspace(table.fprop_workspace(f, parallel.threads));
  table.fprop(f, p, parallel, scratch.mutable_data_ptr());
  if (with_kl) out->kl += partials->sum();
}

namespace {

ActivationGradParams activation_grad_params(const ConvCall& call, const ConvBackward& back) {
  const ConvShape& s = call.shape;
  ActivationGradParams a = {};
  a.rows = s.output_rows();
  a.P = s.P;
  a.Q = s.Q;
  a.K = s.K;
  a.num_samples = s.num_samples;
  a.dtype = dtype_of(call.compute_dtype);
  a.grad_output = back.grad_output->const_data_ptr();
  a.grad_output_stride = image_strides(*back.grad_output);
  if (back.saved != nullptr) {
    a.saved = back.saved->const_data_ptr();
    a.saved_stride = image_strides(*back.saved);
  }
  a.activation = call.activation;
  a.activation_param = call.options.activation_param;
  return a;
}

at::Tensor empty_grad_bias(const ConvCall& call, ActivationGradParams* a) {
  at::Tensor grad_bias = at::empty({a->num_samples, a->K}, call.weight.loc->options());
  a->grad_bias = grad_bias.mutable_data_ptr();
  return grad_bias;
}

WgradParams wgrad_params(const ConvCall& call) {
  WgradParams w = {};
  w.shape = call.shape;
  w.dtype = dtype_of(call.compute_dtype);
  w.input = call.input->const_data_ptr();
  w.input_stride = image_strides(*call.input);
  w.signs = call.signs;
  return w;
}

template <typename T>
void run_wgrad(const ConvCall& call, const ConvKernels<T>& table, const WgradParams& w,
               const PosteriorGrads<T>& grads) {
  const Parallel parallel = parallel_loop();
  const at::Tensor scratch = workspace(table.wgrad_workspace(w, parallel.threads));
  table.wgrad(w, host_posterior_params<T>(call.weight), grads, parallel, scratch.mutable_data_ptr());
}

}  // namespace

template <typename T>
PreActivationGradient activation_backward_direct(const ConvCall& call, const ConvBackward& back,
                                                 at::ScalarType grad_dtype) {
  const auto& table = kernels<T>();
  ActivationGradParams a = activation_grad_params(call, back);
  PreActivationGradient out;
  if (can_use_as_is(back, grad_dtype)) {
    out.grad = *back.grad_output;
    if (!back.wants_bias) return out;
  } else {
    const at::Tensor nhwc = advised(at::empty({a.rows, a.P, a.Q, a.K}, call.weight.loc->options().dtype(grad_dtype)));
    out.grad = nhwc.permute({0, 3, 1, 2});
    a.grad_dtype = dtype_of(grad_dtype);
    a.grad = nhwc.mutable_data_ptr();
  }
  if (back.wants_bias) out.grad_bias = empty_grad_bias(call, &a);
  const Parallel parallel = parallel_loop();
  const at::Tensor scratch = workspace(table.activation_grad_workspace(a, parallel.threads));
  table.activation_grad(a, parallel, scratch.mutable_data_ptr());
  return out;
}

template <typename T>
void dgrad_direct(const ConvCall& call, Algorithm method, const at::Tensor* kept, const at::Tensor& grad,
                  const at::Tensor& grad_input) {
  const auto& table = methods<T>(call, method);
  const at::Tensor own = gradient_for(call, method, grad);
  DgradParams d = {};
  d.shape = call.shape;
  d.dtype = d.weight_dtype = dtype_of(call.compute_dtype);
  d.signs = call.signs;
  d.grad_dtype = dtype_of(own.scalar_type());
  d.grad = own.const_data_ptr();
  d.grad_input = grad_input.mutable_data_ptr();
  d.grad_input_stride = image_strides(grad_input);
  const Parallel parallel = parallel_loop();
  const at::Tensor scratch = workspace(table.dgrad_workspace(d, parallel.threads));
  const at::Tensor draws = kept == nullptr ? at::Tensor() : kept->to(call.parameter_dtype());
  table.dgrad(d, draws.defined() ? kept_draws<T>(draws) : host_posterior_params<T>(call.weight), parallel,
              scratch.mutable_data_ptr());
}

template <typename T>
void wgrad_direct(const ConvCall& call, Algorithm method, const at::Tensor& grad, const PosteriorGrads<T>& grads) {
  const at::Tensor own = gradient_for(call, method, grad);
  WgradParams w = wgrad_params(call);
  w.grad_dtype = dtype_of(own.scalar_type());
  w.grad = own.const_data_ptr();
  run_wgrad(call, methods<T>(call, method), w, grads);
}

// Images of few channels: a task of wgrad then has all of them, so that each gradient is made once. A row of
// gradients has to fit into L2.
bool reads_output_gradient(const ConvCall& call, Algorithm method, const ConvBackward& back) {
  constexpr int64_t kMostChannels = 4, kMostElements = int64_t{1} << 17;
  return method == Algorithm::kDirect && back.wants_weight && !back.wants_input && call.signs.input == nullptr &&
         call.shape.groups == 1 && call.shape.C <= kMostChannels && call.shape.Q * call.shape.K <= kMostElements &&
         !reads_bf16_gradient(call, method);
}

template <typename T>
at::Tensor wgrad_of_output(const ConvCall& call, const ConvBackward& back, const PosteriorGrads<T>& grads) {
  ActivationGradParams a = activation_grad_params(call, back);
  at::Tensor grad_bias;
  if (back.wants_bias) grad_bias = empty_grad_bias(call, &a);
  WgradParams w = wgrad_params(call);
  w.grad_dtype = dtype_of(call.parameter_dtype());
  w.makes_grad = &a;
  run_wgrad(call, kernels<T>().direct, w, grads);
  return grad_bias;
}

template at::Tensor draw_bias<float>(const ConvCall&, double*);
template at::Tensor draw_bias<double>(const ConvCall&, double*);
template void forward_direct<float>(const ConvCall&, Algorithm, ConvOutputs*);
template void forward_direct<double>(const ConvCall&, Algorithm, ConvOutputs*);
template PreActivationGradient activation_backward_direct<float>(const ConvCall&, const ConvBackward&, at::ScalarType);
template PreActivationGradient activation_backward_direct<double>(const ConvCall&, const ConvBackward&, at::ScalarType);
template void dgrad_direct<float>(const ConvCall&, Algorithm, const at::Tensor*, const at::Tensor&, const at::Tensor&);
template void dgrad_direct<double>(const ConvCall&, Algorithm, const at::Tensor*, const at::Tensor&, const at::Tensor&);
template at::Tensor wgrad_of_output<float>(const ConvCall&, const ConvBackward&, const PosteriorGrads<float>&);
template at::Tensor wgrad_of_output<double>(const ConvCall&, const ConvBackward&, const PosteriorGrads<double>&);
template void wgrad_direct<float>(const ConvCall&, Algorithm, const at::Tensor&, const PosteriorGrads<float>&);
template void wgrad_direct<double>(const ConvCall&, Algorithm, const at::Tensor&, const PosteriorGrads<double>&);

}  // namespace fbc
