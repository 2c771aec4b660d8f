// What one block of dgrad (dgrad_kernel.cuh) reads: the taps of a phase, the gradient and the
// weights of a step.
#pragma once

#include "conv_tile.cuh"
#include "gather.cuh"
#include "split_sum.cuh"
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
  int32_t tiles;                       // of the launch, with as many blocks each as there are splits
  SplitSum sum;
  int32_t pack;  // output_pack()
  bool grad_aligned, weight_aligned;
};

using DgradTile = ConvTile<128, 64, 2, 2, 3>;

// One direction of a phase: the pixels h = first + stride * i read outputs p = i + shift + tap *
// step through tap number `tap`, which is row r = r0 + tap * tap_step of the filter.
struct PhaseAxis {
  int32_t extent;    // pixels of the phase
  int32_t r0, taps;  // taps is 0 where no output reads the phase
  int32_t shift, step;

  FBC_DEVICE PhaseAxis(int32_t first, int32_t pixels, int32_t stride, int32_t pad, int32_t dilation, int32_t filter,
                       int32_t tap_step) {
    extent = (pixels - first + stride - 1) / stride;
    r0 = 0;
    const int32_t end = tap_step < filter ? tap_step : filter;
    while (r0 < end && (first + pad - r0 * dilation) % stride != 0) ++r0;
    taps = r0 < end ? (filter - r0 + tap_step - 1) / tap_step : 0;
    shift = (first + pad - r0 * dilation) / stride;  // exact where taps > 0
    step = -(dilation / (stride / tap_step));
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
      : h(number / a.phases_w, a.shape.H, a.shape.stride_h, a.shape.pad_top, a.shape.dilation_h, a.shape.R,
          a.tap_step_h),
        w(number % a.phases_w, a.shape.W, a.shape.stride_w, a.shape.pad_left, a.shape.dilation_w, a.shape.S,
          a.tap_step_w),
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
  Tap depth_step;  // kDepth as digits
  Tap row_step;    // what is between two rows that a thread samples
};

// Pixels of a tile: where they lie in the gradient (as if the taps' shifts were 0) and in the
// result.
FBC_DEVICE void dgrad_locate(const DgradArgs& a, const Phase& phase, int32_t first, int64_t row_base,
                             ConvShared<DgradTile>& shared) {
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
FBC_DEVICE const T* dgrad_source(const DgradArgs& a, const Phase& phase, const T* grad, const PixelRow& row,
                                 const Tap& at) {
  const int32_t dp = phase.h.shift + at.r * phase.h.step, dq = phase.w.shift + at.s * phase.w.step;
  const bool inside = at.r < phase.taps.R && static_cast<uint32_t>(row.h + dp) < static_cast<uint32_t>(a.shape.P) &&
                      static_cast<uint32_t>(row.w + dq) < static_cast<uint32_t>(a.shape.Q);
  return inside ? grad + row.offset + dp * a.grad_stride.h + dq * a.grad_stride.w + at.c : nullptr;
}

// A stage's gradient: rows of 64 bytes; a thread copies chunk threadIdx.x % 4 of every 32nd row.
// Where chunks are aligned, their addresses move on by kDepth filters until the tap ends.
template <typename T, bool kAligned>
struct DgradGrad {
  static constexpr int kRowStep = DgradTile::kThreads / kRowChunks;
  static constexpr int kRows = DgradTile::kPixels / kRowStep;
  static_assert(kRowStep % 8 == 0, "the rows of a thread share their swizzle");
  const T* draw;  // channel 0 of the group, row 0 of the draw
  Tap tap;        // of this thread's chunk
  const T* from[kAligned ? kRows : 1];
  uint32_t inside;  // bit i: from[i] is read

  // From row `first` of the reduction on.
  FBC_DEVICE void start(const DgradArgs& a, const DgradShared& shared, int32_t group, int32_t number, int32_t first) {
    draw =
        static_cast<const T*>(a.grad) + int64_t{number} * a.shape.rows * a.grad_stride.n + int64_t{group} * a.shape.K;
    tap = tap_of(first + static_cast<int>(threadIdx.x) % kRowChunks * kChunkElements<T>, shared.phase.taps);
    aim(a, shared);
  }
  FBC_DEVICE void aim(const DgradArgs& a, const DgradShared& shared) {
    if constexpr (kAligned) {
      inside = 0;
      FBC_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int row = static_cast<int>(threadIdx.x) / kRowChunks + i * kRowStep;
        from[i] = dgrad_source(a, shared.phase, draw, shared.tile.rows[row], tap);
        inside |= from[i] != nullptr ? 1u << i : 0u;
      }
    }
  }
  FBC_DEVICE void advance(const DgradArgs& a, const DgradShared& shared) {
    if (kAligned && tap.c + kDepth<T> < shared.phase.taps.C) {
      tap.c += kDepth<T>;
      FBC_UNROLL
      for (int i = 0; i < (kAligned ? kRows : 0); ++i) from[i] += kDepth<T>;
    } else {
      advance_tap(tap, shared.depth_step, shared.phase.taps);
      aim(a, shared);
    }
  }
  FBC_DEVICE void load(const DgradArgs& a, const DgradShared& shared, unsigned char* stage) const {
    const int thread = static_cast<int>(threadIdx.x);
    unsigned char* to = stage + chunk_offset<kRowChunks>(thread / kRowChunks, thread % kRowChunks);
    FBC_UNROLL
    for (int i = 0; i < kRows; ++i, to += kRowStep * kRowBytes) {
      if constexpr (kAligned) {
        gpu::copy_async<16>(to, from[i], (inside >> i & 1u) != 0);
      } else {
        load_row(a, shared, shared.tile.rows[thread / kRowChunks + i * kRowStep], to);
      }
    }
  }
  FBC_DEVICE void load_row(const DgradArgs& a, const DgradShared& shared, const PixelRow& pixel,
                           unsigned char* to) const {
    if (a.grad_aligned) {
      const T* source = dgrad_source(a, shared.phase, draw, pixel, tap);
      gpu::copy_async<16>(to, source, source != nullptr);
      return;
    }
    Tap next = tap;
    gather_chunk(to, draw, [&]() -> const T* {
      const T* source = dgrad_source(a, shared.phase, draw, pixel, next);
      next_column(next, shared.phase.taps);
      return source;
    });
  }
};

// A stage's weights: kDepth rows of 64 channels, row t is filter and tap t of the step. A thread
// has kWidth channels of kRowsEach rows.
template <typename T, int kWidth>
struct WeightRows {
  static constexpr int kChunks = DgradTile::kChannels / kChunkElements<T>;
  static constexpr int kPerRow = DgradTile::kChannels / kWidth;
  static constexpr int kRowStep = DgradTile::kThreads / kPerRow;
  static constexpr int kRowsEach = kDepth<T> / kRowStep;

