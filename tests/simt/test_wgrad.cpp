// wgrad() on the interpreter: whole numbers compared for equality, noise replayed from its address.
#include "cuda/wgrad.cu"

#include "core/dispatch.h"
#include "gradient_cases.h"

namespace {

using fbc::test::Buffer;
using fbc::test::GradientCase;
using fbc::test::Image;
using fbc::test::Suite;
using std::vector;

constexpr int64_t kSeed[2] = {0x1234567890abcdef, -3};
constexpr uint64_t kOffset = 7;

struct Layout {
  int64_t input_gap = 0, input_shift = 0, grad_gap = 0, grad_shift = 0;
  uint64_t element_offset = 0;
};

template <typename T>
struct Problem {
  fbc::ConvShape shape;
  Image<T> input, grad;
  Buffer<int64_t> seed;
  fbc::cuda::WgradParams params{};

  Problem(const GradientCase& c, const Layout& layout, fbc::Dtype dtype)
      : shape(fbc::test::shape_of(c)),
        input(shape.N, shape.H, shape.W, shape.C, layout.input_gap, layout.input_shift),
        grad(shape.output_rows(), shape.P, shape.Q, shape.K, layout.grad_gap, layout.grad_shift),
        seed(kSeed, kSeed + 2) {
    params.shape = shape;
    params.dtype = dtype;
    params.input = input.data();
    params.input_stride = input.stride;
    params.grad = grad.data();
    params.grad_stride = grad.stride;
    params.posterior.K = shape.K, params.posterior.R = shape.R, params.posterior.S = shape.S;
    params.posterior.C = shape.channels_per_group();
    params.posterior.noise = {99, kOffset};
    params.posterior.stream = fbc::Stream::kWeight;
    params.posterior.element_offset = layout.element_offset;
    params.seed = seed.data();
  }
  int64_t weights() const { return shape.K * shape.R * shape.S * shape.channels_per_group(); }
  float eps(int64_t draw, int64_t element) const {
    const fbc::NoiseKey key = {static_cast<uint64_t>(kSeed[0]),
                               static_cast<uint64_t>(kSeed[1]) + kOffset + static_cast<uint64_t>(draw)};
    return fbc::standard_normal(key, fbc::Stream::kWeight,
                                params.posterior.element_offset + static_cast<uint64_t>(element));
  }
};

// dW of every draw in double, in element order.
template <typename T>
vector<vector<double>> reference(Problem<T>& problem) {
  const fbc::ConvShape& s = problem.shape;
  const int64_t channels = s.channels_per_group();
  vector<vector<double>> out(static_cast<size_t>(s.num_samples),
                             vector<double>(static_cast<size_t>(problem.weights())));
  fbc::test::for_each_product(s, [&](const fbc::test::Product& i) {
    const int64_t element = ((i.k * s.R + i.r) * s.S + i.s) * channels + i.c;
    out[static_cast<size_t>(i.draw)][static_cast<size_t>(element)] +=
        fbc::test::as_double(problem.grad.at(i.row, i.p, i.q, i.k)) *
        fbc::test::as_double(problem.input.at(i.n, i.h, i.w, i.channel));
  });
  return out;
}

struct Slabs {
  Buffer<float> plain, eps;
};
template <typename T>
Slabs run(Suite& suite, const std::string& name, Problem<T>& problem, int64_t slabs, bool with_eps) {
  const int64_t size = slabs * problem.weights();
  Slabs out = {fbc::test::poisoned<float>(size), fbc::test::poisoned<float>(with_eps ? size : 0)};
  problem.params.slabs = out.plain.data();
  problem.params.slabs_eps = with_eps ? out.eps.data() : nullptr;
  const int status = slabs == fbc::cuda::wgrad_slabs(problem.params)
                         ? fbc::cuda::wgrad(problem.params, nullptr)
                         : fbc::cuda::launch_slabs(problem.params, slabs, nullptr);
  suite.launched(name.c_str(), status);
  return out;
}
vector<double> sum_slabs(const Buffer<float>& slabs, int64_t weights) {
  vector<double> out(static_cast<size_t>(weights));
  for (size_t i = 0; i < slabs.size(); ++i) {
    out[i % out.size()] += static_cast<double>(slabs[i]);
  }
  return out;
}

// Whole numbers: sums of draws exactly, sums times eps to the rounding of their additions.
template <typename T>
void check(Suite& suite, const GradientCase& c, const Layout& layout, fbc::Dtype dtype, int64_t slabs = 0,
           bool with_eps = true) {
  Problem<T> problem(c, layout, dtype);
  problem.input.fill([&] { return static_cast<double>(suite.random.between(-3, 3)); });
  problem.grad.fill([&] { return static_cast<double>(suite.random.between(-3, 3)); });
  if (slabs == 0) slabs = fbc::cuda::wgrad_slabs(problem.params);
  const bool draws = c.num_samples > 1 && with_eps;
  const std::string name = c.name;
  const Slabs got = run(suite, name, problem, slabs, draws);
  const vector<vector<double>> by_draw = reference(problem);
  const size_t weights = static_cast<size_t>(problem.weights());
  vector<double> want(weights), want_eps(weights), bound(weights);
  for (size_t s = 0; s < by_draw.size(); ++s) {
    for (size_t e = 0; e < weights; ++e) {
      const double eps = draws ? problem.eps(static_cast<int64_t>(s), static_cast<int64_t>(e)) : 0;
      want[e] += by_draw[s][e];
      want_eps[e] += by_draw[s][e] * eps;
    }
  }
  suite.exact(name, sum_slabs(got.plain, problem.weights()), want);
  if (!draws) return;
  for (size_t e = 0; e < weights; ++e) {
    // A draw's product may be cut by slabs: |parts| are bounded by pixels * 9 of the draw.
    bound[e] = 9.0 * static_cast<double>(problem.shape.output_rows() * problem.shape.P * problem.shape.Q) * 7.0;
  }
  suite.bounded(name + ", times eps", sum_slabs(got.eps, problem.weights()), want_eps, bound, 1e-7);
}

template <typename F>
void for_each_type(F f) {
  f(fbc::TypeTag<fbc::BFloat16>{}, fbc::Dtype::kBFloat16);
  f(fbc::TypeTag<fbc::Half>{}, fbc::Dtype::kFloat16);
  f(fbc::TypeTag<float>{}, fbc::Dtype::kFloat32);
}

void check_shapes(Suite& suite) {
  const auto cases = fbc::test::gradient_cases();
  for_each_type([&](auto tag, fbc::Dtype dtype) {
    using T = typename decltype(tag)::type;
    suite.group(dtype == fbc::Dtype::kBFloat16  ? "shapes, bfloat16"
                : dtype == fbc::Dtype::kFloat16 ? "shapes, float16"
                                                : "shapes, tf32");
    for (size_t i = 0; i < cases.size(); i += suite.quick ? 4 : 1) {
      check<T>(suite, cases[i], {}, dtype);
    }
  });
}

// Gaps between pixels, and addresses that allow 16-byte copies of neither, one or both operands.
void check_layouts(Suite& suite) {
  suite.group("gaps, alignment, element offset");
  const GradientCase c = {"layout", 4, 16, 5, 6, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2};
  const Layout layouts[] = {{16, 8, 8, 16, 0}, {1, 0, 0, 0, 1}, {0, 0, 3, 0, 2},
                            {0, 1, 0, 3, 3},   {2, 1, 1, 1, 4}, {0, 0, 0, 0, 5}};
  for (const Layout& layout : layouts) {
    for_each_type([&](auto tag, fbc::Dtype dtype) { check<typename decltype(tag)::type>(suite, c, layout, dtype); });
  }
}

// Any number of slabs gives the same sums; also more slabs than steps.
void check_slabs(Suite& suite) {
  suite.group("slabs");
  const GradientCase plain = {"slabs", 3, 8, 9, 11, 16, 3, 3, 1, 1, 1, 1, 1, 1};
  GradientCase draws = plain;
  draws.num_samples = 3;
  GradientCase share = draws;
  share.share_input = true;
  for (const int64_t slabs : {1, 2, 3, 7, 13, 40}) {
    check<fbc::BFloat16>(suite, plain, {}, fbc::Dtype::kBFloat16, slabs);
    check<fbc::BFloat16>(suite, draws, {}, fbc::Dtype::kBFloat16, slabs);
    check<float>(suite, draws, {}, fbc::Dtype::kFloat32, slabs);
    check<fbc::Half>(suite, draws, {}, fbc::Dtype::kFloat16, slabs, false);
    check<fbc::Half>(suite, share, {}, fbc::Dtype::kFloat16, slabs, false);
  }
  const GradientCase empty = {"no output", 2, 8, 2, 5, 8, 3, 3};
  check<fbc::BFloat16>(suite, empty, {}, fbc::Dtype::kBFloat16);
  const GradientCase no_rows = {"no rows", 0, 8, 5, 5, 8, 3, 3};
  check<fbc::BFloat16>(suite, no_rows, {}, fbc::Dtype::kBFloat16);
  fbc::cuda::WgradParams params{};
  params.shape = fbc::test::shape_of({"resnet", 128, 64, 32, 32, 64, 3, 3, 1, 1, 1, 1, 1, 1});
  suite.expect(fbc::cuda::wgrad_slabs(params) == 30, "64 > 64 at 32: 9 tiles, 264 blocks");
  params.shape = fbc::test::shape_of({"late", 128, 512, 4, 4, 512, 3, 3, 1, 1, 1, 1, 1, 1});
  suite.expect(fbc::cuda::wgrad_slabs(params) == 1, "512 > 512: enough tiles");
  params.shape = fbc::test::shape_of({"few", 2, 8, 4, 4, 8, 3, 3, 1, 1, 1, 1, 1, 1});
  suite.expect(fbc::cuda::wgrad_slabs(params) == 1, "few pixels");
}

// Real numbers: the error of float sums, and the same bits from a second call.
void check_rounding(Suite& suite) {
  suite.group("rounding, repeated calls");
  const GradientCase c = {"uniform", 4, 16, 9, 8, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2};
  for_each_type([&](auto tag, fbc::Dtype dtype) {
    using T = typename decltype(tag)::type;
    Problem<T> problem(c, {}, dtype);
    problem.input.fill([&] { return suite.random.uniform(-1, 1); });
    problem.grad.fill([&] { return suite.random.uniform(-1, 1); });
    const int64_t slabs = fbc::cuda::wgrad_slabs(problem.params);
    const Slabs first = run(suite, c.name, problem, slabs, true);
    const Slabs second = run(suite, c.name, problem, slabs, true);
    suite.same_bits("second call", second.plain, first.plain);
    suite.same_bits("second call, times eps", second.eps, first.eps);
    const vector<vector<double>> by_draw = reference(problem);
    vector<double> want(by_draw[0].size());
    for (const auto& draw : by_draw) {
      for (size_t e = 0; e < want.size(); ++e) want[e] += draw[e];
    }
    // 288 products below 1; tf32 drops 13 bits of either factor.
    const double bound = dtype == fbc::Dtype::kFloat32 ? 288 * 0x1p-10 * 0.25 : 288 * 0x1p-20;
    suite.close(c.name, sum_slabs(first.plain, problem.weights()), want, 0.0, bound);
  });
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_shapes(suite);
  check_layouts(suite);
  check_slabs(suite);
  if (!suite.quick) check_rounding(suite);
  return suite.finish();
}
