// A forward convolution with a sampled weight, ready to launch, and its reference in double.
//
// The reference consumes the very weight that the kernels use: drawn by core's functions from the
// same address, rounded to the storage type; for tf32 products the operands are rounded as the
// kernels round them. What is left between the two is the order of float32 sums and the final
// rounding.
#pragma once

#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/posterior.h"
#include "cuda/kernels.h"
#include "gradient_cases.h"

namespace fbc::test {

template <typename T>
constexpr Dtype kDtypeOf = std::is_same_v<T, BFloat16> ? Dtype::kBFloat16
                           : std::is_same_v<T, Half>   ? Dtype::kFloat16
                                                       : Dtype::kFloat32;

struct ForwardLayout {
  int64_t input_gap = 0, input_shift = 0;    // of the input image: elements
  int64_t output_gap = 0, output_shift = 0;  // of the outputs
  bool channels_first = false;               // outputs NCHW
  bool kcrs = false;                         // parameters KCRS, as a contiguous torch weight
  int64_t parameter_shift = 0;               // floats before loc: breaks its alignment
  int64_t given_shift = 0;                   // elements before the given and the kept weight
  uint64_t element_offset = 0;
  bool bias = true, pre_activation = false, kept = false, scale = false, point = false;
  bool prior_tensors = false;
  Activation activation = Activation::kLinear;
  float activation_param = 0.0f;
};

inline double reference_kl(double loc, double scale, double prior_loc, double prior_scale) {
  const double d = (loc - prior_loc) / prior_scale, r = scale / prior_scale;
  return 0.5 * d * d + 0.5 * (r * r - 1.0) - std::log(r);
}

template <typename T>
class Forward {
 public:
  ConvShape shape;
  ForwardLayout layout;
  Image<T> input, output, pre_activation;
  cuda::FpropParams params{};
  cuda::ConvWeight weight{};
  Buffer<T> given, kept;
  Buffer<float> kl;
  std::vector<double> want, bound;  // pre-activation, and the sum of |products| of each

  // `whole`: small whole numbers everywhere (a point mass), whose sums are exact.
  Forward(const GradientCase& c, const ForwardLayout& l, bool whole, Random& random)
      : shape(shape_of(c)),
        layout(l),
        input(shape.N, shape.H, shape.W, shape.C, l.input_gap, l.input_shift),
        output(shape.output_rows(), shape.P, shape.Q, shape.K, l.output_gap, l.output_shift),
        pre_activation(output),
        kl(poisoned<float>(1)) {
    if (l.channels_first) {
      const int64_t plane = shape.P * shape.Q + l.output_gap;
      output.stride = {shape.K * plane, shape.Q, 1, plane};
      output.memory = poisoned<T>(l.output_shift + shape.output_rows() * shape.K * plane);
      pre_activation = output;
    }
    const auto value = [&] { return whole ? static_cast<double>(random.between(-2, 2)) : random.uniform(-1, 1); };
    input.fill(value);
    layout.point = l.point || whole;
    fill_parameters(value, random);
    draw_weights();
    fill_params(value);
    compute_reference();
  }
  Forward(const Forward&) = delete;

  int64_t weights() const { return shape.K * shape.R * shape.S * shape.channels_per_group(); }

  // Poisons what is written, launches, and returns the status.
  int run(cuda::WeightSource source) {
    poison(output.memory), poison(pre_activation.memory), poison(kept), poison(kl);
    weight.source = source;
    weight.given = given.data() + layout.given_shift;
    const bool samples = source != cuda::WeightSource::kGiven;
    params.kept_weight = samples && layout.kept ? kept.data() + layout.given_shift : nullptr;
    params.kl = samples ? kl.data() : nullptr;
    Buffer<unsigned char> workspace =
        poisoned<unsigned char>(static_cast<int64_t>(cuda::fprop_workspace(params, weight)));
    return cuda::fprop(params, weight, workspace.data(), nullptr);
  }

  // The output that `want` gives, before its rounding.
  std::vector<double> activated() const {
    std::vector<double> out = want;
    visit_activation(layout.activation, [&](auto tag) {
      for (double& z : out) {
        z = activate<decltype(tag)::value, double>(z, double{layout.activation_param});
      }
    });
    return out;
  }
  double want_kl() const { return layout.point ? 0.0 : want_kl_; }
  // Everything outside the image's elements is still poison.
  static bool gaps_untouched(Image<T> image) {
    image.fill([] { return std::nan(""); });
    for (const T& x : image.memory)
      if (!std::isnan(as_double(x))) return false;
    return true;
  }

 private:
  Buffer<float> loc_, rho_, prior_loc_, prior_scale_, scale_, bias_;
  Buffer<int64_t> seed_;
  double want_kl_ = 0.0;

