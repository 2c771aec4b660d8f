// csrc/core without kernels: elementary functions against double and long double with the error
// bounds that math.h promises, the KL and the activations against central differences; and NaN
// through the kernels. Prints the largest errors.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../../csrc/core/dispatch.h"
#include "../../csrc/core/noise.h"
#include "../../csrc/core/posterior.h"
#include "harness.h"

using namespace fbc;
using harness::Random;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls f with every step-th float from low to high; both of one sign.
template <typename F>
void sweep(float low, float high, uint32_t step, F&& f) {
  const uint32_t from = std::min(float_to_bits(low), float_to_bits(high));
  const uint32_t to = std::max(float_to_bits(low), float_to_bits(high));
  for (uint64_t bits = from; bits <= to; bits += step) f(bits_to_float(static_cast<uint32_t>(bits)));
  f(low), f(high);
}

// The largest error of one function, and where.
struct Worst {
  const char* name;
  double bound, error = 0, at = 0;
  Worst(const char* function, double promised) : name(function), bound(promised) {}
  void add(double x, double got, double want, double size) {
    const double e = std::fabs(got - want) / size;
    if (!(e <= error) && !std::isnan(error)) error = e, at = x;  // a NaN stays
  }
  ~Worst() {
    std::printf("  %-22s %.3g at %.9g, promised %.3g\n", name, error, at, bound);
    CHECK(error <= bound);
    CHECK(error >= 0.6 * bound && "a bound that is never nearly reached says nothing");
  }
};

// ---- elementary functions
// -------------------------------------------------------------------------

void test_logarithm() {
  Worst worst("log_positive", 2.6e-7);
  const auto add = [&](float x) {
    const double want = std::log(static_cast<double>(x));
    worst.add(x, log_positive(x), want, std::fmax(std::fabs(want), 0.1));
  };
  sweep(std::numeric_limits<float>::min(), std::numeric_limits<float>::max(), 1499, add);
  sweep(0.5f, 2.0f, 23, add);
  CHECK(log_positive(1.0f) == 0.0f);
  bool exact_powers = true;
  for (int e = -126; e < 128; ++e) {
    const double error = log_positive(std::ldexp(1.0f, e)) - e * std::log(2.0);
    exact_powers = exact_powers && std::fabs(error) <= 6e-8 * std::fabs(e);
  }
  CHECK(exact_powers);
}

void test_exponential() {
  Worst worst("exp_nonpositive", 2.5e-7);
  const auto add = [&](float x) {
    const double want = std::exp(static_cast<double>(x));
    worst.add(x, exp_nonpositive(x), want, want);
  };
  sweep(-87.0f, -1e-30f, 997, add);
  CHECK(exp_nonpositive(0.0f) == 1.0f);
  CHECK(exp_nonpositive(-0.0f) == 1.0f);
  for (const float x : {-87.0f, -87.5f, -1e4f, -std::numeric_limits<float>::max(), -kInfinity}) {
    CHECK(exp_nonpositive(x) >= std::numeric_limits<float>::min());  // never subnormal
    CHECK(exp_nonpositive(x) < 1.7e-38f);
  }
}

void test_softplus_and_sigmoid() {
  Worst plus("softplus", 3.5e-7), sigmoid("sigmoid", 3.2e-7);
  const auto add = [&](float x) {
    float t;
    const double exact = std::exp(-std::fabs(static_cast<double>(x)));
    const double want = std::log1p(exact) + std::fmax(x, 0.0);
    plus.add(x, softplus(x, &t), want, want);
    const double slope = (x >= 0 ? 1.0 : exact) / (1.0 + exact);
    sigmoid.add(x, sigmoid_from(x, t), slope, slope);
  };
  sweep(-87.0f, -1e-30f, 997, add);
  sweep(0.0f, 200.0f, 997, add);
  for (const float x : {-88.0f, -200.0f, -1e30f, -kInfinity}) {
    float t;
    const float y = softplus(x, &t);
    CHECK(y > 0.0f && y < 1.7e-38f);
    CHECK(sigmoid_from(x, t) > 0.0f && sigmoid_from(x, t) < 1.7e-38f);
  }
  float t;
  double wide;
  CHECK(softplus(kInfinity, &t) == kInfinity);
  CHECK(sigmoid_from(kInfinity, t) == 1.0f);
  CHECK(std::isnan(softplus(kNan, &t)));
  CHECK(std::isnan(softplus(static_cast<double>(kNan), &wide)));
  CHECK(softplus(-200.0, &wide) == std::exp(-200.0));
}

long double exact_scale_term(double r) {
  const long double x = static_cast<long double>(r);
  const long double f = x - 1;
  return 0.5L * f * f + (f - (std::fabs(f) < 0.5L ? std::log1p(f) : std::log(x)));
}

