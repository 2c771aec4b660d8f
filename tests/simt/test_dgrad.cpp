// dgrad() on the interpreter: whole numbers compared for equality; sampled weights replayed.
#include "cuda/dgrad.cu"
#include "cuda/sample.cu"

#include "core/dispatch.h"
#include "gradient_cases.h"

namespace {

using fbc::cuda::WeightSource;
using fbc::test::Buffer;
using fbc::test::GradientCase;
using fbc::test::Image;
using fbc::test::Suite;
using std::vector;

constexpr uint64_t kOffset = 5;

struct Layout {
  int64_t grad_gap = 0, grad_shift = 0, out_gap = 0, out_shift = 0, weight_shift = 0;
  uint64_t element_offset = 0;
  bool kcrs = false;            // memory order of loc and rho
  bool channels_first = false;  // of grad_input
};

template <typename T>
struct Problem {
  fbc::ConvShape shape;
  Image<T> grad, out;
  Buffer<T> memory;  // of the given weight, from `weight_shift` on
  int64_t weight_shift;
  Buffer<float> loc, rho, scale;
  Buffer<int64_t> seed;
  fbc::cuda::DgradParams params{};
  fbc::cuda::ConvWeight weight{};

  Problem(const GradientCase& c, const Layout& layout, fbc::Dtype dtype)
      : shape(fbc::test::shape_of(c)),
        grad(shape.output_rows(), shape.P, shape.Q, shape.K, layout.grad_gap, layout.grad_shift),
        out(shape.N, shape.H, shape.W, shape.C, layout.out_gap, layout.out_shift),
        weight_shift(layout.weight_shift) {
    memory = fbc::test::poisoned<T>(weight_shift + shape.num_samples * weights());
    seed.assign({-77, 123456789012345});
    if (layout.channels_first) {
      out.stride = {shape.C * shape.H * shape.W, shape.W, 1, shape.H * shape.W};
    }
    params.shape = shape;
    params.dtype = dtype;
    params.grad = grad.data();
    params.grad_stride = grad.stride;
    params.grad_input = out.data();
    params.grad_input_stride = out.stride;
    weight.source = WeightSource::kGiven;
    weight.given = memory.data() + weight_shift;
    fbc::PosteriorParams<float>& p = weight.posterior;
    const int64_t R = shape.R, S = shape.S, C = shape.channels_per_group();
    p.K = shape.K, p.R = R, p.S = S, p.C = C;
    p.loc_stride =
        layout.kcrs ? fbc::WeightStrides{R * S * C, S, 1, R * S} : fbc::WeightStrides{R * S * C, S * C, C, 1};
    p.rho_stride = p.loc_stride;
    p.prior_scale_value = 1.0f;
    p.scale_floor = 1e-6f;
    p.noise = {31, kOffset};
    p.stream = fbc::Stream::kWeight;
    p.element_offset = layout.element_offset;
    weight.seed = seed.data();
  }
  int64_t weights() const { return shape.K * shape.R * shape.S * shape.channels_per_group(); }
  T& given(int64_t draw, int64_t element) {
    return memory[static_cast<size_t>(weight_shift + draw * weights() + element)];
  }
  int64_t element(int64_t k, int64_t r, int64_t s, int64_t c) const {
    return ((k * shape.R + r) * shape.S + s) * shape.channels_per_group() + c;
  }

