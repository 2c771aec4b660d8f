// fprop, dgrad and wgrad against plain loops, exactly: integer-valued data small enough that every sum is
// exact in float32, so any order of summation gives the same bits. Random shapes, strides of every kind,
// one and several pieces. F(2x4, 3x3) and F(4x4, 3x3) divide: they come within rounding.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "conv_problem.h"

using namespace fbc;
using namespace harness;

namespace {

// What a result may be off, as a fraction of the largest. Seen over 7500 problems: 3.6e-6 and 5.1e-15.
template <typename T>
double tolerance_of(Algorithm method) {
  if (is_exact(method)) return 0.0;
  return sizeof(T) == 8 ? 2e-14 : 1e-5;
}

// Pairs of results.
class Comparison {
 public:
  void add(double got, double want) {
    const double error = std::fabs(got - want);
    largest_ = std::fmax(largest_, std::fabs(want));
    error_ = error <= error_ ? error_ : error;  // a NaN stays
  }
  bool within(double tolerance) const { return error_ <= tolerance * largest_; }

 private:
  double largest_ = 0.0, error_ = 0.0;
};

// What a tensor of scalar_t holds.
template <typename scalar_t, typename T>
scalar_t stored(T value) {
  scalar_t out;
  store_from_acc(&out, value);
  return out;
}

// scalar_t: storage of images and gradients. T: of sums and parameters.
template <typename T, typename scalar_t>
void check_problem(Random& random, const Problem& problem, const ConvKernels<T>& table, const char* name,
                   double tolerance = 0.0) {
  const ConvShape& s = problem.s;
  const Dtype dtype = sizeof(scalar_t) == 8   ? Dtype::kFloat64
                      : sizeof(scalar_t) == 4 ? Dtype::kFloat32
                                              : Dtype::kBFloat16;
  const auto integer = [&] { return stored<scalar_t>(small_integer<T>(random)); };
  const int layout = static_cast<int>(random.below(3));
  Image<scalar_t> input(random, s.N, s.H, s.W, s.C, layout);
  for (scalar_t& v : input.data) v = stored<scalar_t>(std::numeric_limits<T>::quiet_NaN());
  for (int64_t n = 0; n < s.N; ++n)  // what lies between the pixels stays NaN
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t w = 0; w < s.W; ++w)
        for (int64_t c = 0; c < s.C; ++c) input.at(n, h, w, c) = integer();
  std::vector<T> weight(static_cast<size_t>(problem.weight_elements()));
  for (T& v : weight) v = small_integer<T>(random);
  std::vector<T> bias(static_cast<size_t>(s.num_samples * s.K));
  for (T& v : bias) v = small_integer<T>(random);
  const int64_t per_sample = s.rows_per_sample();
  std::vector<scalar_t> grad(static_cast<size_t>(s.output_rows() * s.P * s.Q * s.K));
  for (scalar_t& v : grad) v = integer();
  const auto grad_at = [&](int64_t n, int64_t p, int64_t q, int64_t k) {
    return load_as_acc(&grad[static_cast<size_t>(((n * s.P + p) * s.Q + q) * s.K + k)]);
  };

  Image<T> want(random, s.output_rows(), s.P, s.Q, s.K, 0), want_dx(random, s.N, s.H, s.W, s.C, 0);
  Image<scalar_t> got(random, s.output_rows(), s.P, s.Q, s.K, static_cast<int>(random.below(3)));
  Image<scalar_t> got_dx(random, s.N, s.H, s.W, s.C, static_cast<int>(random.below(3)));
  std::vector<T> want_dw(weight.size(), T(0)), got_dw(weight.size(), T(7));
  for_each_product(s, [&](int64_t n, int64_t p, int64_t q, int64_t k, int64_t source, int64_t h, int64_t w, int64_t c,
                          int64_t element) {
    const T x = load_as_acc(&input.at(source, h, w, c)), g = grad_at(n, p, q, k);
    want.at(n, p, q, k) += x * weight[static_cast<size_t>(element)];
    want_dx.at(source, h, w, c) += g * weight[static_cast<size_t>(element)];
    want_dw[static_cast<size_t>(element)] += g * x;
  });

