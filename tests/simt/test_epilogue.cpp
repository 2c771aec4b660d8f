// The kernels of csrc/cuda/bias_activation.cu and activation_grad.cu: whole numbers exactly, every
// activation in every dtype and layout against float64, bias sums, NaN.
#include "check.h"
#include "cuda/activation_grad.cu"
#include "cuda/bias_activation.cu"

namespace {

using namespace fbc;
using namespace fbc::cuda;
using namespace fbc::test;

struct Extents {
  int64_t rows, P, Q, K;
  int64_t elements() const { return rows * P * Q * K; }
};
enum class Layout { kNhwc, kNchw, kGaps, kOdd, kSliced, kBroadcast };
constexpr Layout kLayouts[] = {Layout::kNhwc, Layout::kNchw, Layout::kGaps, Layout::kOdd, Layout::kSliced};

// An image tensor in some layout; memory that belongs to no element stays as it was.
template <typename T>
struct Image {
  Extents extents;
  ImageStrides stride;
  int64_t base = 0;
  Buffer<T> memory;

  Image(Extents of, Layout layout) : extents(of) {
    const auto [N, P, Q, K] = of;
    int64_t span = of.elements();
    stride = {P * Q * K, Q * K, K, 1};
    if (layout == Layout::kNchw) stride = {K * P * Q, Q, 1, P * Q};
    if (layout == Layout::kOdd) base = 1;  // dense, but not aligned
    if (layout == Layout::kGaps) {
      stride = {P * Q * (2 * K + 1), Q * (2 * K + 1), 2 * K + 1, 2};
      span = N * stride.n;
    }
    if (layout == Layout::kSliced) {  // the first channels of more
      stride = {P * Q * (K + 8), Q * (K + 8), K + 8, 1};
      span = N * stride.n;
    }
    if (layout == Layout::kBroadcast) stride = {0, 0, 0, 0}, span = 1;
    memory = poisoned<T>(base + span);
  }
  T& operator()(int64_t i) {
    const auto [N, P, Q, K] = extents;
    const int64_t k = i % K, q = i / K % Q, p = i / (K * Q) % P, n = i / (K * Q * P);
    return memory[static_cast<size_t>(base + n * stride.n + p * stride.h + q * stride.w + k * stride.c)];
  }
  T* data() { return memory.data() + base; }
  template <typename F>
  void fill(F value) {
    for (int64_t i = 0; i < extents.elements(); ++i) (*this)(i) = from_double<T>(value(i));
  }
};

template <typename T>
constexpr Dtype dtype_of() {
  return std::is_same_v<T, double>     ? Dtype::kFloat64
         : std::is_same_v<T, float>    ? Dtype::kFloat32
         : std::is_same_v<T, BFloat16> ? Dtype::kBFloat16
                                       : Dtype::kFloat16;
}
double activated(Activation a, double z, double param) {
  double out = 0;
  visit_activation(a, [&](auto tag) { out = activate<decltype(tag)::value>(z, param); });
  return out;
}
double slope_of(Activation a, double saved, double param) {
  double out = 0;
  visit_activation(a, [&](auto tag) { out = activation_derivative<decltype(tag)::value>(saved, param); });
  return out;
}
// Half the spacing of the subnormals.
template <typename T>
constexpr double kTiny = std::is_same_v<T, Half> ? 0x1p-25 : 0.0;

// ---- bias_activation ------------------------------------------------------------------------
struct BiasCase {
  Extents extents;
  Layout layout;
  Activation activation;
  int64_t num_samples;
  bool with_bias, with_pre, whole;
};

template <typename T>
void check_bias(Suite& suite, const BiasCase& c, const std::string& name) {
  using A = acc_t<T>;
  Image<T> z(c.extents, c.layout), pre(c.extents, c.layout), before(c.extents, c.layout);
  z.fill([&](int64_t) {
    return c.whole ? static_cast<double>(suite.random.between(-9, 9)) : suite.random.uniform(-7, 7);
  });
  before.memory = z.memory;
  Buffer<A> bias = c.whole ? integers<A>(c.num_samples * c.extents.K, -9, 9, suite.random)
                           : uniforms<A>(c.num_samples * c.extents.K, -1, 1, suite.random);
  BiasActivationParams p = {};
  p.rows = c.extents.rows, p.P = c.extents.P, p.Q = c.extents.Q, p.K = c.extents.K;
  p.num_samples = c.num_samples, p.dtype = dtype_of<T>();
  p.z = z.data(), p.z_stride = z.stride;
  p.pre_activation = c.with_pre ? pre.data() : nullptr;
  p.bias = c.with_bias ? bias.data() : nullptr;
  p.activation = c.activation, p.activation_param = 0.25;
  suite.launched("bias_activation", bias_activation(p, nullptr));
  Image<T> want = before, want_pre(c.extents, c.layout);
  std::vector<double> got, ideal, bound;
  const int64_t per_draw = c.extents.elements() / c.num_samples;
  for (int64_t i = 0; i < c.extents.elements(); ++i) {
    const int64_t channel = i / per_draw * c.extents.K + i % c.extents.K;
    A sum = static_cast<A>(as_double(before(i)));
    if (c.with_bias) sum += bias[static_cast<size_t>(channel)];
    if (c.with_pre) want_pre(i) = from_double<T>(static_cast<double>(sum));
    const double exact = activated(c.activation, static_cast<double>(sum), 0.25);
    want(i) = from_double<T>(exact);
    got.push_back(as_double(z(i))), ideal.push_back(exact);
    bound.push_back(kTiny<T> + kUlp<T> * std::fabs(exact) +
                    (sizeof(A) == 8 ? 1e-14 : 2e-6) * (1 + std::fabs(static_cast<double>(sum))));
  }
  if (c.whole) {
    suite.same_bits(name, z.memory, want.memory);
  } else {
    suite.bounded(name, got, ideal, bound, 1.0);
  }
  suite.same_bits(name + " pre_activation", pre.memory, want_pre.memory);
}

std::vector<Extents> images(bool quick) {
  std::vector<Extents> all = {{4, 1, 1, 1}, {4, 3, 5, 3}, {4, 2, 4, 8}, {4, 3, 3, 17}, {4, 1, 8, 2}};
  if (!quick) {
    for (Extents more :
         {Extents{4, 5, 7, 64}, Extents{12, 8, 1, 5}, Extents{4, 4, 4, 33}, Extents{4, 1, 1, 4096 / 4 + 8}})
      all.push_back(more);
  }
  return all;
}

template <typename T>
void bias_all(Suite& suite) {
  int turn = 0;
  for (const Extents& extents : images(suite.quick))
    for (Layout layout : kLayouts)
      for (int kind = 0; kind < (suite.quick ? 2 : 3); ++kind) {
        ++turn;
        const auto activation =
            kind == 0 ? Activation::kRelu : static_cast<Activation>((3 * turn + kind) % kNumActivations);
        check_bias<T>(
            suite,
            {extents, layout, activation, turn % 3 == 0 ? 4 : 1 + turn % 2, turn % 5 != 0, turn % 2 == 0, kind == 0},
            "image " + std::to_string(turn));
      }
  for (int32_t a = 0; a < kNumActivations; ++a)
    for (Layout layout : {Layout::kNhwc, Layout::kNchw, Layout::kGaps}) {
      if (suite.quick && layout != Layout::kNhwc) continue;
      check_bias<T>(suite, {{2, 4, 4, 16}, layout, static_cast<Activation>(a), 2, true, true, false},
                    "activation " + std::to_string(a));
    }
}

// Every activation hands NaN on.
template <typename T>
void nan_through(Suite& suite) {
  for (int32_t a = 0; a < kNumActivations; ++a) {
    Image<T> z({1, 2, 4, 8}, Layout::kNhwc);
    z.fill([](int64_t i) { return i % 3 == 0 ? std::nan("") : 0.5; });
    BiasActivationParams p = {};
    p.rows = 1, p.P = 2, p.Q = 4, p.K = 8, p.num_samples = 1, p.dtype = dtype_of<T>();
    p.z = z.data(), p.z_stride = z.stride, p.activation = static_cast<Activation>(a);
    p.activation_param = 1.0;
    suite.launched("bias_activation", bias_activation(p, nullptr));
    for (int64_t i = 0; i < 64; ++i) {
      suite.expect(std::isnan(as_double(z(i))) == (i % 3 == 0), "activation %d, element %d", static_cast<int>(a),
                   static_cast<int>(i));
    }
  }
}

// ---- activation_grad ------------------------------------------------------------------------
struct GradCase {
  Extents extents;
  Layout grad_output, saved, grad;
  Activation activation;
  int64_t num_samples;
  bool with_grad, with_sums, whole;
};

template <typename T>
struct GradRun {
  using A = acc_t<T>;
  Image<T> grad_output, saved, grad;
  Buffer<A> sums;

