// What Flipout and local reparameterisation share: two products of one call, each by the one-pass
// kernels of csrc/cpu, and what runs before and after them. Included by provider_flipout.cpp and
// provider_local.cpp.
#pragma once

#include "affine_call.h"
#include "posterior_pass.h"

namespace fbc {

template <typename T>
constexpr Dtype own_dtype() {
  return sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
}

// An image as the kernels read it.
struct Image {
  const void* data;
  Dtype dtype;
  ImageStrides stride;
};

inline Image image_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type()), image_strides(tensor)};
}

// One of the two products of a call: what is multiplied, by which method.
template <typename T>
struct Product {
  ConvShape shape;
  PosteriorParams<T> posterior;
  Dtype weight_dtype;
  bool square_input;
  const ConvKernels<T>* fprop;
  const ConvKernels<T>* dgrad;
  const ConvKernels<T>* wgrad;
};

// Products are formed in the parameters' dtype: the method that suits that, and never the library.
template <typename T>
Algorithm method_of(const ConvCall& call, Direction direction) {
  ConvProblem problem = call.problem();
  problem.dtype = own_dtype<T>();
  const auto requested = static_cast<Algorithm>(call.options.algorithm);
  const Choice choice = select_algorithm(problem, direction, requested);
  TORCH_CHECK_NOT_IMPLEMENTED(choice.reason == nullptr && requested != Algorithm::kLibrary,
                              "algorithm: expected one that can compute the ", direction_name(direction),
                              " of this convolution, got '", choice.name,
                              "': ", choice.reason != nullptr ? choice.reason : "the operator has no library provider");
  return choice.algorithm == Algorithm::kLibrary ? Algorithm::kDirect : choice.algorithm;
}

template <typename T>
const ConvKernels<T>* kernels_of(const ConvCall& call, Direction direction) {
  return &conv_kernels<T>(method_of<T>(call, direction));
}

template <typename T>
Product<T> mean_product(const ConvCall& call, const ConvShape& shape) {
  Product<T> product = {shape,
                        host_posterior_params<T>(call.weight),
                        dtype_of(call.compute_dtype),
                        false,
                        kernels_of<T>(call, Direction::kFprop),
                        kernels_of<T>(call, Direction::kDgrad),
                        kernels_of<T>(call, Direction::kWgrad)};
  return product;
}

// loc itself: a point mass.
template <typename T>
PosteriorParams<T> at_loc(PosteriorParams<T> p) {
  p.rho = nullptr;
  return p;
}

// Every input row once, whatever the draws: where no weight is drawn.
inline ConvShape undrawn(ConvShape shape) {
  shape.num_samples = 1;
  shape.share_input = false;
  return shape;
}

inline AffineShape affine_shape(const ConvCall& call, int64_t P, int64_t Q, int64_t K) {
  const ConvShape& s = call.shape;
  return {s.output_rows(), s.rows_per_sample(), P, Q, K, s.share_input};
}

// ---- the products -------------------------------------------------------------------------------

template <typename T>
at::Tensor run_fprop(const ConvCall& call, const Product<T>& product, const at::Tensor& input, double* kl) {
  const ConvShape& s = product.shape;
  const at::Tensor out = empty_nhwc(call, s.output_rows(), s.P, s.Q, s.K);
  const Image source = image_of(input);
  FpropParams f = {};
  f.shape = s;
  f.dtype = source.dtype;
  f.weight_dtype = product.weight_dtype;
  f.output_dtype = own_dtype<T>();
  f.input = source.data;
  f.input_stride = source.stride;
  f.square_input = product.square_input;
  f.output = out.mutable_data_ptr();
  f.output_stride = image_strides(out);
  f.activation = Activation::kLinear;
  std::optional<KlPartials<T>> partials;
  if (kl != nullptr) {
    partials.emplace(product.posterior);
    f.kl_partials = partials->data();
  }
  const Parallel parallel = parallel_loop();
  const at::Tensor scratch = workspace(product.fprop->fprop_workspace(f, parallel.threads));
  product.fprop->fprop(f, product.posterior, parallel, scratch.mutable_data_ptr());
  if (kl != nullptr) *kl += partials->sum();
  return out;
}

template <typename T>
at::Tensor run_dgrad(const ConvCall& call, const Product<T>& product, const at::Tensor& grad) {
  const ConvShape& s = product.shape;
  const at::Tensor out = empty_nhwc(call, s.N, s.H, s.W, s.C);
  DgradParams d = {};
  d.shape = s;
  d.dtype = own_dtype<T>();
  d.weight_dtype = product.weight_dtype;
  d.grad_dtype = own_dtype<T>();
  d.grad = grad.const_data_ptr();
  d.grad_input = out.mutable_data_ptr();
  d.grad_input_stride = image_strides(out);
  const Parallel parallel = parallel_loop();
  const at::Tensor scratch = workspace(product.dgrad->dgrad_workspace(d, parallel.threads));
  product.dgrad->dgrad(d, product.posterior, parallel, scratch.mutable_data_ptr());
  return out;
}

