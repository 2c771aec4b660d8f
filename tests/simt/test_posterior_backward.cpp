// The kernels of csrc/cuda/posterior_backward.cu against float64 fed the same noise; sums of whole
// numbers exactly; lists bit for bit against their entries alone.
#include "cuda/posterior_backward.cu"
#include "posterior_subject.h"

namespace {

using namespace fbc;
using namespace fbc::cuda;
using namespace fbc::test;

struct BackwardCase {
  Layout grad, out;
  int64_t num_samples, slabs;
  bool with_eps_sums, with_kl, with_prior;
};

template <typename T, typename Grad>
struct BackwardRun {
  Subject<T>& subject;
  BackwardCase c;
  Tensor<Grad> grad, grad_eps;
  Tensor<T> loc, rho, prior_loc, prior_scale;
  Buffer<T> grad_kl;

  BackwardRun(Subject<T>& of, BackwardCase which, test::Random& random)
      : subject(of),
        c(which),
        grad(of.shape, c.grad, c.slabs * c.num_samples),
        grad_eps(of.shape, c.grad, c.slabs * c.num_samples),
        loc(of.shape, c.out),
        rho(of.shape, c.out),
        prior_loc(of.shape, c.out),
        prior_scale(of.shape, c.out),
        grad_kl(1) {
    grad.fill(-1, 1, random, c.slabs * c.num_samples);
    grad_eps.fill(-1, 1, random, c.slabs * c.num_samples);
    grad_kl[0] = T(0.375);
  }
  PosteriorGradEntry<T> entry() {
    PosteriorGradEntry<T> e = {};
    e.posterior = subject.params;
    e.seed = subject.params.rho != nullptr && !c.with_eps_sums ? subject.seed.data() : nullptr;
    e.grad_weight = grad.data(), e.grad_dtype = dtype_of<Grad>(), e.grad_stride = grad.stride;
    e.grad_slab_stride = grad.span, e.grad_sample_stride = c.slabs * grad.span;
    e.num_samples = c.num_samples, e.slabs = c.slabs;
    e.grad_weight_eps = c.with_eps_sums ? grad_eps.data() : nullptr;
    e.grad_kl = c.with_kl ? grad_kl.data() : nullptr;
    e.grad_loc = loc.data(), e.grad_loc_stride = loc.stride;
    e.grad_rho = rho.data(), e.grad_rho_stride = rho.stride;
    if (c.with_prior) {
      e.grad_prior_loc = prior_loc.data(), e.grad_prior_loc_stride = prior_loc.stride;
      e.grad_prior_scale = prior_scale.data(), e.grad_prior_scale_stride = prior_scale.stride;
    }
    return e;
  }
  void check(Suite& suite, const std::string& name);
};

template <typename T, typename Grad>
void BackwardRun<T, Grad>::check(Suite& suite, const std::string& name) {
  const auto n = static_cast<size_t>(subject.shape.elements());
  std::vector<double> got[4], want[4], bound[4];
  for (int i = 0; i < 4; ++i) got[i].resize(n), want[i].resize(n), bound[i].resize(n);
  const double kl = c.with_kl ? 0.375 : 0.0;
  for (size_t i = 0; i < n; ++i) {
    const auto e = static_cast<int64_t>(i);
    double by_loc = 0, by_scale = 0, size = 0, t;
    for (int64_t j = 0; j < c.num_samples * c.slabs; ++j) {
      const double g = test::as_double(grad(e, j));
      const double eps = c.with_eps_sums ? 0.0 : subject.eps(e, j / c.slabs);
      const double g_eps = c.with_eps_sums ? test::as_double(grad_eps(e, j)) : g * eps;
      by_loc += g, by_scale += g_eps, size += std::fabs(g) + std::fabs(g_eps);
    }
    const double l = static_cast<double>(subject.loc(e)), r = static_cast<double>(subject.rho(e));
    const double floor = static_cast<double>(subject.params.scale_floor);
    const double inverse = 1.0 / subject.prior_scale_of(e), center = subject.prior_loc_of(e);
    const double scale = scale_from_rho(r, floor, &t);
    const auto g = posterior_grad(by_loc, by_scale, kl, l, r, center, inverse, floor);
    const auto p = kl_prior_grad(kl, l, scale, center, inverse);
    const double numbers[4] = {g.loc, g.rho, p.loc, p.scale};
    Tensor<T>* const tensors[4] = {&loc, &rho, &prior_loc, &prior_scale};
    for (int j = 0; j < 4; ++j) {
      want[j][i] = numbers[j], got[j][i] = static_cast<double>((*tensors[j])(e));
      bound[j][i] = size + std::fabs(kl) * (1 + 1 / scale + 20 * inverse * inverse * inverse);
    }
  }
  const double relative = sizeof(T) == 8 ? 1e-14 : 1e-6;
  suite.bounded(name + " loc", got[0], want[0], bound[0], relative);
  suite.bounded(name + " rho", got[1], want[1], bound[1], relative);
  if (!c.with_prior) return;
  suite.bounded(name + " prior_loc", got[2], want[2], bound[2], relative);
  suite.bounded(name + " prior_scale", got[3], want[3], bound[3], relative);
}

template <typename T, typename Grad>
void backward_layouts(Suite& suite, const std::vector<Shape>& shapes) {
  int turn = 0;
  for (const Shape& shape : shapes)
    for (Layout layout : kLayouts) {
      ++turn;
      const BackwardCase c = {kLayouts[turn % 4],
                              turn % 3 == 0 ? Layout::kKrsc : layout,
                              turn % 5 == 1 ? 1 : 1 + turn % 3,
                              turn % 2 == 0 ? 1 : 1 + turn % 4,
                              turn % 5 == 1,
                              turn % 4 != 2,
                              turn % 7 < 3};
      Subject<T> subject(shape, layout, static_cast<Prior>(turn % 3),
                         static_cast<uint64_t>(turn % 3 == 1 ? turn : 4 * turn), suite.random);
      BackwardRun<T, Grad> run(subject, c, suite.random);
      const PosteriorGradEntry<T> entry = run.entry();
      suite.launched("backward", posterior_backward(&entry, 1, nullptr));
      run.check(suite,
                "K" + std::to_string(shape.K) + " C" + std::to_string(shape.C) + " turn " + std::to_string(turn));
    }
}

void backward_lists(Suite& suite) {
  using Run = BackwardRun<float, float>;
  for (int count : {3, suite.quick ? 4 : kLargeTable + 2}) {
    std::vector<std::unique_ptr<Subject<float>>> subjects;
    std::vector<std::unique_ptr<Run>> together, alone;
    std::vector<PosteriorGradEntry<float>> entries;
    for (int i = 0; i < count; ++i) {
      const Shape shape = i == 2 ? Shape{23, 3, 3, 12} : Shape{1 + i % 5, 1 + i % 2, 3, 1 + i % 7};
      subjects.push_back(std::make_unique<Subject<float>>(shape, kLayouts[i % 4], Prior::kNumbers,
                                                          static_cast<uint64_t>(i), suite.random));
      const BackwardCase c = {Layout::kKrsc, Layout::kKrsc, 1 + i % 2, 1 + i % 3, false, true, false};
      test::Random data(static_cast<uint64_t>(i)), again(static_cast<uint64_t>(i));
      together.push_back(std::make_unique<Run>(*subjects.back(), c, data));
      alone.push_back(std::make_unique<Run>(*subjects.back(), c, again));
      entries.push_back(together.back()->entry());
    }
    suite.launched("list", posterior_backward(entries.data(), count, nullptr));
    for (int i = 0; i < count; ++i) {
      Run& a = *together[static_cast<size_t>(i)];
      Run& b = *alone[static_cast<size_t>(i)];
      const PosteriorGradEntry<float> entry = b.entry();
      suite.launched("alone", posterior_backward(&entry, 1, nullptr));
      suite.same_bits("loc", a.loc.memory, b.loc.memory);
      suite.same_bits("rho", a.rho.memory, b.rho.memory);
      a.check(suite, "entry " + std::to_string(i));
    }
  }
}

// A point mass sums the gradients; what is not wanted is not written, what is not given not read.
void backward_corners(Suite& suite) {
  for (Layout layout : kLayouts) {
    Subject<float> subject({3, 3, 3, 8}, layout, Prior::kNumbers, 0, suite.random);
    subject.params.rho = nullptr;
    BackwardRun<float, BFloat16> run(subject, {layout, layout, 2, 3, false, true, false}, suite.random);
    run.grad.fill_integers(8, suite.random, 6);
    PosteriorGradEntry<float> entry = run.entry();
    suite.launched("point mass", posterior_backward(&entry, 1, nullptr));
    Tensor<float> want(subject.shape, layout), untouched(subject.shape, layout);
    for (int64_t e = 0; e < subject.shape.elements(); ++e) {
      want(e) = 0;
      for (int64_t j = 0; j < 6; ++j) want(e) += static_cast<float>(test::as_double(run.grad(e, j)));
    }
    suite.same_bits("point mass", run.loc.memory, want.memory);
    suite.same_bits("no rho", run.rho.memory, untouched.memory);
  }
  Subject<float> subject({3, 3, 3, 8}, Layout::kKrsc, Prior::kNumbers, 0, suite.random);
  BackwardRun<float, float> run(subject, {Layout::kKrsc, Layout::kKrsc, 1, 1, false, true, true}, suite.random);
  PosteriorGradEntry<float> entry = run.entry();
  entry.grad_weight = nullptr;  // only the KL
  entry.seed = nullptr;
  for (float& g : run.grad.memory) g = 0;
  suite.launched("only the KL", posterior_backward(&entry, 1, nullptr));
  run.check(suite, "only the KL");
  entry.grad_loc = entry.grad_rho = entry.grad_prior_loc = entry.grad_prior_scale = nullptr;
  suite.launched("nothing wanted", posterior_backward(&entry, 1, nullptr));
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  const std::vector<Shape> shapes = shapes_for(suite.quick);
  suite.group("gradients, float32"), backward_layouts<float, float>(suite, shapes);
  suite.group("gradients from bfloat16"), backward_layouts<float, BFloat16>(suite, shapes);
  suite.group("gradients from float16"), backward_layouts<float, Half>(suite, shapes);
  suite.group("gradients, float64"), backward_layouts<double, double>(suite, shapes);
  suite.group("gradients of lists"), backward_lists(suite);
  suite.group("gradient corners"), backward_corners(suite);
  return suite.finish();
}
