// Posteriors with their tensors, in several layouts: what the tests of the posterior kernels share.
#pragma once

#include <memory>

#include "check.h"
#include "core/posterior.h"
#include "cuda/kernels.h"

namespace fbc::test {

using namespace fbc::cuda;

struct Shape {
  int64_t K, R, S, C;
  int64_t elements() const { return K * R * S * C; }
};
enum class Layout { kKrsc, kKcrs, kGaps, kOdd, kBroadcast };
constexpr Layout kLayouts[] = {Layout::kKrsc, Layout::kKcrs, Layout::kGaps, Layout::kOdd};

// A (K, R, S, C) tensor in some layout; memory that belongs to no element stays as it was.
template <typename T>
struct Tensor {
  Shape shape;
  WeightStrides stride;
  int64_t base = 0, span = 1;
  Buffer<T> memory;

  Tensor(Shape of, Layout layout, int64_t copies = 1) : shape(of) {
    const auto [K, R, S, C] = of;
    stride = {R * S * C, S * C, C, 1};
    span = of.elements();
    if (layout == Layout::kKcrs) stride = {C * R * S, S, 1, R * S};
    if (layout == Layout::kOdd) base = 1;  // dense, but not aligned
    if (layout == Layout::kGaps) {
      stride = {R * (S * (2 * C + 1) + 3), S * (2 * C + 1) + 3, 2 * C + 1, 2};
      span = K * stride.k;
    }
    if (layout == Layout::kBroadcast) stride = {0, 0, 0, 0}, span = 1;
    memory = poisoned<T>(base + copies * span);
  }
  int64_t at(int64_t e, int64_t copy = 0) const {
    const int64_t c = e % shape.C, s = e / shape.C % shape.S;
    const int64_t r = e / (shape.C * shape.S) % shape.R, k = e / (shape.C * shape.S * shape.R);
    return base + copy * span + k * stride.k + r * stride.r + s * stride.s + c * stride.c;
  }
  T& operator()(int64_t e, int64_t copy = 0) { return memory[static_cast<size_t>(at(e, copy))]; }
  T* data() { return memory.data() + base; }
  void fill(double low, double high, Random& random, int64_t copies = 1) {
    for (int64_t j = 0; j < copies; ++j)
      for (int64_t e = 0; e < shape.elements(); ++e) (*this)(e, j) = from_double<T>(random.uniform(low, high));
  }
  void fill_integers(int64_t bound, Random& random, int64_t copies) {
    for (int64_t j = 0; j < copies; ++j)
      for (int64_t e = 0; e < shape.elements(); ++e)
        (*this)(e, j) = from_double<T>(static_cast<double>(random.between(-bound, bound)));
  }
};

enum class Prior { kNumbers, kTensors, kBroadcast };

// A posterior with its tensors.
template <typename T>
struct Subject {
  Shape shape;
  Tensor<T> loc, rho, prior_loc, prior_scale;
  Buffer<int64_t> seed;
  PosteriorParams<T> params = {};

  Subject(Shape of, Layout layout, Prior prior, uint64_t element_offset, Random& random)
      : shape(of),
        loc(of, layout),
        rho(of, layout),
        prior_loc(of, prior == Prior::kBroadcast ? Layout::kBroadcast : layout),
        prior_scale(of, prior == Prior::kBroadcast ? Layout::kBroadcast : Layout::kKrsc),
        seed(2) {
    loc.fill(-1, 1, random);
    rho.fill(-5, 2, random);
    prior_loc.fill(-0.5, 0.5, random);
    prior_scale.fill(0.5, 2, random);
    seed[0] = static_cast<int64_t>(random.next());
    seed[1] = static_cast<int64_t>(random.next());
    params.K = of.K, params.R = of.R, params.S = of.S, params.C = of.C;
    params.loc = loc.data(), params.loc_stride = loc.stride;
    params.rho = rho.data(), params.rho_stride = rho.stride;
    if (prior != Prior::kNumbers) {
      params.prior_loc = prior_loc.data(), params.prior_loc_stride = prior_loc.stride;
      params.prior_scale = prior_scale.data(), params.prior_scale_stride = prior_scale.stride;
    }
    params.prior_loc_value = T(0.25), params.prior_scale_value = T(0.75);
    params.scale_floor = T(0.001);
    params.noise = {12345, 7};  // the key is to be ignored
    params.stream = Stream::kBias;
    params.element_offset = element_offset;
  }
  double prior_loc_of(int64_t e) { return params.prior_loc != nullptr ? static_cast<double>(prior_loc(e)) : 0.25; }
  double prior_scale_of(int64_t e) {
    return params.prior_scale != nullptr ? static_cast<double>(prior_scale(e)) : 0.75;
  }
  float eps(int64_t e, int64_t sample) const {
    const NoiseKey noise = {static_cast<uint64_t>(seed[0]),
                            static_cast<uint64_t>(seed[1]) + params.noise.offset + static_cast<uint64_t>(sample)};
    return standard_normal(noise, params.stream, params.element_offset + static_cast<uint64_t>(e));
  }
  T weight(int64_t e, int64_t sample) {
    if (params.rho == nullptr) return loc(e);
    T t;
    const T scale = scale_from_rho(rho(e), params.scale_floor, &t);
    return weight_from_eps(loc(e), scale, static_cast<T>(eps(e, sample)));
  }
  double kl() {
    double sum = 0.0;
    for (int64_t e = 0; e < shape.elements() && params.rho != nullptr; ++e) {
      double t;
      const double scale = scale_from_rho(static_cast<double>(rho(e)), static_cast<double>(params.scale_floor), &t);
      sum += kl_normal_normal(static_cast<double>(loc(e)), scale, prior_loc_of(e), 1.0 / prior_scale_of(e));
    }
    return sum;
  }
};

template <typename T>
constexpr Dtype dtype_of() {
  return std::is_same_v<T, double>     ? Dtype::kFloat64
         : std::is_same_v<T, float>    ? Dtype::kFloat32
         : std::is_same_v<T, BFloat16> ? Dtype::kBFloat16
                                       : Dtype::kFloat16;
}

inline std::vector<Shape> shapes_for(bool quick) {
  std::vector<Shape> shapes = {{1, 1, 1, 1}, {1, 1, 1, 3}, {1, 1, 1, 4}, {1, 1, 1, 5},
                               {2, 3, 3, 1}, {5, 3, 3, 3}, {3, 3, 2, 17}};
  if (!quick) {
    for (Shape more :
         {Shape{1, 1, 1, 2047}, {1, 1, 1, 2048}, {1, 1, 1, 2049}, {4, 3, 3, 64}, {7, 1, 1, 12}, {9, 1, 5, 8}})
      shapes.push_back(more);
  }
  return shapes;
}

}  // namespace fbc::test
