// Shapes and data that test_dgrad.cpp and test_wgrad.cpp share.
#pragma once

#include <string>
#include <vector>

#include "check.h"
#include "core/params.h"

namespace fbc::test {

struct GradientCase {
  const char* name;
  int64_t N, C, H, W, K, R, S;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1, num_samples = 1;
  bool share_input = false;
};

inline ConvShape shape_of(const GradientCase& c) {
  ConvShape s{};
  s.N = c.N, s.C = c.C, s.H = c.H, s.W = c.W, s.K = c.K, s.R = c.R, s.S = c.S;
  s.stride_h = c.stride_h, s.stride_w = c.stride_w;
  s.pad_top = c.pad_top, s.pad_bottom = c.pad_bottom;
  s.pad_left = c.pad_left, s.pad_right = c.pad_right;
  s.dilation_h = c.dilation_h, s.dilation_w = c.dilation_w;
  s.groups = c.groups, s.num_samples = c.num_samples, s.share_input = c.share_input;
  s.P = output_extent(c.H, c.pad_top, c.pad_bottom, c.R, c.stride_h, c.dilation_h);
  s.Q = output_extent(c.W, c.pad_left, c.pad_right, c.S, c.stride_w, c.dilation_w);
  return s;
}

// Sizes around the tiles (16, 32, 64, 128), extents of 1, primes; few and odd channels.
inline std::vector<GradientCase> gradient_cases() {
  return {
      {"one element", 1, 1, 1, 1, 1, 1, 1},
      {"1x1 c8 k8", 2, 8, 3, 5, 8, 1, 1},
      {"3x3 c8 k8", 2, 8, 6, 7, 8, 3, 3, 1, 1, 1, 1, 1, 1},
      {"3x3 c16 k64", 1, 16, 8, 8, 64, 3, 3, 1, 1, 1, 1, 1, 1},
      {"3x3 c64 k17", 1, 64, 5, 5, 17, 3, 3, 1, 1, 1, 1, 1, 1},
      {"3x3 c17 k64", 2, 17, 5, 4, 64, 3, 3, 1, 1, 1, 1, 1, 1},
      {"3x3 c72 k72", 1, 72, 4, 5, 72, 3, 3, 1, 1, 1, 1, 1, 1},
      {"1x1 c136 k8", 1, 136, 3, 3, 8, 1, 1},
      {"1x1 c8 k136", 3, 8, 3, 3, 136, 1, 1},
      {"stem c1", 3, 1, 9, 8, 6, 5, 5, 1, 1, 2, 2, 2, 2},
      {"stem c3 stride 2", 2, 3, 11, 12, 16, 7, 7, 2, 2, 3, 3, 3, 3},
      {"c3 k3", 2, 3, 5, 6, 3, 3, 3, 1, 1, 1, 1, 1, 1},
      {"c8 k1", 2, 8, 5, 6, 1, 3, 3, 1, 1, 1, 1, 1, 1},
      {"c1 k8", 2, 1, 5, 6, 8, 3, 3, 1, 1, 1, 1, 1, 1},
      {"stride 2, 3x3", 2, 8, 7, 9, 8, 3, 3, 2, 2, 1, 1, 1, 1},
      {"stride 2, 1x1: unread input", 1, 8, 6, 7, 16, 1, 1, 2, 2},
      {"stride 3 by 1", 1, 8, 10, 5, 8, 2, 3, 3, 1},
      {"stride 2 by 3, 2x2 unread", 2, 16, 9, 11, 8, 2, 2, 2, 3, 1, 0, 0, 1},
      {"stride 4, one row of outputs", 1, 8, 5, 17, 8, 3, 3, 4, 4},
      {"dilation 2", 1, 8, 8, 9, 8, 3, 3, 1, 1, 2, 2, 2, 2, 2, 2},
      {"dilation 3 by 1, stride 2", 1, 8, 11, 7, 8, 3, 2, 2, 2, 3, 0, 0, 1, 3, 1},
      {"dilation 2, stride 2", 2, 8, 9, 10, 8, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2},
      {"dilation 3, stride 6", 1, 8, 14, 13, 8, 3, 3, 6, 6, 2, 2, 2, 2, 3, 3},
      {"asymmetric padding", 2, 8, 5, 4, 8, 3, 4, 1, 1, 0, 2, 3, 1},
      {"padding wider than the image", 1, 8, 2, 3, 8, 3, 3, 1, 1, 4, 5, 6, 3},
      {"filter as large as the image", 3, 8, 4, 5, 8, 4, 5},
      {"filter larger than the image", 2, 8, 2, 2, 8, 5, 5, 1, 1, 2, 2, 2, 2},
      {"row of pixels", 1, 8, 1, 67, 8, 1, 3, 1, 1, 0, 0, 1, 1},
      {"column of pixels", 2, 8, 65, 1, 16, 3, 1, 2, 1, 1, 1},
      {"127 pixels", 127, 8, 1, 1, 8, 1, 1},
      {"128 pixels", 16, 8, 4, 2, 8, 1, 1},
      {"129 pixels", 43, 8, 3, 1, 8, 1, 1},
      {"2 groups", 2, 16, 5, 5, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 2},
      {"3 groups, odd", 2, 9, 5, 4, 15, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1, 3},
      {"depthwise", 2, 8, 6, 5, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 8},
      {"2 draws", 4, 8, 5, 5, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2},
      {"a draw per example", 5, 8, 4, 5, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5},
      {"3 draws, c3 k17", 6, 3, 5, 4, 17, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 3},
      {"2 draws, 2 groups", 4, 16, 4, 4, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2},
      {"3 draws share", 2, 8, 5, 4, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, true},
      {"2 draws share, odd", 2, 5, 5, 6, 7, 3, 2, 2, 1, 1, 1, 0, 1, 1, 1, 1, 2, true},
      {"many pixels", 3, 8, 21, 19, 8, 3, 3, 1, 1, 1, 1, 1, 1},
      {"many pixels, draws", 4, 8, 13, 19, 24, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 2},
  };
}

// An (N, H, W, C) image with gaps: `gap` elements after each pixel and row, `shift` before the
// first, which breaks 16-byte alignment where they are not multiples of it. Gaps are NaN.
template <typename T>
struct Image {
  int64_t n, h, w, c, shift;
  ImageStrides stride;
  Buffer<T> memory;

