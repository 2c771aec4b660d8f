// Random convolutions with integer data, and plain loops over their products.
#pragma once

#include "harness.h"

namespace harness {

using namespace fbc;

struct Problem {
  ConvShape s;
  int64_t rows() const { return s.output_rows(); }
  int64_t weight_elements() const { return s.K * s.R * s.S * s.channels_per_group(); }
};

inline bool random_problem(Random& random, Problem* out) {
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
  if (random.below(3) == 0) {  // depthwise, with one filter or two for each channel
    const int64_t most[] = {5, 17, 33, 70};
    s.groups = s.C = random.between(2, most[random.below(4)]);
    s.K = random.below(4) == 0 ? 2 * s.C : s.C;
    if (random.below(4) == 0) s.R = random.between(1, 6), s.S = random.between(1, 6);
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

// Few pixels and many weights, so that Winograd draws them in the tasks that multiply them (more than 2 MB of
// packed weights), or only stages its input (`tiles`: more than 2112 pixels, and 8 MB of F(2x2, 3x3), 16 MB of
// F(2x4, 3x3)).
inline Problem large_problem(Random& random, bool tiles) {
  ConvShape s = {};
  s.groups = s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
  s.R = s.S = 3;
  s.C = tiles ? random.between(420, 430) : random.between(185, 220);
  s.K = tiles ? random.between(420, 430) : random.between(185, 220);
  s.H = tiles ? 1 : random.between(1, 5), s.W = tiles ? 2 : random.between(1, 5);
  s.pad_top = s.pad_bottom = s.pad_left = s.pad_right = 1;
  s.num_samples = tiles ? 1 : random.between(1, 2);
  s.share_input = s.num_samples > 1 && random.below(2) == 0;
  s.N = tiles ? 530 : s.num_samples * random.between(1, 2);
  s.P = s.H, s.Q = s.W;
  return {s};
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
    data.assign(static_cast<size_t>(N * stride.n > 0 ? N * stride.n : 1), T{});
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

// The methods that compute a problem, and their names.
inline std::vector<Algorithm> methods_for(const ConvShape& s) {
  if (!winograd_fits(s)) return {Algorithm::kDirect};
  return {Algorithm::kDirect, Algorithm::kWinograd2, Algorithm::kWinograd2x4, Algorithm::kWinograd4};
}
// Whether integers stay integers.
inline bool is_exact(Algorithm method) { return method == Algorithm::kDirect || method == Algorithm::kWinograd2; }
inline const char* method_name(Algorithm method) {
  if (method == Algorithm::kDirect) return "direct";
  if (method == Algorithm::kWinograd2) return "winograd2";
  return method == Algorithm::kWinograd2x4 ? "winograd2x4" : "winograd4";
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
                f(n, p, q, k, source, h, w, k / k_group * c_group + c, ((k * s.R + r) * s.S + t) * c_group + c);
              }
          }
        }
  }
}

}  // namespace harness
