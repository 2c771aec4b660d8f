// fprop, dgrad and wgrad against plain loops, exactly: integer-valued data small enough that every sum is
// exact in float32, so any order of summation gives the same bits. Random shapes, strides of every kind,
// one and several pieces. F(4x4, 3x3) divides: it comes within rounding.
#include <cmath>
#include <cstring>
#include <memory>

#include "conv_problem.h"

using namespace fbc;
using namespace harness;

namespace {

// What a result may be off, as a fraction of the largest. Seen over 7500 problems: 3.6e-6 and 5.1e-15.
template <typename T>
double tolerance_of(Algorithm method) {
  if (method != Algorithm::kWinograd4) return 0.0;
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

template <typename T>
void check_problem(Random& random, const Problem& problem, Algorithm method) {
  const ConvShape& s = problem.s;
  const Dtype dtype = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  const int layout = static_cast<int>(random.below(3));
  Image<T> input(random, s.N, s.H, s.W, s.C, layout);
  for (T& v : input.data) v = small_integer<T>(random);
  std::vector<T> weight(static_cast<size_t>(problem.weight_elements()));
  for (T& v : weight) v = small_integer<T>(random);
  std::vector<T> bias(static_cast<size_t>(s.num_samples * s.K));
  for (T& v : bias) v = small_integer<T>(random);
  const int64_t per_sample = s.rows_per_sample();
  std::vector<T> grad(static_cast<size_t>(s.output_rows() * s.P * s.Q * s.K));
  for (T& v : grad) v = small_integer<T>(random);
  const auto grad_at = [&](int64_t n, int64_t p, int64_t q, int64_t k) {
    return grad[static_cast<size_t>(((n * s.P + p) * s.Q + q) * s.K + k)];
  };

  Image<T> want(random, s.output_rows(), s.P, s.Q, s.K, 0), got(random, s.output_rows(), s.P, s.Q, s.K,
                                                               static_cast<int>(random.below(3)));
  Image<T> want_dx(random, s.N, s.H, s.W, s.C, 0), got_dx(random, s.N, s.H, s.W, s.C,
                                                         static_cast<int>(random.below(3)));
  std::vector<T> want_dw(weight.size(), T(0)), got_dw(weight.size(), T(7));
  for_each_product(s, [&](int64_t n, int64_t p, int64_t q, int64_t k, int64_t source, int64_t h, int64_t w,
                          int64_t c, int64_t element) {
    want.at(n, p, q, k) += input.at(source, h, w, c) * weight[static_cast<size_t>(element)];
    want_dx.at(source, h, w, c) += grad_at(n, p, q, k) * weight[static_cast<size_t>(element)];
    want_dw[static_cast<size_t>(element)] += grad_at(n, p, q, k) * input.at(source, h, w, c);
  });

  const Parallel parallel = harness::parallel_in(static_cast<int32_t>(random.between(1, 3)));
  const PosteriorParams<T> posterior = point_mass(problem, weight);
  const ConvKernels<T>& table = conv_kernels<T>(method);
  const double tolerance = tolerance_of<T>(method);
  FpropParams fprop = {};
  fprop.shape = s, fprop.dtype = fprop.weight_dtype = fprop.output_dtype = dtype;
  fprop.input = input.base, fprop.input_stride = input.stride;
  fprop.output = got.base, fprop.output_stride = got.stride, fprop.bias = bias.data();
  fprop.activation = random.below(2) == 0 ? Activation::kRelu : Activation::kLinear;
  {
    harness::Workspace workspace(table.fprop_workspace(fprop, parallel.threads));
    table.fprop(fprop, posterior, parallel, workspace.data());
  }
  Comparison outputs, by_input, by_weight;
  for (int64_t n = 0; n < s.output_rows(); ++n)
    for (int64_t p = 0; p < s.P; ++p)
      for (int64_t q = 0; q < s.Q; ++q)
        for (int64_t k = 0; k < s.K; ++k) {
          T z = want.at(n, p, q, k) + bias[static_cast<size_t>(n / per_sample * s.K + k)];
          if (fprop.activation == Activation::kRelu && z < T(0)) z = T(0);
          outputs.add(got.at(n, p, q, k), z);
        }
  CHECK(outputs.within(tolerance) && "fprop");

  DgradParams dgrad = {s, dtype, dtype, {}, grad.data(), got_dx.base, got_dx.stride};
  {
    harness::Workspace workspace(table.dgrad_workspace(dgrad, parallel.threads));
    table.dgrad(dgrad, posterior, parallel, workspace.data());
  }
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t w = 0; w < s.W; ++w)
        for (int64_t c = 0; c < s.C; ++c) by_input.add(got_dx.at(n, h, w, c), want_dx.at(n, h, w, c));
  CHECK(by_input.within(tolerance) && "dgrad");

  WgradParams wgrad = {s, dtype, input.base, input.stride, false, {}, grad.data()};
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
                " stride %" PRId64 ",%" PRId64 " pad %" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64
                " dil %" PRId64 ",%" PRId64 " groups %" PRId64 " samples %" PRId64 " share %d layout %d\n",
                method_name(method), isa_name(current_isa()), s.N, s.C, s.H, s.W, s.K, s.R, s.S, s.stride_h, s.stride_w, s.pad_top,
                s.pad_bottom, s.pad_left, s.pad_right, s.dilation_h, s.dilation_w, s.groups, s.num_samples,
                static_cast<int>(s.share_input), layout);
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
      for (const Algorithm method : methods_for(problem.s)) {
        if (i % 3 == 0) {
          check_problem<double>(random, problem, method);
        } else {
          check_problem<float>(random, problem, method);
        }
      }
    }
  }
  return harness::report("conv");
}
