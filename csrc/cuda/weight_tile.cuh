// Sampling weights inside a convolution kernel: four elements of one filter at a time.
//
//   weight[k][column] = round(loc + scale * eps),  column = (r * S + s) * C + c of filter k
//   element number    = element_offset + k * columns + column        (core/noise.h)
//
// The values are those of core/posterior.h, so a weight has the bits that sample() writes,
// whichever kernel makes it. Parameters may have any strides:
//
//   kPacked    dense KRSC, 16-byte aligned, columns % 4 == 0: one 16-byte load a quad
//   kDense     dense KRSC, columns % 4 != 0 or not aligned: element by element
//   kStrided   anything else, KCRS for one: two multiplications and shifts a quad find its tap
//
// Where element numbers of a quad straddle two Philox blocks (columns % 4 != 0) it costs two calls.
//
//   WeightSampler w = weight_sampler(weight, shape)            host
//   NoiseKey key = draw_key(w, draw)                           device
//   WeightQuad q = load_weight_quad(w, k, column, end)         loc and scale; 0 from column `end`
//   on draw_weight_quad(w, q, key, k, column, value)              unrounded; 0 from `end` on
//   store_weight_quad(to, value)                               rounded to T, 8 or 16 bytes
//   kl += kl_of_quad(w, q, k, column)
#pragma once

#include "../core/posterior.h"
#include "divisor.cuh"
#include "index.cuh"
#include "kernels.h"
#include "noise_quad.cuh"

namespace fbc::cuda {

enum class Access : int32_t { kPacked = 0, kDense = 1, kStrided = 2 };

struct ParameterView {
  const float* data;  // null: there is none
  WeightStrides stride;
  int64_t next_s, next_r;  // from the end of a row of channels, of a row of taps, to the next one
  Access access;
};

struct WeightSampler {
  ParameterView loc;
  ParameterView spread;  // rho, or the scale where spread_is_scale; null: a point mass
  ParameterView prior_loc, prior_scale;
  const int64_t* seed;
  uint64_t offset, element_offset;
  Divisor channels, filter_width;  // C of one group, S
  int32_t filters, columns;        // K, R * S * C
  float prior_loc_value, inverse_prior_scale_value, scale_floor;
  Stream stream;
  bool spread_is_scale;

  FBC_INLINE bool is_point() const { return spread.data == nullptr; }
};

// NaN where a prior's scale is not positive, which no divergence has: it must show.
FBC_INLINE float inverse_of_prior_scale(float scale) { return scale > 0.0f ? 1.0f / scale : __builtin_nanf(""); }

inline ParameterView parameter_view(const float* data, const WeightStrides& stride, int64_t K, int64_t R, int64_t S,
                                    int64_t C) {
  const auto steps = [](int64_t extent, int64_t stride_of, int64_t dense) { return extent == 1 || stride_of == dense; };
  const bool dense =
      steps(C, stride.c, 1) && steps(S, stride.s, C) && steps(R, stride.r, S * C) && steps(K, stride.k, R * S * C);
  const bool packed = dense && R * S * C % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data, stride, stride.s - C * stride.c, stride.r - S * stride.s,
          packed  ? Access::kPacked
          : dense ? Access::kDense
                  : Access::kStrided};
}

inline WeightSampler weight_sampler(const ConvWeight& weight, const ConvShape& shape) {
  const PosteriorParams<float>& p = weight.posterior;
  const int64_t K = shape.K, R = shape.R, S = shape.S, C = shape.channels_per_group();
  const auto view = [&](const float* data, const WeightStrides& stride) {
    return parameter_view(data, stride, K, R, S, C);
  };
  WeightSampler w = {};
  w.loc = view(p.loc, p.loc_stride);
  w.spread_is_scale = weight.scale != nullptr && p.rho != nullptr;
  w.spread = w.spread_is_scale ? view(weight.scale, {R * S * C, S * C, C, 1}) : view(p.rho, p.rho_stride);
  w.prior_loc = view(p.prior_loc, p.prior_loc_stride);
  w.prior_scale = view(p.prior_scale, p.prior_scale_stride);
  w.seed = weight.seed;
  w.offset = p.noise.offset;
  w.element_offset = p.element_offset;
  w.channels = divisor(C);
  w.filter_width = divisor(S);
  w.filters = static_cast<int32_t>(K);
  w.columns = static_cast<int32_t>(R * S * C);
  w.prior_loc_value = p.prior_loc_value;
  w.inverse_prior_scale_value = inverse_of_prior_scale(p.prior_scale_value);
  w.scale_floor = p.scale_floor;
  w.stream = p.stream;
  return w;
}