  template <typename F>
  void fill_parameters(F value, Random& random) {
    const int64_t R = shape.R, S = shape.S, C = shape.channels_per_group();
    PosteriorParams<float>& p = weight.posterior;
    p.K = shape.K, p.R = R, p.S = S, p.C = C;
    p.loc_stride = layout.kcrs ? WeightStrides{R * S * C, S, 1, R * S} : WeightStrides{R * S * C, S * C, C, 1};
    p.rho_stride = p.loc_stride;
    p.prior_loc_stride = {0, 0, 0, 1};  // one per channel
    p.prior_scale_stride = {1, 0, 0, 0};
    p.prior_loc_value = 0.25f;
    p.prior_scale_value = 0.75f;
    p.scale_floor = 0x1p-23f;
    p.noise = {99, 11};  // the key is ignored
    p.stream = Stream::kWeight;
    p.element_offset = layout.element_offset;
    loc_ = poisoned<float>(layout.parameter_shift + weights());
    for (int64_t i = 0; i < weights(); ++i) {
      loc_[static_cast<size_t>(layout.parameter_shift + i)] = static_cast<float>(value());
    }
    rho_ = uniforms<float>(layout.parameter_shift + weights(), -4, 1, random);
    prior_loc_ = uniforms<float>(C, -1, 1, random);
    prior_scale_ = uniforms<float>(shape.K, 0.5, 2, random);
    p.loc = loc_.data() + layout.parameter_shift;
    p.rho = layout.point ? nullptr : rho_.data() + layout.parameter_shift;
    if (layout.prior_tensors) p.prior_loc = prior_loc_.data(), p.prior_scale = prior_scale_.data();
    seed_.assign({0x123456789abcdef, -5});
    weight.seed = layout.point ? nullptr : seed_.data();
  }

  void draw_weights() {
    const int64_t all = layout.given_shift + shape.num_samples * weights();
    given = poisoned<T>(all);
    kept = poisoned<T>(all);
    scale_ = poisoned<float>(weights());
    int64_t e = 0;
    for (int64_t k = 0; k < shape.K; ++k)
      for (int64_t r = 0; r < shape.R; ++r)
        for (int64_t s = 0; s < shape.S; ++s)
          for (int64_t c = 0; c < shape.channels_per_group(); ++c) draw_one(k, r, s, c, e++);
    if (layout.scale) weight.scale = scale_.data();
  }
  void draw_one(int64_t k, int64_t r, int64_t s, int64_t c, int64_t e) {
    const PosteriorParams<float>& p = weight.posterior;
    const WeightStrides& stride = p.loc_stride;
    const int64_t at = k * stride.k + r * stride.r + s * stride.s + c * stride.c;
    float t, scale = 0.0f;
    if (p.rho != nullptr) scale = scale_from_rho(p.rho[at], p.scale_floor, &t);
    scale_[static_cast<size_t>(e)] = scale;
    want_kl_ += reference_kl(p.loc[at], scale, p.prior_loc != nullptr ? p.prior_loc[c] : p.prior_loc_value,
                             p.prior_scale != nullptr ? p.prior_scale[k] : p.prior_scale_value);
    for (int64_t draw = 0; draw < shape.num_samples; ++draw) {
      float value = p.loc[at];
      if (p.rho != nullptr) {
        const NoiseKey key = {static_cast<uint64_t>(seed_[0]),
                              static_cast<uint64_t>(seed_[1]) + p.noise.offset + static_cast<uint64_t>(draw)};
        const uint64_t number = p.element_offset + static_cast<uint64_t>(e);
        value = weight_from_eps(value, scale, standard_normal(key, p.stream, number));
      }
      store_from_acc(&given[static_cast<size_t>(layout.given_shift + draw * weights() + e)], value);
    }
  }

  template <typename F>
  void fill_params(F value) {
    bias_ = poisoned<float>(shape.num_samples * shape.K);
    for (float& b : bias_) b = static_cast<float>(value());
    params.shape = shape;
    params.dtype = kDtypeOf<T>;
    params.input = input.data();
    params.input_stride = input.stride;
    params.output = output.data();
    params.output_stride = output.stride;
    params.pre_activation = layout.pre_activation ? pre_activation.data() : nullptr;
    params.bias = layout.bias ? bias_.data() : nullptr;
    params.activation = layout.activation;
    params.activation_param = layout.activation_param;
  }

  // An operand as the product sees it: float with 10 bits of mantissa, ties away from zero.
  static double operand(const T& x) {
    if constexpr (sizeof(T) == 4) {
      return bits_to_float((float_to_bits(x) + 0x1000u) & 0xffffe000u);
    } else {
      return as_double(x);
    }
  }
  void compute_reference() {
    want.assign(static_cast<size_t>(shape.output_rows() * shape.P * shape.Q * shape.K), 0.0);
    bound = want;
    const int64_t C = shape.channels_per_group();
    for_each_product(shape, [&](const Product& i) {
      const int64_t e = ((i.k * shape.R + i.r) * shape.S + i.s) * C + i.c;
      const double product = operand(input.at(i.n, i.h, i.w, i.channel)) *
                             operand(given[static_cast<size_t>(layout.given_shift + i.draw * weights() + e)]);
      const auto at = static_cast<size_t>(((i.row * shape.P + i.p) * shape.Q + i.q) * shape.K + i.k);
      want[at] += product;
      bound[at] += std::fabs(product);
    });
    for (size_t i = 0; layout.bias && i < want.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / (shape.P * shape.Q * shape.K);
      const int64_t draw = row / shape.rows_per_sample();
      const double b = bias_[static_cast<size_t>(draw * shape.K + static_cast<int64_t>(i) % shape.K)];
      want[i] += b;
      bound[i] += std::fabs(b);
    }
  }
};

}  // namespace fbc::test
