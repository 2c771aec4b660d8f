// What one block of wgrad (wgrad_kernel.cuh) reads: the pixels of a step, and where they lie.
#pragma once

#include "conv_geometry.cuh"
#include "divisor.cuh"
#include "gather.cuh"
#include "gpu.cuh"
#include "mma.cuh"

namespace fbc::cuda {

struct WgradArgs {
  const void* input;
  const void* grad;
  float* slabs;
  float* slabs_eps;
  const int64_t* seed;
  ImageStrides input_stride, grad_stride;
  ConvGeometry shape;  // its rows: of grad, per draw
  int64_t steps;       // of all draws together; a step is kDepth pixels of one draw
  int32_t steps_per_draw;
  int32_t slab_count, filter_tiles, column_tiles;
  bool input_aligned, grad_aligned;
  Divisor by_pixels, by_q;  // P*Q and Q
  NoiseKey noise;           // of draw 0, without the seed
  Stream stream;
  uint64_t element_offset;
};

// Rows are pixels. Every row of a stage holds kFilters of grad and kColumns of the gathered input.
template <typename T, bool kDraws, bool kAligned>
struct WgradTile {
  static constexpr int kThreads = kDraws && kAligned ? 256 : 128;
  static constexpr int kBlocks =
      kDraws && kAligned ? 2 : 3;  // on a multiprocessor: 128, 168 registers
  static constexpr int kFilters = kDraws && !kAligned ? 32 : 64;
  static constexpr int kColumns = kAligned && !kDraws && sizeof(T) == 2 ? 128 : 64;
  static constexpr int kDepth = 2 * kMmaDepth<T>;
  static constexpr int kGradChunks = kFilters / kChunkElements<T>;
  static constexpr int kInputChunks = kColumns / kChunkElements<T>;
  static constexpr int kGradBytes = kDepth * kGradChunks * 16;
  static constexpr int kStageBytes = kGradBytes + kDepth * kInputChunks * 16;
  static constexpr int kStages = 3;
  // A thread loads chunk threadIdx.x % kInputChunks of rows threadIdx.x / kInputChunks + i *
  // kRowsPerPass. Where a row has fewer chunks of grad, each thread loads those of some passes.
  static constexpr int kRowsPerPass = kThreads / kInputChunks;
  static constexpr int kPasses = kDepth / kRowsPerPass;
  static constexpr int kGradParts = kInputChunks / kGradChunks;
  // Two warps along the columns, two or four along the filters.
  static constexpr int kTall = kDraws ? 1 : 2;      // m16 tiles of a warp
  static constexpr int kPairs = kColumns / 2 / 16;  // pairs of n8 tiles of a warp
};

// The first pixel of the step to be loaded next.
struct PixelWalk {
  int32_t draw, steps_left;  // of this draw
  int32_t n, rest;           // pixel n * P * Q + rest of the draw

