// Flipout on the CPU, each direction in one of two ways:
//
//   by rows        conv(x_n, loc + (t_n r_n^T) * delta): one product with a weight formed for each
//                  image, by the direct provider (csrc/cpu/row_weights.inc)
//   two products   conv(x, loc) + t * conv(x * r, delta): where an image has too few pixels to pay
//                  for a weight of its own
#include "affine_product.h"

namespace fbc {

namespace {

// Pixels (tiles of Winograd) of an image from which a weight is formed for it; measured. A tile of 2 x 4 uses half as
// many weights again; two products of its weight gradient are as fast until there are more.
constexpr int64_t kRowWeightUses = 9;
constexpr int64_t kRowWeightWideUses = 6;

// Every output row with an input row of its own: of Flipout's signed input.
ConvShape unshared(ConvShape shape) {
  shape.N = shape.output_rows();
  shape.share_input = false;
  return shape;
}
template <typename T>
Product<T> perturbation_product(const ConvCall& call) {
  Product<T> product = mean_product<T>(call, unshared(call.shape));
  product.posterior.term = WeightTerm::kPerturbation;
  return product;
}

// (output rows, channels): the signs of every draw, one after another.
at::Tensor draw_signs(const ConvCall& call, Stream stream, int64_t channels) {
  const ConvShape& s = call.shape;
  const ConvOptions& o = call.options;
  const at::Tensor signs = at::empty({s.output_rows(), channels}, at::TensorOptions().dtype(at::kFloat));
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
  FlipSigns pointers() const { return {input.const_data_ptr<float>(), output.const_data_ptr<float>()}; }
};

SignTables sign_tables(const ConvCall& call) {
  return {draw_signs(call, Stream::kSignInput, call.shape.C), draw_signs(call, Stream::kSignOutput, call.shape.K)};
}

// The pixels that a weight computes at once: rows and columns.
struct Tile {
  int64_t rows, cols;
};
Tile pixels_at_once(Algorithm method) {
  switch (method) {
    case Algorithm::kWinograd2: return {2, 2};
    case Algorithm::kWinograd2x4: return {2, 4};
    case Algorithm::kWinograd4: return {4, 4};
    default: return {1, 1};
  }
}

// Whether each vector of an image's weight is used often enough to be formed.
bool has_row_weights(const ConvCall& call, Algorithm method, Direction direction) {
  const ConvShape& s = call.shape;
  const int64_t height = direction == Direction::kDgrad ? s.H : s.P;
  const int64_t width = direction == Direction::kDgrad ? s.W : s.Q;
  const Tile tile = pixels_at_once(method);
  const int64_t uses = ((height + tile.rows - 1) / tile.rows) * ((width + tile.cols - 1) / tile.cols);
  const bool wide = method == Algorithm::kWinograd2x4 && direction != Direction::kWgrad;
  return uses >= (wide ? kRowWeightWideUses : kRowWeightUses);
}

template <typename T>
at::Tensor apply_signs(const ConvCall& call, const at::Tensor& image, bool share_input, const at::Tensor& signs) {
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
  at::parallel_for(0, p.shape.rows * height, 1,
                   [&](int64_t begin, int64_t end) { kernels<T>().affine.apply_signs(p, begin, end); });
  return out;
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

}  // namespace

template <typename T>
void forward_flipout(const ConvCall& call, AffineOutputs* out) {
  const Algorithm method = method_of<T>(call, Direction::kFprop);
  if (has_row_weights(call, method, Direction::kFprop)) {
    forward_by_rows<T>(call, method, out);
    return;
  }
  Product<T> mean = mean_product<T>(call, undrawn(call.shape));
  mean.posterior = at_loc(mean.posterior);
  const at::Tensor bias = draw_bias_if_any<T>(call, out);
  const SignTables signs = sign_tables(call);
  const at::Tensor signed_input = apply_signs<T>(call, *call.input, call.shape.share_input, signs.input);
  const at::Tensor by_mean = run_fprop(call, mean, *call.input, nullptr);
  const at::Tensor by_delta =
      run_fprop(call, perturbation_product<T>(call), signed_input, call.options.weight_kl ? &out->kl : nullptr);
  AffineForwardParams p = forward_params<T>(call, bias, out);
  p.mean = by_mean.const_data_ptr();
  p.second = by_delta.const_data_ptr();
  p.sign = signs.output.const_data_ptr<float>();
  run_forward<T>(p);
}

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
  const bool wants_weight = grads.grad_loc != nullptr || grads.grad_rho != nullptr || grads.grad_prior_loc != nullptr ||
                            grads.grad_prior_scale != nullptr;
  Operands operands;
  operands.grad_mean = grad;
  if ((wants_weight && !rows_of_wgrad) || (grad_input.defined() && !rows_of_dgrad)) {
    operands.grad_second = apply_signs<T>(call, grad, false, signs.output);
  }
  const Product<T> second = perturbation_product<T>(call), mean = mean_product<T>(call, call.shape);
  if (wants_weight && rows_of_wgrad) {
    wgrad_direct<T>(by_rows, wgrad, grad, grads);
  } else if (wants_weight) {
    operands.second_input = apply_signs<T>(call, *call.input, call.shape.share_input, signs.input);
    run_wgrads(mean, second, *call.input, operands, grads);
  }
  if (grad_input.defined() && rows_of_dgrad) {
    dgrad_direct<T>(by_rows, dgrad, nullptr, grad, grad_input);
  } else if (grad_input.defined()) {
    run_dgrads(call, mean, second, operands, signs.input, grad_input);
  }
}

template void forward_flipout<float>(const ConvCall&, AffineOutputs*);
template void forward_flipout<double>(const ConvCall&, AffineOutputs*);
template void backward_flipout<float>(const ConvCall&, const at::Tensor&, const at::Tensor&,
                                      const PosteriorGrads<float>&);
template void backward_flipout<double>(const ConvCall&, const at::Tensor&, const at::Tensor&,
                                       const PosteriorGrads<double>&);

}  // namespace fbc
