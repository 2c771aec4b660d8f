// Flipout by weights of rows, convolutions of squares, and the elementwise passes of Flipout and local
// reparameterisation, against plain loops in double. rho is so large that softplus(rho) = rho: variances
// are integers, and the convolutions of squares exact. Flipout is fed with the kernels' own noise.
#include <cmath>
#include <cstring>

#include "conv_problem.h"

using namespace fbc;
using namespace harness;

namespace {

using Values = std::vector<double>;

struct Data {
  Problem problem;
  Image<double> input;
  Values loc, rho, grad, bias;
  std::vector<float> sign_input, sign_output;
  NoiseKey noise;

  Data(Random& random, const Problem& p)
      : problem(p), input(random, p.s.N, p.s.H, p.s.W, p.s.C, static_cast<int>(random.below(3))) {
    const ConvShape& s = p.s;
    for (double& v : input.data) v = small_integer<double>(random);
    noise = {random.next(), random.next()};
    fill(random, &loc, p.weight_elements(), -3, 3);
    fill(random, &rho, p.weight_elements(), 41, 47);
    fill(random, &grad, s.output_rows() * s.P * s.Q * s.K, -3, 3);
    fill(random, &bias, s.num_samples * s.K, -3, 3);
    for (int64_t i = 0; i < s.output_rows() * s.C; ++i) sign_input.push_back(random.below(2) ? 1.0f : -1.0f);
    for (int64_t i = 0; i < s.output_rows() * s.K; ++i) sign_output.push_back(random.below(2) ? 1.0f : -1.0f);
  }

  static void fill(Random& random, Values* values, int64_t count, int64_t low, int64_t high) {
    for (int64_t i = 0; i < count; ++i) values->push_back(static_cast<double>(random.between(low, high)));
  }

  PosteriorParams<double> posterior(WeightTerm term) const {
    PosteriorParams<double> q = point_mass(problem, loc);
    q.rho = rho.data();
    q.rho_stride = q.loc_stride;
    q.term = term;
    q.noise = noise;
    q.stream = Stream::kWeight;
    return q;
  }
  double flip(int64_t n, int64_t k, int64_t c) const {
    return static_cast<double>(sign_output[static_cast<size_t>(n * problem.s.K + k)]) *
           static_cast<double>(sign_input[static_cast<size_t>(n * problem.s.C + c)]);
  }
  // What draw `sample` gains by one unit of its scale, over the sign.
  double eps(int64_t sample, int64_t element) const {
    const NoiseKey key = {noise.key, noise.offset + static_cast<uint64_t>(sample)};
    return static_cast<double>(standard_normal(key, Stream::kWeight, static_cast<uint64_t>(element)));
  }
  double grad_at(int64_t n, int64_t p, int64_t q, int64_t k) const {
    const ConvShape& s = problem.s;
    return grad[static_cast<size_t>(((n * s.P + p) * s.Q + q) * s.K + k)];
  }
};

bool near(const Values& got, const Values& want, double tolerance = 1e-12) {
  double most = 0, error = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    most = std::fmax(most, std::fabs(want[i]));
    const double e = std::fabs(got[i] - want[i]);
    error = e <= error ? error : e;  // a NaN stays
  }
  return error <= tolerance * most;
}