  FBC_DEVICE PixelWalk(const WgradArgs& a, int64_t step, int depth) {
    draw = static_cast<int32_t>(step / a.steps_per_draw);
    const int32_t in_draw = static_cast<int32_t>(step - int64_t{draw} * a.steps_per_draw);
    steps_left = a.steps_per_draw - in_draw;
    const int64_t pixel = int64_t{in_draw} * depth;
    n = static_cast<int32_t>(pixel / a.by_pixels.value);
    rest = static_cast<int32_t>(pixel - static_cast<int64_t>(n) * a.by_pixels.value);
  }
  FBC_DEVICE void advance(const WgradArgs& a, int depth) {
    if (--steps_left == 0) {
      ++draw;
      steps_left = a.steps_per_draw;
      n = 0;
      rest = 0;
    } else {
      rest += depth;
      const int32_t images = a.by_pixels.divide(rest);
      n += images;
      rest -= images * a.by_pixels.value;
    }
  }
};

// One pixel of a step: its output, and the corner of its window in the input.
template <typename T>
struct WgradPixel {
  const T* grad;   // of filter 0 of the group
  const T* input;  // of channel 0 of the group at row 0, column 0 of the image
  int32_t h, w;    // of tap (0, 0)
  bool valid;
};
template <typename T>
FBC_DEVICE WgradPixel<T> wgrad_pixel(const WgradArgs& a, const PixelWalk& at, int row, int group) {
  const int32_t y = at.rest + row;
  const int32_t images = a.by_pixels.divide(y);
  const int32_t pixel = y - images * a.by_pixels.value;
  const int32_t p = a.by_q.divide(pixel), q = pixel - p * a.by_q.value;
  const int32_t n = at.n + images;
  const int64_t grad_row = int64_t{at.draw} * a.shape.rows + n;
  WgradPixel<T> out;
  out.valid = n < a.shape.rows;
  out.grad = static_cast<const T*>(a.grad) + grad_row * a.grad_stride.n + p * a.grad_stride.h +
             q * a.grad_stride.w + static_cast<int64_t>(group) * a.shape.K;
  out.input = static_cast<const T*>(a.input) +
              (a.shape.share_input ? n : grad_row) * a.input_stride.n +
              static_cast<int64_t>(group) * a.shape.C;
  out.h = p * a.shape.stride_h - a.shape.pad_top;
  out.w = q * a.shape.stride_w - a.shape.pad_left;
  return out;
}

// Address of the input that meets this column at this pixel; null: a zero.
template <typename T>
FBC_DEVICE const T* wgrad_input(const WgradArgs& a, const WgradPixel<T>& pixel, const Tap& at) {
  const int32_t h = pixel.h + at.r * a.shape.dilation_h, w = pixel.w + at.s * a.shape.dilation_w;
  const bool inside = pixel.valid && at.r < a.shape.R &&
                      static_cast<uint32_t>(h) < static_cast<uint32_t>(a.shape.H) &&
                      static_cast<uint32_t>(w) < static_cast<uint32_t>(a.shape.W);
  return inside ? pixel.input + h * a.input_stride.h + w * a.input_stride.w + at.c : nullptr;
}

// Copies the pixels at `at` into a stage.
template <typename T, bool kDraws, bool kAligned>
FBC_DEVICE void wgrad_load(const WgradArgs& a, const PixelWalk& at, int group, int32_t first_filter,
                           const Tap& tap, unsigned char* stage) {
  using Tile = WgradTile<T, kDraws, kAligned>;
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk = thread % Tile::kInputChunks, grad_chunk = thread % Tile::kGradChunks;
  const int32_t filter = first_filter + grad_chunk * kChunkElements<T>;
  FBC_UNROLL
  for (int i = 0; i < Tile::kPasses; ++i) {
    const int row = thread / Tile::kInputChunks + i * Tile::kRowsPerPass;
    const WgradPixel<T> pixel = wgrad_pixel<T>(a, at, row, group);
    unsigned char* to_input =
        stage + Tile::kGradBytes + chunk_offset<Tile::kInputChunks>(row, chunk);
    if (kAligned || a.input_aligned) {
      const T* from = wgrad_input(a, pixel, tap);
      gpu::copy_async<16>(to_input, from != nullptr ? from : a.input, from != nullptr);
    } else {
      Tap next = tap;
      gather_chunk(to_input, static_cast<const T*>(a.input), [&]() -> const T* {
        const T* from = wgrad_input(a, pixel, next);
        next_column(next, a.shape);
        return from;
      });
    }
    if (chunk / Tile::kGradChunks != i * Tile::kGradParts / Tile::kPasses) continue;
    unsigned char* to_grad = stage + chunk_offset<Tile::kGradChunks>(row, grad_chunk);
    if (kAligned || a.grad_aligned) {
      const bool valid = pixel.valid && filter < a.shape.K;
      gpu::copy_async<16>(to_grad, valid ? pixel.grad + filter : a.grad, valid);
    } else {
      int32_t k = filter;
      gather_chunk(to_grad, static_cast<const T*>(a.grad), [&]() -> const T* {
        const T* from = pixel.valid && k < a.shape.K ? pixel.grad + k : nullptr;
        ++k;
        return from;
      });
    }
  }
}

}  // namespace fbc::cuda