  // Fills loc, rho, and `memory` with the draws that they and the seed define.
  void sample(fbc::test::Random& random) {
    loc = fbc::test::uniforms<float>(weights(), -1, 1, random);
    rho = fbc::test::uniforms<float>(weights(), -3, 1, random);
    scale = fbc::test::poisoned<float>(weights());
    fbc::PosteriorParams<float>& p = weight.posterior;
    p.loc = loc.data(), p.rho = rho.data();
    for (int64_t k = 0; k < p.K; ++k)
      for (int64_t r = 0; r < p.R; ++r)
        for (int64_t s = 0; s < p.S; ++s)
          for (int64_t c = 0; c < p.C; ++c) sample_one(k, r, s, c);
  }
  void sample_one(int64_t k, int64_t r, int64_t s, int64_t c) {
    const fbc::PosteriorParams<float>& p = weight.posterior;
    const int64_t e = element(k, r, s, c);
    const auto& stride = p.loc_stride;
    const int64_t at = k * stride.k + r * stride.r + s * stride.s + c * stride.c;
    float t;
    scale[static_cast<size_t>(e)] = fbc::scale_from_rho(p.rho[at], p.scale_floor, &t);
    for (int64_t draw = 0; draw < shape.num_samples; ++draw) {
      const fbc::NoiseKey key = {static_cast<uint64_t>(seed[0]),
                                 static_cast<uint64_t>(seed[1]) + kOffset + static_cast<uint64_t>(draw)};
      const float eps = fbc::standard_normal(key, p.stream, p.element_offset + static_cast<uint64_t>(e));
      fbc::store_from_acc(&given(draw, e), fbc::weight_from_eps(p.loc[at], scale[static_cast<size_t>(e)], eps));
    }
  }
};

// In the order of out.values(); `bound`: sums of |products|.
template <typename T>
void reference(Problem<T>& problem, vector<double>* want, vector<double>* bound) {
  const fbc::ConvShape& s = problem.shape;
  want->assign(static_cast<size_t>(s.N * s.H * s.W * s.C), 0.0);
  *bound = *want;
  fbc::test::for_each_product(s, [&](const fbc::test::Product& i) {
    const double product = fbc::test::as_double(problem.grad.at(i.row, i.p, i.q, i.k)) *
                           fbc::test::as_double(problem.given(i.draw, problem.element(i.k, i.r, i.s, i.c)));
    const size_t at = static_cast<size_t>(((i.n * s.H + i.h) * s.W + i.w) * s.C + i.channel);
    (*want)[at] += product;
    (*bound)[at] += std::fabs(product);
  });
}

template <typename T>
Buffer<T> run(Suite& suite, const std::string& name, Problem<T>& problem, WeightSource source,
              const float* scale = nullptr) {
  fbc::test::poison(problem.out.memory);
  fbc::cuda::ConvWeight weight = problem.weight;
  weight.source = source;
  weight.scale = scale;
  if (source != WeightSource::kGiven) weight.given = nullptr;
  const size_t bytes = fbc::cuda::dgrad_workspace(problem.params, weight);
  auto workspace = fbc::test::poisoned<unsigned char>(static_cast<int64_t>(bytes));
  suite.launched(name.c_str(), fbc::cuda::dgrad(problem.params, weight, workspace.data(), nullptr));
  return problem.out.memory;
}

// Whole numbers: the sum is exact, and rounded once to the output's type.
template <typename T>
void check_exact(Suite& suite, const GradientCase& c, const Layout& layout, fbc::Dtype dtype) {
  Problem<T> problem(c, layout, dtype);
  problem.grad.fill([&] { return static_cast<double>(suite.random.between(-3, 3)); });
  for (int64_t draw = 0; draw < c.num_samples; ++draw) {
    for (int64_t e = 0; e < problem.weights(); ++e) {
      problem.given(draw, e) = fbc::test::from_double<T>(static_cast<double>(suite.random.between(-3, 3)));
    }
  }
  run(suite, c.name, problem, WeightSource::kGiven);
  vector<double> want, bound;
  reference(problem, &want, &bound);
  for (double& x : want) x = fbc::test::as_double(fbc::test::from_double<T>(x));
  suite.exact(c.name, problem.out.values(), want);
  int64_t poison = 0;
  for (const T& x : problem.out.memory) poison += std::isnan(fbc::test::as_double(x)) ? 1 : 0;
  suite.expect(poison + static_cast<int64_t>(want.size()) == static_cast<int64_t>(problem.out.memory.size()),
               "%s: wrote between the pixels", c.name);
}

// Sampled: every source gives the bits of the weights' replay, whose sums are near those in double.
template <typename T>
void check_sampled(Suite& suite, const GradientCase& c, const Layout& layout, fbc::Dtype dtype) {
  Problem<T> problem(c, layout, dtype);
  const std::string name = c.name;
  problem.grad.fill([&] { return suite.random.uniform(-1, 1); });
  problem.sample(suite.random);
  const Buffer<T> given = run(suite, name, problem, WeightSource::kGiven);
  vector<double> want, bound;
  reference(problem, &want, &bound);
  for (size_t i = 0; i < bound.size(); ++i) bound[i] += std::fabs(want[i]);
  suite.bounded(name, problem.out.values(), want, bound, sizeof(T) == 4 ? 0x1p-9 : fbc::test::kUlp<T>);
  suite.same_bits(name + ", private", run(suite, name, problem, WeightSource::kPrivate), given);
  suite.same_bits(name + ", private, scale given",
                  run(suite, name, problem, WeightSource::kPrivate, problem.scale.data()), given);
  suite.same_bits(name + ", cooperative", run(suite, name, problem, WeightSource::kCooperative), given);
}

template <typename F>
void for_each_type(F f) {
  f(fbc::TypeTag<fbc::BFloat16>{}, fbc::Dtype::kBFloat16);
  f(fbc::TypeTag<fbc::Half>{}, fbc::Dtype::kFloat16);
  f(fbc::TypeTag<float>{}, fbc::Dtype::kFloat32);
}
const char* group_name(fbc::Dtype dtype) {
  return dtype == fbc::Dtype::kBFloat16  ? "shapes, bfloat16"
         : dtype == fbc::Dtype::kFloat16 ? "shapes, float16"
                                         : "shapes, tf32";
}

void check_shapes(Suite& suite) {
  const auto cases = fbc::test::gradient_cases();
  for_each_type([&](auto tag, fbc::Dtype dtype) {
    using T = typename decltype(tag)::type;
    suite.group(group_name(dtype));
    for (size_t i = 0; i < cases.size(); i += suite.quick ? 5 : 1) {
      check_exact<T>(suite, cases[i], {}, dtype);
    }
    check_exact<T>(suite, {"no output", 2, 8, 2, 5, 8, 3, 3}, {}, dtype);
    check_exact<T>(suite, {"no rows", 0, 8, 5, 5, 8, 3, 3}, {}, dtype);
  });
}

// Gaps between pixels, addresses that allow 16-byte accesses of some operands only, NCHW outputs.
void check_layouts(Suite& suite) {
  suite.group("gaps, alignment, strides");
  const GradientCase plain = {"layout", 3, 16, 5, 6, 24, 3, 3, 2, 1, 1, 1, 1, 1};
  GradientCase grouped = plain;
  grouped.groups = 2;
  const Layout layouts[] = {{8, 16, 16, 8, 8}, {1, 0, 0, 0, 0}, {0, 3, 0, 0, 0},
                            {0, 0, 3, 0, 0},   {0, 0, 4, 4, 0}, {0, 0, 0, 1, 0},
                            {0, 0, 0, 0, 1},   {2, 1, 5, 3, 4}, {0, 0, 0, 0, 0, 0, false, true}};
  for (const Layout& layout : layouts) {
    for_each_type([&](auto tag, fbc::Dtype dtype) {
      using T = typename decltype(tag)::type;
      if (!suite.quick) check_exact<T>(suite, plain, layout, dtype);
      check_exact<T>(suite, grouped, layout, dtype);
    });
  }
}

void check_sources(Suite& suite) {
  suite.group("sampled weights");
  const auto cases = fbc::test::gradient_cases();
  for (size_t i = 0; i < cases.size(); i += suite.quick ? 9 : 2) {
    check_sampled<fbc::BFloat16>(suite, cases[i], {}, fbc::Dtype::kBFloat16);
  }
  const GradientCase draws = {"draws", 4, 8, 5, 4, 12, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4};
  GradientCase share = draws;
  share.share_input = true;
  const GradientCase odd = {"odd", 4, 5, 5, 4, 6, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2};
  Layout kcrs, offset;
  kcrs.kcrs = true;
  offset.element_offset = 6;
  for_each_type([&](auto tag, fbc::Dtype dtype) {
    using T = typename decltype(tag)::type;
    for (const GradientCase& c : {draws, share, odd}) {
      check_sampled<T>(suite, c, kcrs, dtype);
      if (suite.quick) continue;
      check_sampled<T>(suite, c, {}, dtype);
      check_sampled<T>(suite, c, offset, dtype);
    }
  });
}

// Few tiles of many steps: several blocks share those of a tile.
void check_splits(Suite& suite) {
  suite.group("steps split among blocks");
  struct SplitCase {
    GradientCase shape;
    int32_t splits, of_float;
  };
  const SplitCase cases[] = {
      {{"18 steps", 2, 24, 4, 4, 64, 3, 3, 1, 1, 1, 1, 1, 1}, 2, 4},
      {{"27 steps, 2 tiles", 9, 72, 4, 4, 96, 3, 3, 1, 1, 1, 1, 1, 1}, 3, 6},
      {{"19 steps, odd", 2, 5, 5, 4, 67, 3, 3, 1, 1, 1, 1, 1, 1}, 2, 4},
      {{"33 steps, 1x1", 1, 17, 2, 2, 1032, 1, 1}, 4, 8},
      {{"stride 2: phases of 1 to 4 taps", 2, 16, 5, 5, 160, 3, 3, 2, 2, 1, 1, 1, 1}, 2, 5},
      {{"stride 2, 1x1: unread input", 1, 8, 5, 6, 520, 1, 1, 2, 2}, 2, 4},
      {{"2 groups, 2 draws", 4, 16, 3, 3, 128, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2}, 2, 4},
      {{"7 draws share 3 steps", 2, 8, 3, 3, 80, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 7, true}, 2, 4},
      {{"no output", 2, 8, 2, 5, 64, 3, 3}, 2, 4},
      {{"15 steps: one split", 2, 8, 3, 3, 480, 1, 1}, 1, 3},
  };
  for (size_t i = 0; i < std::size(cases); i += suite.quick ? 4 : 1) {
    for_each_type([&](auto tag, fbc::Dtype dtype) {
      using T = typename decltype(tag)::type;
      if (suite.quick && dtype != fbc::Dtype::kBFloat16) return;
      const GradientCase& c = cases[i].shape;
      check_exact<T>(suite, c, {}, dtype);
      check_sampled<T>(suite, c, {}, dtype);
      const int32_t want = sizeof(T) == 4 ? cases[i].of_float : cases[i].splits;
      Problem<T> problem(c, {}, dtype);
      const int32_t got = fbc::cuda::plan_dgrad(problem.params).splits;
      suite.expect(got == want, "%s: %d splits, want %d", c.name, got, want);
      const size_t bytes = fbc::cuda::dgrad_workspace(problem.params, problem.weight);
      suite.expect((bytes == 0) == (want == 1), "%s: %zu bytes of workspace", c.name, bytes);
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_shapes(suite);
  check_layouts(suite);
  check_sources(suite);
  check_splits(suite);
  return suite.finish();
}