// with_signs: Flipout by weights of rows; else the convolution of squares with the variance.
void check_convolution(Random& random, const Data& d, Algorithm method, bool with_signs) {
  const ConvShape& s = d.problem.s;
  const ConvKernels<double>& table = conv_kernels<double>(method);
  const FlipSigns signs = {with_signs ? d.sign_input.data() : nullptr, with_signs ? d.sign_output.data() : nullptr};
  Image<double> want(random, s.output_rows(), s.P, s.Q, s.K, 0), want_dx(random, s.N, s.H, s.W, s.C, 0);
  Image<double> got(random, s.output_rows(), s.P, s.Q, s.K, static_cast<int>(random.below(3)));
  Image<double> got_dx(random, s.N, s.H, s.W, s.C, static_cast<int>(random.below(3)));
  Values by_loc(d.loc.size(), 0.0), by_rho(d.loc.size(), 0.0);
  Image<double>& x = const_cast<Image<double>&>(d.input);
  for_each_product(s, [&](int64_t n, int64_t p, int64_t q, int64_t k, int64_t source, int64_t h, int64_t w, int64_t c,
                          int64_t element) {
    const size_t e = static_cast<size_t>(element);
    const double scale = d.rho[e], value = x.at(source, h, w, c), g = d.grad_at(n, p, q, k);
    const double eps = with_signs ? d.flip(n, k, c) * d.eps(n / s.rows_per_sample(), element) : 2.0 * scale;
    const double weight = with_signs ? d.loc[e] + scale * eps : scale * scale;
    const double operand = with_signs ? value : value * value;
    want.at(n, p, q, k) += operand * weight;
    want_dx.at(source, h, w, c) += g * weight;
    by_loc[e] += g * operand;
    by_rho[e] += g * operand * eps;
  });
  const Parallel parallel = parallel_in(static_cast<int32_t>(random.between(1, 3)));
  const PosteriorParams<double> posterior = d.posterior(with_signs ? WeightTerm::kSample : WeightTerm::kVariance);
  const double rounding = is_exact(method) ? 0.0 : 1e-12;  // of integers
  const double tolerance = with_signs ? 1e-12 : rounding;
  FpropParams f = {};
  f.shape = s, f.dtype = f.weight_dtype = f.output_dtype = Dtype::kFloat64;
  f.input = x.base, f.input_stride = x.stride, f.square_input = !with_signs, f.signs = signs;
  f.output = got.base, f.output_stride = got.stride, f.bias = d.bias.data();
  Workspace forward(table.fprop_workspace(f, parallel.threads));
  table.fprop(f, posterior, parallel, forward.data());
  Values all, expected;
  for (int64_t n = 0; n < s.output_rows(); ++n)
    for (int64_t p = 0; p < s.P; ++p)
      for (int64_t q = 0; q < s.Q; ++q)
        for (int64_t k = 0; k < s.K; ++k) {
          all.push_back(got.at(n, p, q, k));
          expected.push_back(want.at(n, p, q, k) + d.bias[static_cast<size_t>(n / s.rows_per_sample() * s.K + k)]);
        }
  CHECK(near(all, expected, tolerance) && "fprop");
  const DgradParams g = {s,           Dtype::kFloat64, Dtype::kFloat64, signs, Dtype::kFloat64, d.grad.data(),
                         got_dx.base, got_dx.stride};
  Workspace backward(table.dgrad_workspace(g, parallel.threads));
  table.dgrad(g, posterior, parallel, backward.data());
  all.clear(), expected.clear();
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t w = 0; w < s.W; ++w)
        for (int64_t c = 0; c < s.C; ++c) {
          all.push_back(got_dx.at(n, h, w, c));
          expected.push_back(want_dx.at(n, h, w, c));
        }
  CHECK(near(all, expected, tolerance) && "dgrad");
  const WgradParams wg = {s, Dtype::kFloat64, x.base, x.stride, !with_signs, signs, Dtype::kFloat64, d.grad.data()};
  Values got_loc(d.loc.size(), 7.0), got_rho(d.loc.size(), 7.0);
  PosteriorGrads<double> grads = {};
  grads.grad_loc = got_loc.data(), grads.grad_rho = got_rho.data();
  grads.grad_loc_stride = grads.grad_rho_stride = posterior.loc_stride;
  Workspace weights(table.wgrad_workspace(wg, parallel.threads));
  table.wgrad(wg, posterior, grads, parallel, weights.data());
  CHECK(near(got_loc, by_loc, rounding) && "wgrad by loc");
  CHECK(near(got_rho, by_rho) && "wgrad by rho");
}

// ---- elementwise passes -------------------------------------------------------------------------

struct Passes {
  AffineShape shape;
  int64_t images;
  Values mean, second, image;
  std::vector<float> sign;

  explicit Passes(Random& random) {
    const int64_t rows = random.between(1, 3), draws = random.between(1, 3);
    const bool shared = random.below(2) == 0;
    const int64_t widths[] = {1, 3, 17, 64, 4099};  // the last: more than one piece of channels
    shape = {rows * draws, rows, random.between(1, 3), random.between(1, 80), widths[random.below(5)], shared};
    images = shared ? rows : rows * draws;
    Data::fill(random, &mean, images * pixels(), -3, 3);
    Data::fill(random, &second, shape.rows * pixels(), -3, 9);
    Data::fill(random, &image, images * pixels(), -3, 3);
    for (int64_t i = 0; i < shape.rows * shape.K; ++i) sign.push_back(random.below(2) ? 1.0f : -1.0f);
  }
  int64_t pixels() const { return shape.P * shape.Q * shape.K; }
  ImageStrides nhwc() const { return {pixels(), shape.Q * shape.K, shape.K, 1}; }
  double eps(int64_t row, int64_t i, uint64_t row_offset, NoiseKey noise) const {
    const uint64_t n = static_cast<uint64_t>(row % shape.rows_per_sample) + row_offset;
    noise.offset += static_cast<uint64_t>(row / shape.rows_per_sample);
    return static_cast<double>(
        standard_normal(noise, Stream::kLocal, n * static_cast<uint64_t>(pixels()) + static_cast<uint64_t>(i)));
  }
};