  Image(int64_t rows, int64_t height, int64_t width, int64_t channels, int64_t gap = 0, int64_t before = 0)
      : n(rows), h(height), w(width), c(channels), shift(before) {
    stride.c = 1;
    stride.w = c + gap;
    stride.h = stride.w * w + gap;
    stride.n = stride.h * h + gap;
    memory = poisoned<T>(shift + stride.n * n);
  }
  T* data() { return memory.data() + shift; }
  T& at(int64_t in, int64_t ih, int64_t iw, int64_t ic) {
    return memory[static_cast<size_t>(shift + in * stride.n + ih * stride.h + iw * stride.w + ic * stride.c)];
  }
  template <typename F>
  void fill(F value) {
    for (int64_t in = 0; in < n; ++in)
      for (int64_t ih = 0; ih < h; ++ih)
        for (int64_t iw = 0; iw < w; ++iw)
          for (int64_t ic = 0; ic < c; ++ic) at(in, ih, iw, ic) = from_double<T>(value());
  }
  // Dense copy in double: (n, h, w, c).
  std::vector<double> values() {
    std::vector<double> out;
    for (int64_t in = 0; in < n; ++in)
      for (int64_t ih = 0; ih < h; ++ih)
        for (int64_t iw = 0; iw < w; ++iw)
          for (int64_t ic = 0; ic < c; ++ic) out.push_back(as_double(at(in, ih, iw, ic)));
    return out;
  }
};

// Calls f(output row, input row, draw, p, q, k, r, s, c of the group, h, w) for every product of
// the convolution; k counts all filters, the input channel is k / (K/G) * (C/G) + c.
struct Product {
  int64_t row, n, draw, p, q, k, r, s, c, h, w, channel;
};
template <typename F>
void for_each_product(const ConvShape& s, F f) {
  const int64_t group_c = s.channels_per_group(), group_k = s.filters_per_group();
  for (int64_t row = 0; row < s.output_rows(); ++row) {
    const int64_t draw = row / s.rows_per_sample(), n = s.share_input ? row % s.N : row;
    for (int64_t p = 0; p < s.P; ++p) {
      for (int64_t q = 0; q < s.Q; ++q) {
        for (int64_t tap = 0; tap < s.R * s.S; ++tap) {
          const int64_t r = tap / s.S, t = tap % s.S;
          const int64_t h = p * s.stride_h - s.pad_top + r * s.dilation_h;
          const int64_t w = q * s.stride_w - s.pad_left + t * s.dilation_w;
          if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
          for (int64_t k = 0; k < s.K; ++k) {
            for (int64_t c = 0; c < group_c; ++c) {
              f(Product{row, n, draw, p, q, k, r, t, c, h, w, k / group_k * group_c + c});
            }
          }
        }
      }
    }
  }
}

}  // namespace fbc::test