  static FBC_DEVICE int row(int i) { return static_cast<int>(threadIdx.x) / kPerRow + i * kRowStep; }
  static FBC_DEVICE int channel() { return static_cast<int>(threadIdx.x) % kPerRow * kWidth; }
  static FBC_DEVICE unsigned char* place(unsigned char* stage, int i) {
    return stage + DgradTile::kWeights + tile_offset<T, kChunks>(transposed_row<T>(row(i)), channel());
  }
};

// The filter tap that a Tap of the phase is, as r * S + s.
FBC_DEVICE int32_t filter_tap(const DgradArgs& a, const Phase& phase, const Tap& at) {
  return (phase.h.r0 + at.r * a.tap_step_h) * a.shape.S + phase.w.r0 + at.s * a.tap_step_w;
}

// kGiven: from memory.
template <typename T, bool kAligned>
struct GivenWeight {
  using Rows = WeightRows<T, kChunkElements<T>>;
  const T* draw;  // of the draw and group, at this thread's first channel
  Tap tap[Rows::kRowsEach];
  const T* from[Rows::kRowsEach];
  int32_t channels;  // from the thread's first on

  FBC_DEVICE void start(const DgradArgs& a, const DgradShared& shared, int32_t group, int32_t first_channel,
                        int32_t number, int32_t first) {
    const int64_t filters = (int64_t{number} * a.shape.groups + group) * a.shape.K;
    const int32_t channel = first_channel + Rows::channel();
    draw = static_cast<const T*>(a.weight) + filters * a.shape.columns + channel;
    channels = a.shape.C - channel;
    FBC_UNROLL
    for (int i = 0; i < Rows::kRowsEach; ++i) {
      tap[i] = tap_of(first + Rows::row(i), shared.phase.taps);
      aim(a, shared, i);
    }
  }
  FBC_DEVICE void aim(const DgradArgs& a, const DgradShared& shared, int i) {
    from[i] = draw + int64_t{tap[i].c} * a.shape.columns + int64_t{filter_tap(a, shared.phase, tap[i])} * a.shape.C;
  }
  FBC_DEVICE void advance(const DgradArgs& a, const DgradShared& shared) {
    FBC_UNROLL
    for (int i = 0; i < Rows::kRowsEach; ++i) {
      if (tap[i].c + kDepth<T> < shared.phase.taps.C) {
        tap[i].c += kDepth<T>;
        from[i] += int64_t{kDepth<T>} * a.shape.columns;
      } else {
        advance_tap(tap[i], shared.depth_step, shared.phase.taps);
        aim(a, shared, i);
      }
    }
  }
  FBC_DEVICE void load(const DgradArgs& a, const DgradShared& shared, unsigned char* stage) const {
    FBC_UNROLL
    for (int i = 0; i < Rows::kRowsEach; ++i) {
      const bool inside = tap[i].r < shared.phase.taps.R;
      if (kAligned || a.weight_aligned) {
        gpu::copy_async<16>(Rows::place(stage, i), from[i], inside && channels > 0);
        continue;
      }
      int32_t c = 0;
      gather_chunk(Rows::place(stage, i), static_cast<const T*>(a.weight), [&]() -> const T* {
        const T* source = inside && c < channels ? from[i] + c : nullptr;
        ++c;
        return source;
      });
    }
  }
};

// kPrivate: drawn by the block, from their addresses.
template <typename T>
struct SampledWeight {
  using Rows = WeightRows<T, 4>;
  Tap tap;  // of this thread's first row
  int32_t first_filter, channel, number;

