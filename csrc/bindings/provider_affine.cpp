// Flipout and local reparameterisation on the CPU: two products, each by the one-pass kernels of
// csrc/cpu (the weight goes from the noise generator into packed tiles), and one elementwise pass.
//
//   Flipout   conv(x, loc) + t * conv(x * r, delta)
//   local     conv(x, loc) + e * sqrt(conv(x^2, scale^2))
//
// Where an image has enough pixels, Flipout is one product with a weight formed for each image, and the
// direct provider computes it (csrc/cpu/row_weights.inc).
//
// Local's variance and what is multiplied with its gradient are summed directly, never by Winograd:
// a sum of positive terms must not cancel, and a gradient that is large where the deviation is small
// must not leak into its neighbours.
#include <ATen/ops/empty.h>

#include "affine_call.h"
#include "posterior_pass.h"

namespace fbc {

namespace {

// Pixels (tiles of Winograd) of an image from which Flipout forms a weight for it; measured.
constexpr int64_t kRowWeightUses = 9;

template <typename T>
constexpr Dtype own_dtype() {
  return sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
}

at::Tensor workspace(int64_t bytes) {  // at::empty aligns to 64 bytes
  return advised(at::empty({std::max<int64_t>(bytes, 1)}, at::TensorOptions().dtype(at::kByte)));
}

// An image as the kernels read it.
struct Image {
  const void* data;
  Dtype dtype;
  ImageStrides stride;
};

Image image_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type()), image_strides(tensor)};
}

// (rows, channels, height, width) in NHWC memory and the parameters' dtype.
at::Tensor empty_nhwc(const ConvCall& call, int64_t rows, int64_t height, int64_t width,
                      int64_t channels) {
  const at::Tensor dense =
      advised(at::empty({rows, height, width, channels}, call.weight.loc->options().memory_format(
                                                             at::MemoryFormat::Contiguous)));
  return dense.permute({0, 3, 1, 2});
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
  TORCH_CHECK_NOT_IMPLEMENTED(
      choice.reason == nullptr && requested != Algorithm::kLibrary,
      "algorithm: expected one that can compute the ", direction_name(direction),
      " of this convolution, got '", choice.name, "': ",
      choice.reason != nullptr ? choice.reason : "the operator has no library provider");
  return choice.algorithm == Algorithm::kWinograd2 ? Algorithm::kWinograd2 : Algorithm::kDirect;
}

template <typename T>
const ConvKernels<T>* kernels_of(const ConvCall& call, Direction direction) {
  const bool winograd = method_of<T>(call, direction) == Algorithm::kWinograd2;
  return winograd ? &kernels<T>().winograd2 : &kernels<T>().direct;
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

bool is_flipout(const ConvCall& call) {
  return static_cast<Estimator>(call.options.estimator) == Estimator::kFlipout;
}

// Every output row with an input row of its own: of Flipout's signed input.
ConvShape unshared(ConvShape shape) {
  shape.N = shape.output_rows();
  shape.share_input = false;
  return shape;
}
// Every input row once, whatever the draws: where no weight is drawn.
ConvShape undrawn(ConvShape shape) {
  shape.num_samples = 1;
  shape.share_input = false;
  return shape;
}

template <typename T>
Product<T> second_product(const ConvCall& call) {
  Product<T> product = mean_product<T>(call, unshared(call.shape));
  product.posterior.term = WeightTerm::kPerturbation;
  if (!is_flipout(call)) {
    const ConvKernels<T>* direct = &kernels<T>().direct;
    product.shape = undrawn(call.shape);
    product.posterior.term = WeightTerm::kVariance;
    product.weight_dtype = own_dtype<T>();
    product.square_input = true;
    product.fprop = product.dgrad = product.wgrad = direct;
  }
  return product;
}

AffineShape affine_shape(const ConvCall& call, int64_t P, int64_t Q, int64_t K) {
  const ConvShape& s = call.shape;
  return {s.output_rows(), s.rows_per_sample(), P, Q, K, s.share_input};
}

template <typename F>
void for_image_rows(int64_t rows, F&& body) {
  at::parallel_for(0, rows, 1, body);
}

// (output rows, channels): the signs of every draw, one after another.
at::Tensor draw_signs(const ConvCall& call, Stream stream, int64_t channels) {
  const ConvShape& s = call.shape;
  const ConvOptions& o = call.options;
  const at::Tensor signs =
      at::empty({s.output_rows(), channels}, at::TensorOptions().dtype(at::kFloat));
  const int64_t count = s.rows_per_sample() * channels;
  for (int64_t sample = 0; sample < s.num_samples; ++sample) {
    noise_kernels().signs(noise_key(*call.weight.seed, o.offset_add + sample), stream,
                          static_cast<uint64_t>(o.row_offset * channels), count,
                          signs.mutable_data_ptr<float>() + sample * count);
  }
  return signs;
}

struct SignTables {
  at::Tensor input, output;
  FlipSigns pointers() const {
    return {input.const_data_ptr<float>(), output.const_data_ptr<float>()};
  }
};

SignTables sign_tables(const ConvCall& call) {
  return {draw_signs(call, Stream::kSignInput, call.shape.C),
          draw_signs(call, Stream::kSignOutput, call.shape.K)};
}

// Whether each vector of an image's weight is used often enough to be formed.
bool has_row_weights(const ConvCall& call, Algorithm method, Direction direction) {
  const ConvShape& s = call.shape;
  const bool winograd = method == Algorithm::kWinograd2;
  const int64_t height = direction == Direction::kDgrad ? s.H : s.P;
  const int64_t width = direction == Direction::kDgrad ? s.W : s.Q;
  const int64_t uses = winograd ? ((height + 1) / 2) * ((width + 1) / 2) : height * width;
  return uses >= kRowWeightUses;
}

template <typename T>
at::Tensor apply_signs(const ConvCall& call, const at::Tensor& image, bool share_input,
                       const at::Tensor& signs) {
  const int64_t channels = image.size(1), height = image.size(2), width = image.size(3);
  const at::Tensor out = empty_nhwc(call, call.shape.output_rows(), height, width, channels);
  const Image source = image_of(image);
  SignParams p = {};
  p.shape = affine_shape(call, height, width, channels);
  p.shape.share_input = share_input;
  p.dtype = source.dtype;
  p.image = source.data;
  p.image_stride = source.stride;
  p.sign = signs.const_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  for_image_rows(p.shape.rows * height, [&](int64_t begin, int64_t end) {
    kernels<T>().affine.apply_signs(p, begin, end);
  });
  return out;
}

// ---- the products -------------------------------------------------------------------------------

template <typename T>
at::Tensor run_fprop(const ConvCall& call, const Product<T>& product, const at::Tensor& input,
                     double* kl) {
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
  for_image_rows(s.N * s.P, [&](int64_t begin, int64_t end) {
    kernels<T>().affine.local_backward(p, begin, end);
  });
  return out;
}

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
  for_image_rows(s.N * s.H, [&](int64_t begin, int64_t end) {
    kernels<T>().affine.input_grad(p, begin, end);
  });
}

