// What one block of dgrad (dgrad_kernel.cuh) reads: the taps of a phase, the gradient and the
// weights of a step.
#pragma once

#include "conv_tile.cuh"
#include "gather.cuh"
#include "weight_tile.cuh"

namespace fbc::cuda {

struct DgradArgs {
  const void* grad;
  const void* weight;  // (num_samples, K, R, S, C) of a group, dense; null: sampled by the block
  void* grad_input;
  ImageStrides grad_stride, input_stride;
  ConvGeometry shape;  // its rows: per draw
  WeightSampler sampler;
  int32_t tap_step_h, tap_step_w;      // between taps of one phase: stride / gcd(stride, dilation)
  int32_t phases_w, phases;            // along w, and all
  int32_t channel_tiles, pixel_tiles;  // of a group, of the largest phase
  int32_t tile_draws;                  // draws with tiles of their own: 1 with share_input
  int32_t pack;                        // output_pack()
  bool grad_aligned, weight_aligned;
};

using DgradTile = ConvTile<128, 64, 2, 2, 3>;

// One direction of a phase: the pixels h = first + stride * i read outputs p = i + shift + tap *
// step through tap number `tap`, which is row r = r0 + tap * tap_step of the filter.
struct PhaseAxis {
  int32_t extent;    // pixels of the phase
  int32_t r0, taps;  // taps is 0 where no output reads the phase
  int32_t shift, step;

  FBC_DEVICE PhaseAxis(int32_t first, int32_t pixels, int32_t stride, int32_t pad, int32_t dilation,
                       int32_t filter, int32_t tap_step) {
    extent = (pixels - first + stride - 1) / stride;
    r0 = 0;
    while (r0 < tap_step && (first + pad - r0 * dilation) % stride != 0) ++r0;
    taps = r0 < tap_step && r0 < filter ? (filter - r0 + tap_step - 1) / tap_step : 0;
    shift = (first + pad - r0 * dilation) / stride;  // exact where taps > 0
    step = -(tap_step * dilation / stride);
  }
};

// The reduction of a phase runs over (tap along h, tap along w, filter of the group): a Tap
// (conv_geometry.cuh) whose digits are these, in a geometry that has R, S taps and C filters.
struct Phase {
  PhaseAxis h, w;
  int32_t first_h, first_w;
  ConvGeometry taps;
  int32_t depth;  // taps * filters

  FBC_DEVICE Phase(const DgradArgs& a, int32_t number)
      : h(number / a.phases_w, a.shape.H, a.shape.stride_h, a.shape.pad_top, a.shape.dilation_h,
          a.shape.R, a.tap_step_h),
        w(number % a.phases_w, a.shape.W, a.shape.stride_w, a.shape.pad_left, a.shape.dilation_w,
          a.shape.S, a.tap_step_w),
        first_h(number / a.phases_w),
        first_w(number % a.phases_w),
        taps(a.shape) {
    taps.C = a.shape.K;
    taps.R = w.taps > 0 ? h.taps : 0;
    taps.S = w.taps > 0 ? w.taps : 1;
    depth = taps.R * taps.S * taps.C;
  }
};

// The same for all threads, so it lies in shared memory rather than in everybody's registers.
struct DgradShared {
  ConvShared<DgradTile> tile;
  Phase phase;
  Tap grad_step,
      weight_step;  // kDepth, and the rows of weights between two of one thread, as digits
};

// Pixels of a tile: where they lie in the gradient (as if the taps' shifts were 0) and in the
// result.
FBC_DEVICE void dgrad_locate(const DgradArgs& a, const Phase& phase, int32_t first,
                             int64_t row_base, ConvShared<DgradTile>& shared) {
  const int32_t plane = phase.h.extent * phase.w.extent;
  for (int i = static_cast<int>(threadIdx.x); i < DgradTile::kPixels; i += DgradTile::kThreads) {
    const int32_t m = first + i, n = m / plane;
    if (n >= a.shape.rows) {
      shared.rows[i] = {0, kNoPixel, 0};
      shared.out[i] = kNoOutput;
      continue;
    }
    const int32_t y = (m - n * plane) / phase.w.extent, x = m - n * plane - y * phase.w.extent;
    const int64_t h = phase.first_h + int64_t{y} * a.shape.stride_h;
    const int64_t w = phase.first_w + int64_t{x} * a.shape.stride_w;
    shared.rows[i] = {n * a.grad_stride.n + y * a.grad_stride.h + x * a.grad_stride.w, y, x};
    shared.out[i] = (row_base + n) * a.input_stride.n + h * a.input_stride.h + w * a.input_stride.w;
  }
}

// Address of the gradient that meets this tap at this pixel; null: a zero.
template <typename T>
FBC_DEVICE const T* dgrad_source(const DgradArgs& a, const Phase& phase, const T* grad,
                                 const PixelRow& row, const Tap& at) {
  const int32_t dp = phase.h.shift + at.r * phase.h.step, dq = phase.w.shift + at.s * phase.w.step;
  const bool inside = at.r < phase.taps.R &&
                      static_cast<uint32_t>(row.h + dp) < static_cast<uint32_t>(a.shape.P) &&
                      static_cast<uint32_t>(row.w + dq) < static_cast<uint32_t>(a.shape.Q);
  return inside ? grad + row.offset + dp * a.grad_stride.h + dq * a.grad_stride.w + at.c : nullptr;
}

// A stage's gradient: rows of 64 bytes, a thread loads chunk threadIdx.x % 4 of every 32nd row.
// `grad`: channel 0 of the group, row 0 of the draw. `tap`: of this thread's chunk.
template <typename T, bool kAligned>
FBC_DEVICE void dgrad_load_grad(const DgradArgs& a, const Phase& phase, const T* grad,
                                const Tap& tap, const ConvShared<DgradTile>& shared,
                                unsigned char* stage) {
  constexpr int kRowStep = DgradTile::kThreads / kRowChunks;
  const int thread = static_cast<int>(threadIdx.x);
  FBC_UNROLL
  for (int i = 0; i < DgradTile::kPixels / kRowStep; ++i) {
    const int row = thread / kRowChunks + i * kRowStep;
    unsigned char* to = stage + chunk_offset<kRowChunks>(row, thread % kRowChunks);
    const PixelRow pixel = shared.rows[row];
    if (kAligned || a.grad_aligned) {
      const T* from = dgrad_source(a, phase, grad, pixel, tap);
      gpu::copy_async<16>(to, from != nullptr ? from : grad, from != nullptr);
    } else {
      Tap next = tap;
      gather_chunk(to, grad, [&]() -> const T* {
        const T* from = dgrad_source(a, phase, grad, pixel, next);
        next_column(next, phase.taps);
        return from;
      });
    }
  }
}

// A stage's weights: kDepth rows of 64 channels, row t is filter and tap t of the step. A thread
// has kWidth channels of kRowsEach rows.
template <typename T, int kWidth>
struct WeightRows {
  static constexpr int kChunks = DgradTile::kChannels / kChunkElements<T>;
  static constexpr int kPerRow = DgradTile::kChannels / kWidth;
  static constexpr int kRowStep = DgradTile::kThreads / kPerRow;
  static constexpr int kRowsEach = kDepth<T> / kRowStep;