  GradRun(Suite& suite, const GradCase& c)
      : grad_output(c.extents, c.grad_output),
        saved(c.extents, c.saved),
        grad(c.extents, c.grad),
        sums(poisoned<A>(c.num_samples * c.extents.K)) {
    grad_output.fill([&](int64_t) {
      return c.whole ? static_cast<double>(suite.random.between(-5, 5)) : suite.random.uniform(-1, 1);
    });
    saved.fill([&](int64_t) {
      return c.whole ? static_cast<double>(suite.random.between(-1, 1)) : suite.random.uniform(-2, 2);
    });
    ActivationGradParams p = {};
    p.rows = c.extents.rows, p.P = c.extents.P, p.Q = c.extents.Q, p.K = c.extents.K;
    p.num_samples = c.num_samples, p.dtype = dtype_of<T>();
    p.grad_output = grad_output.data(), p.grad_output_stride = grad_output.stride;
    p.saved = c.activation == Activation::kLinear ? nullptr : saved.data();
    p.saved_stride = saved.stride;
    p.activation = c.activation, p.activation_param = 0.25;
    p.grad = c.with_grad ? grad.data() : nullptr, p.grad_stride = grad.stride;
    p.grad_bias = c.with_sums ? sums.data() : nullptr;
    Buffer<unsigned char> workspace = poisoned<unsigned char>(static_cast<int64_t>(activation_grad_workspace(p)));
    suite.launched("activation_grad", activation_grad(p, workspace.data(), nullptr));
  }
};

template <typename T>
void check_grad(Suite& suite, const GradCase& c, const std::string& name) {
  using A = acc_t<T>;
  GradRun<T> run(suite, c);
  const auto channels = static_cast<size_t>(c.num_samples * c.extents.K);
  std::vector<double> got, want, bound, sums(channels, 0.0), size(channels, 0.0);
  const int64_t per_draw = c.extents.elements() / c.num_samples;
  for (int64_t i = 0; i < c.extents.elements(); ++i) {
    const auto channel = static_cast<size_t>(i / per_draw * c.extents.K + i % c.extents.K);
    const double slope = slope_of(c.activation, as_double(run.saved(i)), 0.25);
    const double g = as_double(run.grad_output(i)) * slope;
    sums[channel] += g, size[channel] += std::fabs(g) + std::fabs(as_double(run.grad_output(i)));
    got.push_back(as_double(run.grad(i))), want.push_back(g);
    bound.push_back(kTiny<T> + kUlp<T> * std::fabs(g) +
                    (sizeof(A) == 8 ? 1e-14 : 2e-6) * std::fabs(as_double(run.grad_output(i))));
  }
  const double exact = c.whole ? 0.0 : 1.0;
  if (c.with_grad) suite.bounded(name + " grad", got, want, bound, exact);
  if (c.with_sums) {
    suite.bounded(name + " sums", run.sums, sums, size, exact * (sizeof(A) == 8 ? 1e-14 : 1e-6));
  }
  // What lies between the elements is not touched.
  Image<T> around(c.extents, c.grad);
  for (int64_t i = 0; i < c.extents.elements() && c.with_grad; ++i) around(i) = run.grad(i);
  suite.same_bits(name + " around", run.grad.memory, around.memory);
}

template <typename T>
void grad_all(Suite& suite) {
  int turn = 0;
  for (const Extents& extents : images(suite.quick))
    for (Layout layout : kLayouts)
      for (int kind = 0; kind < (suite.quick ? 2 : 3); ++kind) {
        ++turn;
        const auto activation = kind == 0 ? (turn % 2 == 0 ? Activation::kRelu : Activation::kLinear)
                                          : static_cast<Activation>((5 * turn + kind) % kNumActivations);
        const Layout other = kind == 2 ? kLayouts[turn % 5] : layout;
        check_grad<T>(suite,
                      {extents, turn % 11 == 0 ? Layout::kBroadcast : layout, other,
                       kind == 1 ? layout : kLayouts[(turn / 3) % 5], activation, turn % 3 == 0 ? 4 : 1 + turn % 2,
                       turn % 4 != 3, turn % 7 != 6, kind == 0},
                      "image " + std::to_string(turn));
      }
  for (int32_t a = 0; a < kNumActivations; ++a)
    for (Layout layout : {Layout::kNhwc, Layout::kNchw, Layout::kGaps}) {
      if (suite.quick && layout != Layout::kNhwc) continue;
      check_grad<T>(suite, {{2, 4, 4, 16}, layout, layout, layout, static_cast<Activation>(a), 2, true, true, false},
                    "activation " + std::to_string(a));
    }
}

// Enough items for several chunks: exact sums, and the same bits for any number of workers.
void chunks(Suite& suite) {
  if (suite.quick) return;
  for (const Extents& extents : {Extents{6, 13, 31, 3}, Extents{6, 16, 32, 8}, Extents{2, 40, 52, 24}})
    for (Layout layout : {Layout::kNhwc, Layout::kNchw, Layout::kGaps}) {
      const GradCase whole = {extents, layout, layout, layout, Activation::kRelu, 2, true, true, true};
      check_grad<float>(suite, whole, "chunks");
      check_grad<BFloat16>(suite, whole, "chunks bf16");
      GradCase rough = whole;
      rough.whole = false, rough.with_grad = false;
      const Random data = suite.random;
      GradRun<float> first(suite, rough);
#if !defined(__CUDACC__)
      simt::settings().workers = 1;
#endif
      suite.random = data;
      GradRun<float> second(suite, rough);
#if !defined(__CUDACC__)
      simt::settings().workers = 0;
#endif
      suite.same_bits("sums on one worker", first.sums, second.sums);
    }
}

// A masked gradient is zero even where it is infinite; nothing to do is no error.
void corners(Suite& suite) {
  Image<float> grad({1, 1, 2, 4}, Layout::kNhwc), saved = grad, out = grad;
  grad.fill([](int64_t) { return HUGE_VAL; });
  saved.fill([](int64_t i) { return static_cast<double>(i % 2); });
  Buffer<float> sums = poisoned<float>(4);
  ActivationGradParams p = {};
  p.rows = 1, p.P = 1, p.Q = 2, p.K = 4, p.num_samples = 1, p.dtype = Dtype::kFloat32;
  p.grad_output = grad.data(), p.saved = saved.data(), p.grad = out.data();
  p.grad_output_stride = p.saved_stride = p.grad_stride = grad.stride;
  p.activation = Activation::kRelu, p.grad_bias = sums.data();
  Buffer<unsigned char> workspace = poisoned<unsigned char>(static_cast<int64_t>(activation_grad_workspace(p)));
  suite.launched("masked", activation_grad(p, workspace.data(), nullptr));
  suite.exact("masked", sums, std::vector<double>{0, HUGE_VAL, 0, HUGE_VAL});
  poison(sums);
  p.P = 0;
  suite.launched("no pixels", activation_grad(p, workspace.data(), nullptr));
  suite.exact("no pixels", sums, std::vector<double>{0, 0, 0, 0});
  BiasActivationParams b = {};
  b.num_samples = 1;
  suite.expect(bias_activation(b, nullptr) == 0, "nothing to activate");
}

template <typename F>
void for_dtypes(Suite& suite, const char* name, F&& f) {
  suite.group(std::string(name) + ", float32"), f(TypeTag<float>{});
  suite.group(std::string(name) + ", bfloat16"), f(TypeTag<BFloat16>{});
  if (suite.quick) return;
  suite.group(std::string(name) + ", float16"), f(TypeTag<Half>{});
  suite.group(std::string(name) + ", float64"), f(TypeTag<double>{});
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  for_dtypes(suite, "bias and activation", [&](auto tag) { bias_all<typename decltype(tag)::type>(suite); });
  for_dtypes(suite, "NaN", [&](auto tag) { nan_through<typename decltype(tag)::type>(suite); });
  for_dtypes(suite, "gradient and sums", [&](auto tag) { grad_all<typename decltype(tag)::type>(suite); });
  suite.group("chunks"), chunks(suite);
  suite.group("corners"), corners(suite);
  return suite.finish();
}