// Both products of a weight's gradient.
template <typename T>
void run_wgrads(const Product<T>& mean, const Product<T>& second, const at::Tensor& input,
                const Operands& operands, const PosteriorGrads<T>& grads) {
  if (grads.grad_loc != nullptr) {
    PosteriorGrads<T> by_loc = grads;
    by_loc.grad_rho = by_loc.grad_prior_loc = by_loc.grad_prior_scale = nullptr;
    run_wgrad(mean, input, operands.grad_mean, by_loc);
  }
  if (grads.grad_rho != nullptr || grads.grad_prior_loc != nullptr ||
      grads.grad_prior_scale != nullptr) {
    PosteriorGrads<T> rest = grads;
    rest.grad_loc = nullptr;
    run_wgrad(second, operands.second_input, operands.grad_second, rest);
  }
}

// Both products of the input's gradient, and what makes one of them.
template <typename T>
void run_dgrads(const ConvCall& call, Product<T> mean, const Product<T>& second,
                const Operands& operands, const at::Tensor& sign_input,
                const at::Tensor& grad_input) {
  mean.posterior = at_loc(mean.posterior);
  const at::Tensor by_mean = run_dgrad(call, mean, operands.grad_mean);
  const at::Tensor by_second = run_dgrad(call, second, operands.grad_second);
  combine_input_grad<T>(call, by_mean, by_second, sign_input, grad_input);
}

template <typename T>
void forward_by_rows(const ConvCall& call, Algorithm method, AffineOutputs* out) {
  const SignTables signs = sign_tables(call);
  ConvCall by_rows = call;
  by_rows.signs = signs.pointers();
  ConvOutputs result = {};
  result.pre_activation = out->pre_activation;
  forward_direct<T>(by_rows, method, &result);
  out->output = result.output;
  out->kl += result.kl;
}