  static FBC_DEVICE int row() { return static_cast<int>(threadIdx.x) / kPerRow; }
  static FBC_DEVICE int channel() { return static_cast<int>(threadIdx.x) % kPerRow * kWidth; }
};

// The filter tap that a Tap of the phase is, as r * S + s.
FBC_DEVICE int32_t filter_tap(const DgradArgs& a, const Phase& phase, const Tap& at) {
  return (phase.h.r0 + at.r * a.tap_step_h) * a.shape.S + phase.w.r0 + at.s * a.tap_step_w;
}

// kGiven. `weight`: of the draw and group. `tap`: of this thread's first row.
template <typename T, bool kAligned>
FBC_DEVICE void dgrad_load_weight(const DgradArgs& a, const Phase& phase, const T* weight,
                                  int32_t first_channel, Tap tap, const Tap& row_step,
                                  unsigned char* stage) {
  using Rows = WeightRows<T, kChunkElements<T>>;
  const int32_t channel = first_channel + Rows::channel();
  FBC_UNROLL
  for (int i = 0; i < Rows::kRowsEach; ++i) {
    const int row = Rows::row() + i * Rows::kRowStep;
    unsigned char* to =
        stage + DgradTile::kWeights + tile_offset<T, Rows::kChunks>(row, Rows::channel());
    const bool inside = tap.r < phase.taps.R;
    const int64_t at = int64_t{tap.c} * a.shape.columns + filter_tap(a, phase, tap) * a.shape.C;
    if (kAligned || a.weight_aligned) {
      const bool valid = inside && channel < a.shape.C;
      gpu::copy_async<16>(to, valid ? weight + at + channel : weight, valid);
    } else {
      int32_t c = channel;
      gather_chunk(to, weight, [&]() -> const T* {
        const T* from = inside && c < a.shape.C ? weight + at + c : nullptr;
        ++c;
        return from;
      });
    }
    advance_tap(tap, row_step, phase.taps);
  }
}

// kPrivate: the same rows, drawn from their addresses. `first_filter`: of the group.
template <typename T>
FBC_DEVICE void dgrad_sample_weight(const DgradArgs& a, const Phase& phase, NoiseKey key,
                                    int32_t first_filter, int32_t first_channel, Tap tap,
                                    const Tap& row_step, unsigned char* stage) {
  using Rows = WeightRows<T, 4>;
  const int32_t channel = first_channel + Rows::channel();
  for (int i = 0; i < Rows::kRowsEach; ++i) {
    float value[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (tap.r < phase.taps.R && channel < a.shape.C) {
      const int32_t k = first_filter + tap.c, column = filter_tap(a, phase, tap) * a.shape.C;
      const WeightQuad quad = load_weight_quad(a.sampler, k, column + channel, column + a.shape.C);
      draw_weight_quad(a.sampler, quad, key, k, column + channel, value);
    }
    store_weight_quad(reinterpret_cast<T*>(stage + DgradTile::kWeights +
                                           tile_offset<T, Rows::kChunks>(
                                               Rows::row() + i * Rows::kRowStep, Rows::channel())),
                      value);
    advance_tap(tap, row_step, phase.taps);
  }
}

}  // namespace fbc::cuda