template <typename T>
void run_wgrad(const Product<T>& product, const at::Tensor& input, const at::Tensor& grad,
               const PosteriorGrads<T>& grads) {
  const Image source = image_of(input);
  WgradParams w = {};
  w.shape = product.shape;
  w.dtype = source.dtype;
  w.input = source.data;
  w.input_stride = source.stride;
  w.square_input = product.square_input;
  w.grad_dtype = own_dtype<T>();
  w.grad = grad.const_data_ptr();
  const Parallel parallel = parallel_loop();
  const at::Tensor scratch = workspace(product.wgrad->wgrad_workspace(w, parallel.threads));
  product.wgrad->wgrad(w, product.posterior, grads, parallel, scratch.mutable_data_ptr());
}

// What the products of a backward pass multiply: the two gradients, and the second input.
struct Operands {
  at::Tensor grad_mean, grad_second, second_input;
};

template <typename T>
void combine_input_grad(const ConvCall& call, const at::Tensor& by_mean, const at::Tensor& second,
                        const at::Tensor& sign_input, const at::Tensor& grad_input) {
  const ConvShape& s = call.shape;
  AffineInputGradParams p = {};
  p.shape = affine_shape(call, s.H, s.W, s.C);
  p.by_mean = by_mean.const_data_ptr();
  p.second = second.const_data_ptr();
  if (sign_input.defined()) p.sign = sign_input.const_data_ptr<float>();
  const Image input = image_of(*call.input);
  p.dtype = input.dtype;
  p.input = input.data;
  p.input_stride = input.stride;
  p.grad_input = grad_input.mutable_data_ptr();
  p.grad_input_stride = image_strides(grad_input);
  at::parallel_for(0, s.N * s.H, 1, [&](int64_t begin, int64_t end) { kernels<T>().affine.input_grad(p, begin, end); });
}

// Both products of a weight's gradient.
template <typename T>
void run_wgrads(const Product<T>& mean, const Product<T>& second, const at::Tensor& input, const Operands& operands,
                const PosteriorGrads<T>& grads) {
  if (grads.grad_loc != nullptr) {
    PosteriorGrads<T> by_loc = grads;
    by_loc.grad_rho = by_loc.grad_prior_loc = by_loc.grad_prior_scale = nullptr;
    run_wgrad(mean, input, operands.grad_mean, by_loc);
  }
  if (grads.grad_rho != nullptr || grads.grad_prior_loc != nullptr || grads.grad_prior_scale != nullptr) {
    PosteriorGrads<T> rest = grads;
    rest.grad_loc = nullptr;
    run_wgrad(second, operands.second_input, operands.grad_second, rest);
  }
}

// Both products of the input's gradient, and what makes one of them.
template <typename T>
void run_dgrads(const ConvCall& call, Product<T> mean, const Product<T>& second, const Operands& operands,
                const at::Tensor& sign_input, const at::Tensor& grad_input) {
  mean.posterior = at_loc(mean.posterior);
  const at::Tensor by_mean = run_dgrad(call, mean, operands.grad_mean);
  const at::Tensor by_second = run_dgrad(call, second, operands.grad_second);
  combine_input_grad<T>(call, by_mean, by_second, sign_input, grad_input);
}

// What the last pass of a forward needs of the call; the caller adds the products.
template <typename T>
AffineForwardParams forward_params(const ConvCall& call, const at::Tensor& bias, AffineOutputs* out) {
  const ConvShape& s = call.shape;
  AffineForwardParams p = {};
  p.shape = affine_shape(call, s.P, s.Q, s.K);
  p.noise = noise_key(*call.weight.seed, call.options.offset_add);
  p.row_offset = static_cast<uint64_t>(call.options.row_offset);
  if (bias.defined()) p.bias = bias.const_data_ptr();
  p.activation = call.activation;
  p.activation_param = call.options.activation_param;
  p.dtype = dtype_of(call.compute_dtype);
  out->output = empty_output(call);
  p.output = out->output.mutable_data_ptr();
  if (out->pre_activation.defined()) p.pre_activation = out->pre_activation.mutable_data_ptr();
  p.output_stride = image_strides(out->output);
  return p;
}

template <typename T>
void run_forward(const AffineForwardParams& p) {
  at::parallel_for(0, p.shape.rows * p.shape.P, 1,
                   [&](int64_t begin, int64_t end) { kernels<T>().affine.forward(p, begin, end); });
}

template <typename T>
at::Tensor draw_bias_if_any(const ConvCall& call, AffineOutputs* out) {
  if (!call.has_bias()) return {};
  return draw_bias<T>(call, call.options.bias_kl ? &out->kl : nullptr);
}

}  // namespace fbc