void check_passes(Random& random) {
  const Passes t(random);
  const AffineKernels<double>& run = kernels<double>().affine;
  const AffineShape& s = t.shape;
  const int64_t pixels = t.pixels(), total = s.rows * pixels;
  const NoiseKey noise = {random.next(), random.next()};
  const uint64_t first = static_cast<uint64_t>(random.below(5));
  const auto at = [&](int64_t row, int64_t i) { return static_cast<size_t>(s.image(row) * pixels + i); };
  const auto sign = [&](int64_t row, int64_t i) {
    return static_cast<double>(t.sign[static_cast<size_t>(row * s.K + i % s.K)]);
  };
  Values got(static_cast<size_t>(total), 7.0), want(got.size()), deviation(t.mean.size(), 7.0);
  SignParams signs = {s, Dtype::kFloat64, t.image.data(), t.nhwc(), t.sign.data(), got.data()};
  run.apply_signs(signs, 0, s.rows * s.P);
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t i = 0; i < pixels; ++i)
      want[static_cast<size_t>(row * pixels + i)] = t.image[at(row, i)] * sign(row, i);
  CHECK(got == want && "signs");
  for (const bool flipout : {true, false}) {
    AffineForwardParams f = {};
    f.shape = s, f.mean = t.mean.data(), f.second = t.second.data(), f.sign = flipout ? t.sign.data() : nullptr;
    f.deviation = deviation.data(), f.noise = noise, f.row_offset = first;
    f.dtype = Dtype::kFloat64, f.output = got.data(), f.output_stride = t.nhwc();
    for (int64_t row = 0; row < s.rows * s.P; ++row) run.forward(f, row, row + 1);
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t i = 0; i < pixels; ++i) {
        const double own = t.second[static_cast<size_t>(row * pixels + i)], v = t.second[at(row, i)];
        const double noisy = flipout ? sign(row, i) * own : std::sqrt(v > 0 ? v : 0.0) * t.eps(row, i, first, noise);
        want[static_cast<size_t>(row * pixels + i)] = t.mean[at(row, i)] + noisy;
      }
    CHECK(near(got, want) && "forward");
  }
  // `got` is now a gradient by z.
  Values by_mean(t.mean.size(), 0.0), by_variance(t.mean.size(), 0.0);
  Values got_mean(t.mean.size(), 7.0), got_variance(t.mean.size(), 7.0);
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t i = 0; i < pixels; ++i) {
      const double g = got[static_cast<size_t>(row * pixels + i)], d = deviation[at(row, i)];
      by_mean[at(row, i)] += g;
      by_variance[at(row, i)] += d > 0 ? g * t.eps(row, i, first, noise) / (2 * d) : 0.0;
    }
  const LocalBackwardParams b = {s, got.data(), deviation.data(), noise, first, got_mean.data(), got_variance.data()};
  run.local_backward(b, 0, t.images * s.P);
  CHECK(near(got_mean, by_mean) && near(got_variance, by_variance) && "local backward");
  for (const bool flipout : {true, false}) {
    Values dx(t.mean.size(), 7.0), want_dx = t.mean;
    AffineInputGradParams p = {
        s,        t.mean.data(), t.second.data(), flipout ? t.sign.data() : nullptr, Dtype::kFloat64, t.image.data(),
        t.nhwc(), dx.data(),     t.nhwc()};
    run.input_grad(p, 0, t.images * s.P);
    for (int64_t row = 0; row < (flipout ? s.rows : t.images); ++row)
      for (int64_t i = 0; i < pixels; ++i) {
        const double v = t.second[static_cast<size_t>(row * pixels + i)];
        want_dx[flipout ? at(row, i) : static_cast<size_t>(row * pixels + i)] +=
            flipout ? sign(row, i) * v : 2.0 * t.image[static_cast<size_t>(row * pixels + i)] * v;
      }
    CHECK(near(dx, want_dx) && "input gradient");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 200;
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline}) {
    if (isa > detected_isa()) continue;
    limit_isa(isa);
    Random random(7);
    for (int64_t i = 0; i < count; ++i) {
      Problem problem;
      if (!random_problem(random, &problem)) continue;
      const Data data(random, problem);
      const std::vector<Algorithm> methods = methods_for(problem.s);
      const Algorithm method = methods[static_cast<size_t>(random.below(static_cast<int64_t>(methods.size())))];
      check_convolution(random, data, method, true);
      check_convolution(random, data, method, false);
      check_passes(random);
    }
  }
  return report("affine");
}