  const Parallel parallel = harness::parallel_in(static_cast<int32_t>(random.between(1, 3)));
  const PosteriorParams<T> posterior = point_mass(problem, weight);
  FpropParams fprop = {};
  fprop.shape = s, fprop.dtype = fprop.weight_dtype = fprop.output_dtype = dtype;
  fprop.input = input.base, fprop.input_stride = input.stride;
  fprop.output = got.base, fprop.output_stride = got.stride, fprop.bias = bias.data();
  fprop.activation = random.below(2) == 0 ? Activation::kRelu : Activation::kLinear;
  {
    harness::Workspace workspace(table.fprop_workspace(fprop, parallel.threads));
    table.fprop(fprop, posterior, parallel, workspace.data());
  }
  // What is compared: the result, and the exact value as a tensor of scalar_t holds it.
  const auto add = [](Comparison& pairs, scalar_t value, T exact) {
    const scalar_t want = stored<scalar_t>(exact);
    pairs.add(load_as_acc(&value), load_as_acc(&want));
  };
  Comparison outputs, by_input, by_weight;
  for (int64_t n = 0; n < s.output_rows(); ++n)
    for (int64_t p = 0; p < s.P; ++p)
      for (int64_t q = 0; q < s.Q; ++q)
        for (int64_t k = 0; k < s.K; ++k) {
          T z = want.at(n, p, q, k) + bias[static_cast<size_t>(n / per_sample * s.K + k)];
          if (fprop.activation == Activation::kRelu && z < T(0)) z = T(0);
          add(outputs, got.at(n, p, q, k), z);
        }
  CHECK(outputs.within(tolerance) && "fprop");

  DgradParams dgrad = {s, dtype, dtype, {}, dtype, grad.data(), got_dx.base, got_dx.stride};
  {
    harness::Workspace workspace(table.dgrad_workspace(dgrad, parallel.threads));
    table.dgrad(dgrad, posterior, parallel, workspace.data());
  }
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t w = 0; w < s.W; ++w)
        for (int64_t c = 0; c < s.C; ++c) add(by_input, got_dx.at(n, h, w, c), want_dx.at(n, h, w, c));
  CHECK(by_input.within(tolerance) && "dgrad");

  WgradParams wgrad = {s, dtype, input.base, input.stride, false, {}, dtype, grad.data()};
  PosteriorGrads<T> grads = {};
  grads.grad_loc = got_dw.data();
  grads.grad_loc_stride = posterior.loc_stride;
  {
    harness::Workspace workspace(table.wgrad_workspace(wgrad, parallel.threads));
    table.wgrad(wgrad, posterior, grads, parallel, workspace.data());
  }
  for (size_t i = 0; i < want_dw.size(); ++i) by_weight.add(got_dw[i], want_dw[i]);
  CHECK(by_weight.within(tolerance) && "wgrad");
  if (harness::failures > 0) {
    std::printf("  %s %s N%" PRId64 " C%" PRId64 " H%" PRId64 " W%" PRId64 " K%" PRId64 " R%" PRId64 " S%" PRId64
                " stride %" PRId64 ",%" PRId64 " pad %" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 " dil %" PRId64
                ",%" PRId64 " groups %" PRId64 " samples %" PRId64 " share %d layout %d\n",
                name, isa_name(current_isa()), s.N, s.C, s.H, s.W, s.K, s.R, s.S, s.stride_h, s.stride_w, s.pad_top,
                s.pad_bottom, s.pad_left, s.pad_right, s.dilation_h, s.dilation_w, s.groups, s.num_samples,
                static_cast<int>(s.share_input), layout);
  }
}

template <typename T>
void check_methods(Random& random, const Problem& problem) {
  for (const Algorithm method : methods_for(problem.s)) {
    check_problem<T, T>(random, problem, conv_kernels<T>(method), method_name(method), tolerance_of<T>(method));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 200;
  for (int32_t isa = 0; isa <= static_cast<int32_t>(detected_isa()); ++isa) {
    limit_isa(static_cast<Isa>(isa));
    Random random(static_cast<uint64_t>(isa) + 11);
    for (int64_t i = 0; i < count && harness::failures < 5;) {
      Problem problem;
      if (!random_problem(random, &problem)) continue;
      ++i;
      if (i % 3 == 0) {
        check_methods<double>(random, problem);
      } else {
        check_methods<float>(random, problem);
      }
      if (current_bf16() && pairs_fit(problem.s)) {
        check_problem<float, BFloat16>(random, problem, kernels<float>().pairs, "pairs");
      }
    }
    for (int64_t i = 0; i < count / 50 && harness::failures < 5; ++i) {
      check_methods<float>(random, large_problem(random, false));
    }
    if (count > 0) {
      const Problem problem = large_problem(random, true);
      for (const Algorithm method : {Algorithm::kWinograd2, Algorithm::kWinograd2x4}) {
        check_problem<float, float>(random, problem, conv_kernels<float>(method), method_name(method),
                                    tolerance_of<float>(method));
      }
    }
  }
  return harness::report("conv");
}
