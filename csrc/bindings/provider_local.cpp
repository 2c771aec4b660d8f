// Local reparameterisation on the CPU: conv(x, loc) + e * sqrt(conv(x^2, scale^2)), two products
// and one pass.
//
// The variance and what is multiplied with its gradient are summed directly, never by Winograd: a
// sum of positive terms must not cancel, and a gradient that is large where the deviation is small
// must not leak into its neighbours.
#include "affine_product.h"

namespace fbc {

namespace {

// No weight is drawn, so that draws that share the input share the products too.
template <typename T>
Product<T> variance_product(const ConvCall& call) {
  Product<T> product = mean_product<T>(call, undrawn(call.shape));
  product.posterior.term = WeightTerm::kVariance;
  product.weight_dtype = own_dtype<T>();
  product.square_input = true;
  product.fprop = product.dgrad = product.wgrad = &kernels<T>().direct;
  return product;
}

template <typename T>
Operands local_operands(const ConvCall& call, const at::Tensor& grad, const at::Tensor& deviation) {
  const ConvShape& s = call.shape;
  Operands out;
  out.second_input = *call.input;
  out.grad_mean = grad;
  out.grad_second = empty_nhwc(call, s.N, s.P, s.Q, s.K);
  LocalBackwardParams p = {};
  p.shape = affine_shape(call, s.P, s.Q, s.K);
  p.grad = grad.const_data_ptr();
  p.deviation = deviation.const_data_ptr();
  p.noise = noise_key(*call.weight.seed, call.options.offset_add);
  p.row_offset = static_cast<uint64_t>(call.options.row_offset);
  if (s.share_input && s.num_samples > 1) {
    out.grad_mean = empty_nhwc(call, s.N, s.P, s.Q, s.K);
    p.grad_mean = out.grad_mean.mutable_data_ptr();
  }
  p.grad_variance = out.grad_second.mutable_data_ptr();
  at::parallel_for(0, s.N * s.P, 1,
                   [&](int64_t begin, int64_t end) { kernels<T>().affine.local_backward(p, begin, end); });
  return out;
}

}  // namespace

template <typename T>
void forward_local(const ConvCall& call, AffineOutputs* out) {
  const ConvShape& s = call.shape;
  Product<T> mean = mean_product<T>(call, undrawn(s));
  mean.posterior = at_loc(mean.posterior);
  const at::Tensor bias = draw_bias_if_any<T>(call, out);
  const at::Tensor by_mean = run_fprop(call, mean, *call.input, nullptr);
  const at::Tensor variance =
      run_fprop(call, variance_product<T>(call), *call.input, call.options.weight_kl ? &out->kl : nullptr);
  out->deviation = empty_nhwc(call, s.N, s.P, s.Q, s.K);
  AffineForwardParams p = forward_params<T>(call, bias, out);
  p.mean = by_mean.const_data_ptr();
  p.second = variance.const_data_ptr();
  p.deviation = out->deviation.mutable_data_ptr();
  run_forward<T>(p);
}

template <typename T>
void backward_local(const ConvCall& call, const at::Tensor& grad, const at::Tensor& deviation,
                    const at::Tensor& grad_input, const PosteriorGrads<T>& grads) {
  const Operands operands = local_operands<T>(call, grad, deviation);
  const Product<T> variance = variance_product<T>(call);
  const Product<T> mean = mean_product<T>(call, undrawn(call.shape));
  run_wgrads(mean, variance, *call.input, operands, grads);
  if (grad_input.defined()) run_dgrads(call, mean, variance, operands, at::Tensor(), grad_input);
}

template void forward_local<float>(const ConvCall&, AffineOutputs*);
template void forward_local<double>(const ConvCall&, AffineOutputs*);
template void backward_local<float>(const ConvCall&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                    const PosteriorGrads<float>&);
template void backward_local<double>(const ConvCall&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                     const PosteriorGrads<double>&);

}  // namespace fbc
