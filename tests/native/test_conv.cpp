// fprop, dgrad and wgrad against plain loops, exactly: integer-valued data small enough that every sum is
// exact in float32, so any order of summation gives the same bits. Random shapes, strides of every kind,
// one and several pieces.
#include <cstring>
#include <memory>

#include "harness.h"

using namespace fbc;
using harness::Random;

namespace {

struct Problem {
  ConvShape s;
  int64_t rows() const { return s.output_rows(); }
  int64_t weight_elements() const { return s.K * s.R * s.S * s.channels_per_group(); }
};

bool random_problem(Random& random, Problem* out) {
  ConvShape s = {};
  const int64_t channel_choices[] = {1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 70};
  s.groups = random.below(4) == 0 ? random.between(2, 3) : 1;
  s.C = channel_choices[random.below(s.groups > 1 ? 6 : 13)] * s.groups;
  s.K = channel_choices[random.below(s.groups > 1 ? 6 : 13)] * s.groups;
  s.R = random.between(1, 4), s.S = random.between(1, 4);
  s.H = random.between(1, 12), s.W = random.between(1, 14);
  s.stride_h = random.between(1, 3), s.stride_w = random.between(1, 3);
  s.dilation_h = random.between(1, 2), s.dilation_w = random.between(1, 2);
  s.pad_top = random.between(0, 3), s.pad_bottom = random.between(0, 3);
  s.pad_left = random.between(0, 3), s.pad_right = random.between(0, 3);
  if (random.below(2) == 0) {  // what Winograd computes
    s.C /= s.groups, s.K /= s.groups, s.groups = 1;
    s.R = s.S = 3;
    s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
  }
  s.num_samples = random.below(3) == 0 ? random.between(2, 3) : 1;
  s.share_input = s.num_samples > 1 && random.below(2) == 0;
  const int64_t per_sample = random.below(6) == 0 ? random.between(6, 14) : random.between(1, 3);
  s.N = s.share_input ? per_sample : per_sample * s.num_samples;
  s.P = output_extent(s.H, s.pad_top, s.pad_bottom, s.R, s.stride_h, s.dilation_h);
  s.Q = output_extent(s.W, s.pad_left, s.pad_right, s.S, s.stride_w, s.dilation_w);
  out->s = s;
  return s.P > 0 && s.Q > 0;
}

// An image tensor with padding around it, in one of three layouts.
template <typename T>
struct Image {
  std::vector<T> data;
  ImageStrides stride;
  T* base;
  Image(Random& random, int64_t N, int64_t H, int64_t W, int64_t C, int layout) {
    const int64_t extra = layout == 2 ? random.between(1, 3) : 0;
    if (layout == 1) {
      stride = {C * H * W, W, 1, H * W};
    } else {
      stride = {H * W * (C + extra), W * (C + extra), C + extra, 1};
    }
    data.assign(static_cast<size_t>(N * stride.n > 0 ? N * stride.n : 1), T(0));
    base = data.data();
  }
  T& at(int64_t n, int64_t h, int64_t w, int64_t c) {
    return base[n * stride.n + h * stride.h + w * stride.w + c * stride.c];
  }
};

template <typename T>
T small_integer(Random& random) {
  return static_cast<T>(random.between(-3, 3));
}

template <typename T>
PosteriorParams<T> point_mass(const Problem& p, const std::vector<T>& weight) {
  PosteriorParams<T> q = {};
  q.K = p.s.K, q.R = p.s.R, q.S = p.s.S, q.C = p.s.channels_per_group();
  q.loc = weight.data();
  q.loc_stride = {q.R * q.S * q.C, q.S * q.C, q.C, 1};
  q.prior_scale_value = T(1);
  return q;
}

template <typename F>
void for_each_product(const ConvShape& s, F&& f) {
  const int64_t c_group = s.channels_per_group(), k_group = s.filters_per_group();
  for (int64_t n = 0; n < s.output_rows(); ++n) {
    const int64_t source = s.share_input ? n % s.N : n;
    for (int64_t p = 0; p < s.P; ++p)
      for (int64_t q = 0; q < s.Q; ++q)
        for (int64_t r = 0; r < s.R; ++r) {
          const int64_t h = p * s.stride_h - s.pad_top + r * s.dilation_h;
          if (h < 0 || h >= s.H) continue;
          for (int64_t t = 0; t < s.S; ++t) {
            const int64_t w = q * s.stride_w - s.pad_left + t * s.dilation_w;
            if (w < 0 || w >= s.W) continue;
            for (int64_t k = 0; k < s.K; ++k)
              for (int64_t c = 0; c < c_group; ++c) {
                f(n, p, q, k, source, h, w, k / k_group * c_group + c,
                  ((k * s.R + r) * s.S + t) * c_group + c);
              }
          }
        }
  }
}

template <typename T>
void check_problem(Random& random, const Problem& problem, bool winograd) {
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
  const ConvKernels<T>& table = winograd ? kernels<T>().winograd2 : kernels<T>().direct;
  FpropParams fprop = {};
  fprop.shape = s, fprop.dtype = fprop.weight_dtype = fprop.output_dtype = dtype;
  fprop.input = input.base, fprop.input_stride = input.stride;
  fprop.output = got.base, fprop.output_stride = got.stride, fprop.bias = bias.data();
  fprop.activation = random.below(2) == 0 ? Activation::kRelu : Activation::kLinear;
  {
    harness::Workspace workspace(table.fprop_workspace(fprop, parallel.threads));
    table.fprop(fprop, posterior, parallel, workspace.data());
  }
  bool same = true;
  for (int64_t n = 0; n < s.output_rows(); ++n)
    for (int64_t p = 0; p < s.P; ++p)
      for (int64_t q = 0; q < s.Q; ++q)
        for (int64_t k = 0; k < s.K; ++k) {
          T z = want.at(n, p, q, k) + bias[static_cast<size_t>(n / per_sample * s.K + k)];
          if (fprop.activation == Activation::kRelu && z < T(0)) z = T(0);
          same = same && z == got.at(n, p, q, k);
        }
  CHECK(same && "fprop");

  DgradParams dgrad = {s, dtype, dtype, {}, grad.data(), got_dx.base, got_dx.stride};
  {
    harness::Workspace workspace(table.dgrad_workspace(dgrad, parallel.threads));
    table.dgrad(dgrad, posterior, parallel, workspace.data());
  }
  same = true;
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t w = 0; w < s.W; ++w)
        for (int64_t c = 0; c < s.C; ++c) same = same && want_dx.at(n, h, w, c) == got_dx.at(n, h, w, c);
  CHECK(same && "dgrad");