// ---- device -------------------------------------------------------------------------------------
FBC_DEVICE NoiseKey draw_key(const WeightSampler& w, int32_t draw) {
  if (w.is_point()) return {0, 0};
  return {static_cast<uint64_t>(w.seed[0]), static_cast<uint64_t>(w.seed[1]) + w.offset + static_cast<uint64_t>(draw)};
}

// Elements [column, column + count) of filter k, count <= 4.
FBC_DEVICE void load_parameters(const ParameterView& view, const WeightSampler& w, int32_t k, int32_t column,
                                int32_t count, float (&value)[4]) {
  const float* dense = view.data + static_cast<int64_t>(k) * w.columns + column;
  if (view.access == Access::kPacked && count == 4 && (column & 3) == 0) {
    load_pack(dense, value);
  } else if (view.access != Access::kStrided) {
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) value[i] = i < count ? dense[i] : 0.0f;
  } else {
    const int32_t filter = w.channels.divide(column), r = w.filter_width.divide(filter);
    int32_t c = column - filter * w.channels.value, s = filter - r * w.filter_width.value;
    const float* at = view.data + k * view.stride.k + r * view.stride.r + s * view.stride.s + c * view.stride.c;
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      value[i] = i < count ? *at : 0.0f;
      at += view.stride.c;
      if (++c == w.channels.value) {
        c = 0;
        at += view.next_s;
        if (++s == w.filter_width.value) s = 0, at += view.next_r;
      }
    }
  }
}

struct WeightQuad {
  float loc[4], scale[4];
  int32_t count;  // elements before `end`: the others are 0
};

FBC_DEVICE WeightQuad load_weight_quad(const WeightSampler& w, int32_t k, int32_t column, int32_t end) {
  WeightQuad quad;
  quad.count = end - column < 4 ? end - column : 4;
  load_parameters(w.loc, w, k, column, quad.count, quad.loc);
  if (w.is_point()) {
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) quad.scale[i] = -0.0f;  // -0 * 0 + loc is loc, also where that is -0
    return quad;
  }
  load_parameters(w.spread, w, k, column, quad.count, quad.scale);
  if (!w.spread_is_scale) {
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      float t;
      quad.scale[i] = scale_from_rho(quad.scale[i], w.scale_floor, &t);
    }
  }
  return quad;
}

// eps of four elements; zeros for a point mass.
FBC_DEVICE void draw_eps_quad(const WeightSampler& w, NoiseKey key, int32_t k, int32_t column, float (&eps)[4]) {
  if (w.is_point()) {
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) eps[i] = 0.0f;
    return;
  }
  const int64_t element = static_cast<int64_t>(k) * w.columns + column;
  normal_quad(key, w.stream, w.element_offset + static_cast<uint64_t>(element), eps);
}
FBC_DEVICE void combine_quad(const WeightQuad& quad, const float (&eps)[4], float (&value)[4]) {
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float drawn = weight_from_eps(quad.loc[i], quad.scale[i], eps[i]);
    value[i] = i < quad.count ? drawn : 0.0f;
  }
}
FBC_DEVICE void draw_weight_quad(const WeightSampler& w, const WeightQuad& quad, NoiseKey key, int32_t k,
                                 int32_t column, float (&value)[4]) {
  float eps[4];
  draw_eps_quad(w, key, k, column, eps);
  combine_quad(quad, eps, value);
}

// Rounded once; `to` is aligned to the four elements.
template <typename T>
FBC_DEVICE void store_weight_quad(T* to, const float (&value)[4]) {
  store_pack(to, value);
}

// The divergence of the quad's elements, in order; 0 for a point mass.
FBC_DEVICE float kl_of_quad(const WeightSampler& w, const WeightQuad& quad, int32_t k, int32_t column) {
  if (w.is_point()) return 0.0f;
  float prior_loc[4], inverse[4], sum = 0.0f;
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) {
    prior_loc[i] = w.prior_loc_value;
    inverse[i] = w.inverse_prior_scale_value;
  }
  if (w.prior_loc.data != nullptr) {
    load_parameters(w.prior_loc, w, k, column, quad.count, prior_loc);
  }
  if (w.prior_scale.data != nullptr) {
    load_parameters(w.prior_scale, w, k, column, quad.count, inverse);
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) inverse[i] = inverse_of_prior_scale(inverse[i]);
  }
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float term = kl_normal_normal(quad.loc[i], quad.scale[i], prior_loc[i], inverse[i]);
    if (i < quad.count) sum += term;
  }
  return sum;
}

}  // namespace fbc::cuda