void test_kl_scale_term() {
  Worst worst("kl_scale_term", 5e-7);
  bool nonnegative = true;
  const auto add = [&](float r) {
    const double want = static_cast<double>(exact_scale_term(r));
    const float got = kl_scale_term(r);
    nonnegative = nonnegative && got >= 0.0f;
    worst.add(r, got, want, want > 0 ? want : 1e-30);
  };
  sweep(1e-30f, 1e15f, 997, add);
  sweep(0.6f, 1.6f, 11, add);
  CHECK(nonnegative);
  CHECK(kl_scale_term(1.0f) == 0.0f);
  CHECK(kl_scale_term(1.0) == 0.0);
  CHECK(std::isnan(kl_scale_term(kNan)) && std::isnan(kl_scale_term(-kNan)));
  CHECK(kl_scale_term(kInfinity) == kInfinity);
  double wide = 0;
  for (const double r : {1e-30, 1e-7, 0.1, 0.9, 0.999, 1.001, 1.5, 40.0, 1e10}) {
    const double want = static_cast<double>(exact_scale_term(r));
    wide = std::fmax(wide, std::fabs(kl_scale_term(r) - want) / std::fmax(want, 1e-4));
  }
  CHECK(wide < 1e-11);
}

void test_box_muller(Random& random) {
  Worst radius("Box-Muller radius", 2e-7), direction("Box-Muller direction", 2.5e-7);
  const uint32_t extremes[] = {0, 1, 2, 0x7fffffff, 0x80000000, 0x80000001, 0xfffffffe, 0xffffffff};
  for (int i = 0; i < 400000; ++i) {
    uint32_t a = static_cast<uint32_t>(random.next()), b = static_cast<uint32_t>(random.next());
    if (i < 64) a = extremes[i / 8], b = extremes[i % 8];
    const float u = std::fmaf(static_cast<float>(a >> 1), 0x1p-31f, 0x1p-32f);
    const double want = std::sqrt(-2 * std::log(static_cast<double>(u)));
    const float got = box_muller_radius(a);
    radius.add(u, got, want, std::fmax(want, 0.1));
    const double half_turn = std::acos(-1.0) * (static_cast<int32_t>(b << 1) * 0x1p-32);
    const double sign = b >> 31 ? -1.0 : 1.0;
    const NormalPair z = box_muller(a, b);
    const double size = std::fmax(got, 1e-30);
    direction.add(b, z.cosine, sign * got * std::cos(half_turn), size);
    direction.add(b, z.sine, got * std::sin(half_turn), size);
  }
  CHECK(box_muller_radius(0) > 6.66f && box_muller_radius(0) < 6.661f);
  CHECK(box_muller_radius(0xffffffffu) >= 0.0f && box_muller_radius(0xffffffffu) < 1e-3f);
}

// Central differences of the KL in double, by each of its four arguments.
void test_kl_gradients(Random& random) {
  double worst = 0;
  for (int i = 0; i < 300; ++i) {
    const double loc = random.uniform() - 0.5, rho = 8 * random.uniform() - 6;
    const double prior_loc = random.uniform() - 0.5, prior_scale = 0.3 + random.uniform();
    const double floor = 1e-3, h = 1e-5;
    const auto kl = [&](double l, double r, double pl, double ps) {
      double t;
      return kl_normal_normal(l, scale_from_rho(r, floor, &t), pl, 1 / ps);
    };
    double t;
    const double scale = scale_from_rho(rho, floor, &t);
    const PosteriorGrad<double> g = posterior_grad(0.0, 0.0, 2.0, loc, rho, prior_loc, 1 / prior_scale, floor);
    const PriorGrad<double> p = kl_prior_grad(2.0, loc, scale, prior_loc, 1 / prior_scale);
    const double got[] = {g.loc, g.rho, p.loc, p.scale};
    for (int j = 0; j < 4; ++j) {
      double x[4] = {loc, rho, prior_loc, prior_scale};
      x[j] += h;
      const double above = kl(x[0], x[1], x[2], x[3]);
      x[j] -= 2 * h;
      const double want = (above - kl(x[0], x[1], x[2], x[3])) / h;  // times 2 = grad_kl
      worst = std::fmax(worst, std::fabs(got[j] - want) / (1 + std::fabs(want)));
    }
  }
  CHECK(worst < 1e-7);
}

// ---- activations
// ----------------------------------------------------------------------------------

template <Activation kActivation>
void test_activation(Random& random) {
  const double param = kActivation == Activation::kLeakyRelu ? 0.2 : 1.3;
  double worst = 0, worst_float = 0;
  for (int i = 0; i < 4000; ++i) {
    const double z = 16 * random.uniform() - 8, h = 1e-5;
    const double y = activate<kActivation>(z, param);
    const double above = activate<kActivation>(z + h, param);
    const double below = activate<kActivation>(z - h, param);
    const bool kink = std::fabs(z) < h || std::fabs(z - 6) < h || std::fabs(std::fabs(z) - 3) < h ||
                      std::fabs(std::fabs(z) - 2.5) < h;
    const double saved = needs_pre_activation(kActivation) ? z : y;
    const double got = activation_derivative<kActivation>(saved, param);
    const double want = (above - below) / (2 * h);
    if (!kink) worst = std::fmax(worst, std::fabs(got - want) / (1 + std::fabs(want)));
    const float z32 = static_cast<float>(z), param32 = static_cast<float>(param);
    const float y32 = activate<kActivation>(z32, param32);
    const float saved32 = needs_pre_activation(kActivation) ? z32 : y32;
    const double got32 = activation_derivative<kActivation>(saved32, param32);
    worst_float = std::fmax(worst_float, std::fabs(y32 - y) / (1 + std::fabs(y)));
    if (!kink) worst_float = std::fmax(worst_float, std::fabs(got32 - want) / (1 + std::fabs(want)));
  }
  CHECK(worst < 1e-8);
  CHECK(worst_float < 2e-6);
  CHECK(std::isnan(activate<kActivation>(kNan, 0.2f)) && "NaN stays NaN");
  CHECK(std::isnan(activate<kActivation>(static_cast<double>(kNan), 0.2)));
}