// Each direction by weights of rows, or by two products.
template <typename T>
void backward_flipout(const ConvCall& call, const at::Tensor& grad, const at::Tensor& grad_input,
                      const PosteriorGrads<T>& grads) {
  const SignTables signs = sign_tables(call);
  ConvCall by_rows = call;
  by_rows.signs = signs.pointers();
  const Algorithm dgrad = method_of<T>(call, Direction::kDgrad);
  const Algorithm wgrad = method_of<T>(call, Direction::kWgrad);
  const bool rows_of_dgrad = has_row_weights(call, dgrad, Direction::kDgrad);
  const bool rows_of_wgrad = has_row_weights(call, wgrad, Direction::kWgrad);
  const bool wants_weight = grads.grad_loc != nullptr || grads.grad_rho != nullptr ||
                            grads.grad_prior_loc != nullptr || grads.grad_prior_scale != nullptr;
  Operands operands;
  operands.grad_mean = grad;
  if ((wants_weight && !rows_of_wgrad) || (grad_input.defined() && !rows_of_dgrad)) {
    operands.grad_second = apply_signs<T>(call, grad, false, signs.output);
  }
  const Product<T> second = second_product<T>(call), mean = mean_product<T>(call, call.shape);
  if (wants_weight && rows_of_wgrad) {
    wgrad_direct<T>(by_rows, wgrad, grad, grads);
  } else if (wants_weight) {
    operands.second_input = apply_signs<T>(call, *call.input, call.shape.share_input, signs.input);
    run_wgrads(mean, second, *call.input, operands, grads);
  }
  if (grad_input.defined() && rows_of_dgrad) {
    dgrad_direct<T>(by_rows, dgrad, grad, grad_input);
  } else if (grad_input.defined()) {
    run_dgrads(call, mean, second, operands, signs.input, grad_input);
  }
}

}  // namespace

// ---- the call -----------------------------------------------------------------------------------

template <typename T>
void forward_affine(const ConvCall& call, AffineOutputs* out) {
  const ConvShape& s = call.shape;
  const Algorithm method = method_of<T>(call, Direction::kFprop);
  if (is_flipout(call) && has_row_weights(call, method, Direction::kFprop)) {
    forward_by_rows<T>(call, method, out);
    return;
  }
  const Product<T> second = second_product<T>(call);
  Product<T> mean = mean_product<T>(call, undrawn(s));
  mean.posterior = at_loc(mean.posterior);
  double* kl = call.options.weight_kl ? &out->kl : nullptr;
  AffineForwardParams p = {};
  at::Tensor bias, sign, input = *call.input;
  if (call.has_bias()) {
    bias = draw_bias<T>(call, call.options.bias_kl ? &out->kl : nullptr);
    p.bias = bias.const_data_ptr();
  }
  if (is_flipout(call)) {
    sign = draw_signs(call, Stream::kSignOutput, s.K);
    p.sign = sign.const_data_ptr<float>();
    input = apply_signs<T>(call, input, s.share_input, draw_signs(call, Stream::kSignInput, s.C));
  } else {
    out->deviation = empty_nhwc(call, s.N, s.P, s.Q, s.K);
    p.deviation = out->deviation.mutable_data_ptr();
  }
  const at::Tensor by_mean = run_fprop(call, mean, *call.input, nullptr);
  const at::Tensor by_second = run_fprop(call, second, input, kl);
  out->output = empty_output(call);
  p.shape = affine_shape(call, s.P, s.Q, s.K);
  p.mean = by_mean.const_data_ptr();
  p.second = by_second.const_data_ptr();
  p.noise = noise_key(*call.weight.seed, call.options.offset_add);
  p.row_offset = static_cast<uint64_t>(call.options.row_offset);
  p.activation = call.activation;
  p.activation_param = call.options.activation_param;
  p.dtype = dtype_of(call.compute_dtype);
  p.output = out->output.mutable_data_ptr();
  if (out->pre_activation.defined()) p.pre_activation = out->pre_activation.mutable_data_ptr();
  p.output_stride = image_strides(out->output);
  for_image_rows(p.shape.rows * s.P, [&](int64_t begin, int64_t end) {
    kernels<T>().affine.forward(p, begin, end);
  });
}

template <typename T>
void backward_affine(const ConvCall& call, const at::Tensor& grad, const at::Tensor* deviation,
                     const at::Tensor& grad_input, const PosteriorGrads<T>& grads) {
  if (is_flipout(call)) {
    backward_flipout<T>(call, grad, grad_input, grads);
    return;
  }
  const Operands operands = local_operands<T>(call, grad, *deviation);
  const Product<T> second = second_product<T>(call);
  const Product<T> mean = mean_product<T>(call, undrawn(call.shape));
  run_wgrads(mean, second, *call.input, operands, grads);
  if (grad_input.defined()) run_dgrads(call, mean, second, operands, at::Tensor(), grad_input);
}

template void forward_affine<float>(const ConvCall&, AffineOutputs*);
template void forward_affine<double>(const ConvCall&, AffineOutputs*);
template void backward_affine<float>(const ConvCall&, const at::Tensor&, const at::Tensor*,
                                     const at::Tensor&, const PosteriorGrads<float>&);
template void backward_affine<double>(const ConvCall&, const at::Tensor&, const at::Tensor*,
                                      const at::Tensor&, const PosteriorGrads<double>&);

}  // namespace fbc