  FBC_DEVICE void start(const DgradArgs& a, const DgradShared& shared, int32_t group, int32_t first_channel,
                        int32_t of_draw, int32_t first) {
    first_filter = group * a.shape.K;
    channel = first_channel + Rows::channel();
    number = of_draw;
    tap = tap_of(first + Rows::row(0), shared.phase.taps);
  }
  FBC_DEVICE void advance(const DgradArgs&, const DgradShared& shared) {
    advance_tap(tap, shared.depth_step, shared.phase.taps);
  }
  FBC_DEVICE void load(const DgradArgs& a, const DgradShared& shared, unsigned char* stage) const {
    const Phase& phase = shared.phase;
    const NoiseKey key = draw_key(a.sampler, number);
    Tap at = tap;
    for (int i = 0; i < Rows::kRowsEach; ++i) {
      float value[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (at.r < phase.taps.R && channel < a.shape.C) {
        const int32_t k = first_filter + at.c, column = filter_tap(a, phase, at) * a.shape.C;
        const WeightQuad quad = load_weight_quad(a.sampler, k, column + channel, column + a.shape.C);
        draw_weight_quad(a.sampler, quad, key, k, column + channel, value);
      }
      store_weight_quad(reinterpret_cast<T*>(Rows::place(stage, i)), value);
      advance_tap(at, shared.row_step, phase.taps);
    }
  }
};

}  // namespace fbc::cuda