void test_activations(Random& random) {
  int32_t visited = 0;
  for (int32_t id = 0; id < kNumActivations; ++id) {
    visit_activation(static_cast<Activation>(id), [&](auto tag) {
      visited += static_cast<int32_t>(decltype(tag)::value) == id;
      test_activation<decltype(tag)::value>(random);
    });
  }
  CHECK(visited == kNumActivations);
  CHECK(!visit_activation(static_cast<Activation>(-1), [](auto) {}));
  CHECK(!visit_activation(static_cast<Activation>(kNumActivations), [](auto) {}));
  // At a kink: PyTorch's choices.
  CHECK(activation_derivative<Activation::kRelu>(0.0f, 0.0f) == 0.0f);
  CHECK(activation_derivative<Activation::kRelu6>(0.0f, 0.0f) == 0.0f);
  CHECK(activation_derivative<Activation::kRelu6>(6.0f, 0.0f) == 0.0f);
  CHECK(activation_derivative<Activation::kLeakyRelu>(0.0f, 0.2f) == 0.2f);
  CHECK(activation_derivative<Activation::kElu>(0.0f, 1.5f) == 1.5f);
  CHECK(activation_derivative<Activation::kHardSigmoid>(0.0f, 0.0f) == 0.0f);
  CHECK(activation_derivative<Activation::kHardSigmoidTorch>(1.0f, 0.0f) == 0.0f);
  CHECK(activate<Activation::kRelu>(-kInfinity, 0.0f) == 0.0f);
  CHECK(activate<Activation::kSigmoid>(-1e4f, 0.0f) == 0.0f);
  CHECK(activate<Activation::kSoftplus>(1e4f, 0.0f) == 1e4f);
}

// ---- kernels
// ----------------------------------------------------------------------------------------

// A NaN parameter shows in its weight, its gradient and the KL, and nowhere else.
void test_nan_parameters() {
  constexpr int64_t kCount = 70;
  std::vector<float> loc(kCount, 0.5f), rho(kCount, -1.0f), weight(kCount), grad_rho(kCount);
  std::vector<double> partials(1);
  rho[3] = rho[69] = kNan, rho[37] = -kNan, loc[20] = kNan;
  PosteriorParams<float> p = {};
  p.K = p.R = p.S = 1, p.C = kCount;
  p.loc = loc.data(), p.rho = rho.data();
  p.loc_stride = p.rho_stride = {kCount, kCount, kCount, 1};
  p.prior_scale_value = 1.0f;
  kernels<float>().sample(p, 0, 0, 1, {weight.data(), Dtype::kFloat32, p.loc_stride}, partials.data());
  PosteriorGrads<float> g = {};
  g.grad_kl = 1.0f, g.num_samples = 1;
  g.grad_rho = grad_rho.data(), g.grad_rho_stride = p.loc_stride;
  kernels<float>().posterior_backward(p, g, 0, 1);
  bool weights = true, gradients = true;
  for (size_t i = 0; i < kCount; ++i) {
    const bool of_rho = std::isnan(rho[i]);
    weights = weights && std::isnan(weight[i]) == (of_rho || i == 20);
    gradients = gradients && std::isnan(grad_rho[i]) == of_rho;
  }
  CHECK(weights), CHECK(gradients), CHECK(std::isnan(partials[0]));
}

// The chains of the peak probe swap x and 3 - x, exactly: nothing is left out, nothing overflows.
void test_multiply_adds(Isa isa) {
  const ProbeKernels& probe = probe_kernels(isa);
  CHECK(probe.operations % 24 == 0);
  const double chains = 12, start = chains * 1.0 + (chains - 1) / 2, swapped = 3 * chains - start;
  for (const int64_t iterations : {0, 1, 2, 1001, 4000}) {
    const double want = iterations % 2 == 0 ? start : swapped;
    CHECK(std::fabs(probe.multiply_adds(iterations, -1.0f, 3.0f) - want) < 1e-5);
  }
}

}  // namespace

int main() {
  Random random(3);
  for (int32_t isa = 0; isa <= static_cast<int32_t>(detected_isa()); ++isa) {
    limit_isa(static_cast<Isa>(isa));
    test_nan_parameters();
    test_multiply_adds(static_cast<Isa>(isa));
  }
  test_logarithm();
  test_exponential();
  test_softplus_and_sigmoid();
  test_kl_scale_term();
  test_box_muller(random);
  test_kl_gradients(random);
  test_activations(random);
  return harness::report("math");
}
