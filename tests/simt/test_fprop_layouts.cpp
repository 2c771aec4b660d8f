// fprop() on the interpreter, where memory is not as one would like it: alignment, gaps, strides,
// element numbers, priors; the epilogue; and what one_pass_cannot() and best_source() answer.
#include "cuda/fprop.cu"
#include "cuda/fprop_bfloat16.cu"
#include "cuda/fprop_float16.cu"
#include "cuda/fprop_float32.cu"
#include "cuda/one_pass.cu"

#include "conv_reference.h"

namespace {

using fbc::Activation;
using fbc::ConvShape;
using fbc::Dtype;
using fbc::cuda::WeightSource;
using fbc::test::Forward;
using fbc::test::ForwardLayout;
using fbc::test::GradientCase;
using fbc::test::Suite;
using std::string;

constexpr WeightSource kSources[] = {WeightSource::kGiven, WeightSource::kCooperative, WeightSource::kPrivate};

// Shapes whose filters have 4n, 4n + 2 and odd numbers of elements, one and several groups and
// draws.
std::vector<GradientCase> layout_cases() {
  return {
      {"c8 k24", 2, 8, 5, 6, 24, 3, 3, 1, 1, 1, 1, 1, 1},
      {"c3 k7 odd", 2, 3, 5, 4, 7, 3, 3, 2, 1, 1, 0, 2, 1},
      {"c17 k65", 2, 17, 4, 3, 65, 1, 3, 1, 1, 0, 0, 1, 1},
      {"c6 k20, 2 draws", 2, 6, 4, 5, 20, 3, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 2},
      {"2 groups, 3 draws share", 1, 16, 4, 5, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3, true},
      {"a draw per example, 80 pixels", 3, 16, 8, 10, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3},
      {"c67 k36, split steps", 4, 67, 5, 4, 36, 3, 3, 1, 1, 1, 1, 1, 1},
  };
}

struct NamedLayout {
  const char* name;
  ForwardLayout layout;
};
std::vector<NamedLayout> layouts() {
  std::vector<NamedLayout> out;
  const auto add = [&](const char* name, auto change) {
    ForwardLayout l;
    change(l);
    out.push_back({name, l});
  };
  add("image gaps of 8", [](ForwardLayout& l) { l.input_gap = 8, l.output_gap = 8; });
  add("image gaps of 4", [](ForwardLayout& l) { l.input_gap = 4, l.output_gap = 4; });
  add("image gaps of 3", [](ForwardLayout& l) { l.input_gap = 3, l.output_gap = 3; });
  add("images off by 4", [](ForwardLayout& l) { l.input_shift = 4, l.output_shift = 4; });
  add("images off by 2", [](ForwardLayout& l) { l.input_shift = 2, l.output_shift = 2; });
  add("images off by 1", [](ForwardLayout& l) { l.input_shift = 1, l.output_shift = 1; });
  add("output NCHW", [](ForwardLayout& l) { l.channels_first = true, l.output_gap = 5; });
  add("parameters KCRS", [](ForwardLayout& l) { l.kcrs = true; });
  add("parameters KCRS, scale", [](ForwardLayout& l) { l.kcrs = true, l.scale = true; });
  add("parameters off by 1", [](ForwardLayout& l) { l.parameter_shift = 1; });
  add("scale made before", [](ForwardLayout& l) { l.scale = true; });
  add("point mass", [](ForwardLayout& l) { l.point = true; });
  add("point mass KCRS", [](ForwardLayout& l) { l.point = true, l.kcrs = true; });
  add("priors are tensors", [](ForwardLayout& l) { l.prior_tensors = true; });
  add("priors, KCRS", [](ForwardLayout& l) { l.prior_tensors = true, l.kcrs = true; });
  add("elements from 4", [](ForwardLayout& l) { l.element_offset = 4; });
  add("elements from 2^34 + 3", [](ForwardLayout& l) { l.element_offset = (1ull << 34) + 3; });
  add("weights off by 4", [](ForwardLayout& l) { l.given_shift = 4; });
  add("weights off by 2", [](ForwardLayout& l) { l.given_shift = 2; });
  add("weights off by 1", [](ForwardLayout& l) { l.given_shift = 1; });
  add("no bias", [](ForwardLayout& l) { l.bias = false; });
  for (NamedLayout& l : out) l.layout.kept = true, l.layout.pre_activation = true;
  add("nothing besides the output", [](ForwardLayout&) {});
  return out;
}

template <typename T>
std::vector<double> tolerance(const Forward<T>& forward, const std::vector<double>& want) {
  std::vector<double> allowed;
  for (size_t i = 0; i < want.size(); ++i) {
    allowed.push_back(forward.bound[i] * 160 * 0x1p-24 + 0x1p-24 + std::fabs(want[i]) * fbc::test::kUlp<T>);
  }
  return allowed;
}

template <typename T>
void check_layout(Suite& suite, const GradientCase& c, const NamedLayout& l) {
  Forward<T> forward(c, l.layout, false, suite.random);
  const std::vector<double> allowed = tolerance(forward, forward.want);
  fbc::test::Buffer<T> first;
  for (const WeightSource source : kSources) {
    const string what = string(c.name) + ", " + l.name + ", source " + std::to_string(static_cast<int>(source));
    if (!suite.launched(what.c_str(), forward.run(source))) continue;
    suite.bounded(what, forward.output.values(), forward.want, allowed, 1.0);
    suite.expect(forward.gaps_untouched(forward.output), "%s: wrote between elements", what.c_str());
    if (l.layout.pre_activation) {
      suite.exact(what + ", pre-activation", forward.pre_activation.values(), forward.output.values());
    }
    if (source == WeightSource::kGiven) {
      first = forward.output.memory;
      continue;
    }
    suite.same_bits(what + ", against given", forward.output.memory, first);
    if (l.layout.kept) suite.same_bits(what + ", kept", forward.kept, forward.given);
    const double got = double{forward.kl[0]}, want = forward.want_kl();
    suite.expect(std::fabs(got - want) <= 4e-6 * std::fabs(want), "%s: KL %.9g, want %.9g", what.c_str(), got, want);
  }
}

template <typename T>
void check_layouts(Suite& suite, const char* type) {
  suite.group(string("layouts, ") + type);
  const std::vector<NamedLayout> all = layouts();
  const std::vector<GradientCase> cases = layout_cases();
  for (size_t i = 0; i < cases.size(); ++i) {
    for (size_t j = 0; j < all.size(); ++j) {
      if (!suite.quick || (i + j) % 6 == 0) check_layout<T>(suite, cases[i], all[j]);
    }
  }
}

template <typename T>
void check_activations(Suite& suite, const char* type) {
  suite.group(string("activations, ") + type);
  const GradientCase c = {"activation", 2, 8, 4, 5, 70, 1, 1};
  for (int32_t a = 0; a < fbc::kNumActivations; ++a) {
    ForwardLayout layout;
    layout.activation = static_cast<Activation>(a);
    layout.activation_param = 0.375f;
    layout.pre_activation = true;
    Forward<T> forward(c, layout, false, suite.random);
    const string what = "activation " + std::to_string(a);
    if (!suite.launched(what.c_str(), forward.run(kSources[a % 3]))) continue;
    const std::vector<double> want = forward.activated();
    suite.bounded(what, forward.output.values(), want, tolerance(forward, want), 2.0);
    suite.bounded(what + ", pre-activation", forward.pre_activation.values(), forward.want,
                  tolerance(forward, forward.want), 1.0);
  }
}

// A prior whose scale is not positive has no divergence: NaN, and the output is as ever.
void check_bad_prior(Suite& suite) {
  suite.group("prior scale that is not positive");
  Forward<fbc::BFloat16> forward({"", 1, 8, 3, 3, 8, 3, 3}, {}, false, suite.random);
  forward.weight.posterior.prior_scale_value = 0.0f;
  for (const WeightSource source : {WeightSource::kCooperative, WeightSource::kPrivate}) {
    suite.launched("bad prior", forward.run(source));
    suite.expect(std::isnan(forward.kl[0]), "KL %g, want NaN", double{forward.kl[0]});
    suite.bounded("output", forward.output.values(), forward.want, tolerance(forward, forward.want), 1.0);
  }
}

// ResNet-18 for small images, and what is at its edges.
void check_choices(Suite& suite) {
  suite.group("choices");
  const auto shape = [](int64_t N, int64_t C, int64_t extent, int64_t K, int64_t filter, int64_t draws) {
    return fbc::test::shape_of({"", N, C, extent, extent, K, filter, filter, 1, 1, filter / 2, filter / 2, filter / 2,
                                filter / 2, 1, 1, 1, draws});
  };
  const auto expect = [&](const char* what, const ConvShape& s, WeightSource want) {
    const WeightSource got = fbc::cuda::best_source(s);
    suite.expect(got == want, "%s: source %d, want %d", what, static_cast<int>(got), static_cast<int>(want));
  };
  expect("64>64@32, 128 rows", shape(128, 64, 32, 64, 3, 1), WeightSource::kCooperative);
  expect("512>512@4, 8 rows", shape(8, 512, 4, 512, 3, 1), WeightSource::kPrivate);
  expect("512>512@4, 4 rows", shape(4, 512, 4, 512, 3, 1), WeightSource::kPrivate);
  expect("512>512@4, 16 rows", shape(16, 512, 4, 512, 3, 1), WeightSource::kCooperative);
  expect("256>256@8, 2 rows", shape(2, 256, 8, 256, 3, 1), WeightSource::kPrivate);
  expect("512>512@7, 8 rows", shape(8, 512, 7, 512, 3, 1), WeightSource::kCooperative);
  expect("1>6@28, 256 rows", shape(256, 1, 28, 6, 5, 1), WeightSource::kPrivate);
  expect("6>16@10, 256 rows", shape(256, 6, 10, 16, 5, 1), WeightSource::kPrivate);
  expect("a draw per example", shape(128, 64, 32, 64, 3, 128), WeightSource::kPrivate);
  ConvShape s = shape(8, 64, 32, 64, 3, 1);
  const auto reason = [&](const char* what, bool refuses, Dtype dtype) {
    const char* why = fbc::cuda::one_pass_cannot(s, dtype);
    suite.expect((why != nullptr) == refuses, "%s: %s", what, why != nullptr ? why : "can");
  };
  reason("an ordinary layer", false, Dtype::kBFloat16);
  reason("float32", false, Dtype::kFloat32);
  reason("float64", true, Dtype::kFloat64);
  s.N = int64_t{1} << 22;
  reason("2^32 pixels", true, Dtype::kFloat32);
  s = shape(8, 64, 32, 64, 3, 1), s.C = int64_t{1} << 24;
  reason("filters of 9 * 2^24 elements", true, Dtype::kBFloat16);
  s = shape(8, 64, 32, 64, 3, 1), s.dilation_h = int64_t{1} << 40;
  reason("a far tap", true, Dtype::kBFloat16);
  s = shape(1 << 20, 64, 32, 1 << 14, 1, 1 << 20);
  reason("too many tiles", true, Dtype::kFloat16);
  s = shape(8, 64, 32, 64, 3, 1), s.C = 0;
  reason("no channels", true, Dtype::kFloat16);
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_layouts<fbc::BFloat16>(suite, "bfloat16");
  check_layouts<float>(suite, "tf32");
  check_activations<fbc::BFloat16>(suite, "bfloat16");
  check_activations<fbc::Half>(suite, "float16");
  check_activations<float>(suite, "tf32");
  check_bad_prior(suite);
  check_choices(suite);
  return suite.finish();
}