  WgradParams wgrad = {s, dtype, input.base, input.stride, false, {}, grad.data()};
  PosteriorGrads<T> grads = {};
  grads.grad_loc = got_dw.data();
  grads.grad_loc_stride = posterior.loc_stride;
  {
    harness::Workspace workspace(table.wgrad_workspace(wgrad, parallel.threads));
    table.wgrad(wgrad, posterior, grads, parallel, workspace.data());
  }
  CHECK(want_dw == got_dw);
  if (harness::failures > 0) {
    std::printf("  %s%s N%" PRId64 " C%" PRId64 " H%" PRId64 " W%" PRId64 " K%" PRId64 " R%" PRId64 " S%" PRId64
                " stride %" PRId64 ",%" PRId64 " pad %" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64
                " dil %" PRId64 ",%" PRId64 " groups %" PRId64 " samples %" PRId64 " share %d layout %d\n",
                winograd ? "winograd " : "", isa_name(current_isa()), s.N, s.C, s.H, s.W, s.K, s.R, s.S, s.stride_h, s.stride_w, s.pad_top,
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
      for (int winograd = 0; winograd <= (winograd_fits(problem.s) ? 1 : 0); ++winograd) {
        if (i % 3 == 0) {
          check_problem<double>(random, problem, winograd == 1);
        } else {
          check_problem<float>(random, problem, winograd == 1);
        }
      }
    }
  }
  return harness::report("conv");
}
