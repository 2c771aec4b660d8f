// What one block of wgrad (wgrad_kernel.cuh) reads: the pixels of a step, and where they lie.
#pragma once

#include "conv_tile.cuh"
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
  ConvGeometry shape;
  int64_t steps;  // of all draws together; a step is kDepth pixels of one draw
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
  // With draws a sum takes three registers: 128 registers for 64 filters of 16 bits, else 168.
  static constexpr bool kBig = kAligned && sizeof(T) == 2;
  static constexpr int kThreads = kDraws && kBig ? 256 : 128;
  static constexpr int kBlocks = kDraws && kBig ? 2 : 3;  // on a multiprocessor
  static constexpr int kFilters = kDraws && !kBig ? 32 : 64;
  static constexpr int kColumns = kBig && !kDraws ? 128 : 64;
  static constexpr int kDepth = 2 * kMmaDepth<T>;
  static constexpr int kGradChunks = kFilters / kChunkElements<T>;
  static constexpr int kInputChunks = kColumns / kChunkElements<T>;
  static constexpr int kGradBytes = kDepth * kGradChunks * 16;
  static constexpr int kStageBytes = kGradBytes + kDepth * kInputChunks * 16;
  static constexpr int kStages = 3;
  // A thread copies chunk threadIdx.x % chunks of every kGradRows-th and kInputRows-th row.
  static constexpr int kGradRows = kThreads / kGradChunks;
  static constexpr int kInputRows = kThreads / kInputChunks;
  static_assert(kGradRows % 8 == 0 && kInputRows % 8 == 0, "its rows share their swizzle");
  // Two warps along the columns, two or four along the filters.
  static constexpr int kTall = kDraws ? 1 : 2;      // m16 tiles of a warp
  static constexpr int kPairs = kColumns / 2 / 16;  // pairs of n8 tiles of a warp
};

// Where a warp's sums lie in the tile, and a lane's within an m16n8 tile (gpu.cuh).
struct WgradPlace {
  int warp_row, warp_column;  // first filter and first column of the warp, in the tile
  int lane;
  int32_t filter, column;  // first of the tile, in the group
  int32_t group, slab;

  FBC_DEVICE int32_t filter_of(int i, int half) const { return filter + warp_row + 16 * i + 8 * half + (lane >> 2); }
  FBC_DEVICE int32_t column_of(int j) const { return column + warp_column + 8 * j; }
};

// Pixels of the next two steps: PixelRow as in conv_geometry.cuh, and where they lie in grad.
template <typename Tile>
struct WgradShared {
  alignas(128) unsigned char stage[Tile::kStages][Tile::kStageBytes];
  PixelRow rows[2][Tile::kDepth];
  int64_t grad[2][Tile::kDepth];
};

// The first pixel of the step to be located next.
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

// Pixel `row` of the step at `at`, located by one lane for the whole block.
template <typename Tile>
FBC_DEVICE void wgrad_locate(const WgradArgs& a, const PixelWalk& at, int row, int buffer, WgradShared<Tile>& shared) {
  if (row >= Tile::kDepth) return;
  const int32_t y = at.rest + row;
  const int32_t images = a.by_pixels.divide(y);
  const int32_t pixel = y - images * a.by_pixels.value;
  const int32_t p = a.by_q.divide(pixel), q = pixel - p * a.by_q.value;
  const int32_t n = at.n + images;
  const int64_t grad_row = int64_t{at.draw} * a.shape.rows + n;
  const int32_t h = p * a.shape.stride_h - a.shape.pad_top;
  const int32_t w = q * a.shape.stride_w - a.shape.pad_left;
  shared.rows[buffer][row] = {
      (a.shape.share_input ? n : grad_row) * a.input_stride.n + h * a.input_stride.h + w * a.input_stride.w,
      n < a.shape.rows ? h : kNoPixel, w};
  shared.grad[buffer][row] =
      n < a.shape.rows ? grad_row * a.grad_stride.n + p * a.grad_stride.h + q * a.grad_stride.w : kNoOutput;
}

// Which columns and filters a thread copies, the same in every step.
template <typename T, bool kDraws, bool kAligned>
struct WgradLoader {
  using Tile = WgradTile<T, kDraws, kAligned>;
  const WgradArgs& a;
  const T* grad;         // of channel 0 of the group, row 0
  const T* input;        // the same; with aligned copies of this thread's first column
  Tap tap;               // of the first column of this thread's chunk
  int32_t tap_h, tap_w;  // kNoPixel beyond the last column
  int32_t filter;        // first of this thread's chunk

  FBC_DEVICE WgradLoader(const WgradArgs& args, const WgradPlace& place) : a(args) {
    const int thread = static_cast<int>(threadIdx.x);
    grad = static_cast<const T*>(a.grad) + static_cast<int64_t>(place.group) * a.shape.K;
    input = static_cast<const T*>(a.input) + static_cast<int64_t>(place.group) * a.shape.C;
    filter = place.filter + thread % Tile::kGradChunks * kChunkElements<T>;
    tap = tap_of(place.column + thread % Tile::kInputChunks * kChunkElements<T>, a.shape);
    tap_h = tap.r < a.shape.R ? tap.r * a.shape.dilation_h : kNoPixel;
    tap_w = tap.s * a.shape.dilation_w;
    if (kAligned || a.input_aligned) input += offset_of(tap);
  }
  FBC_DEVICE int64_t offset_of(const Tap& at) const {
    return at.r * a.shape.dilation_h * a.input_stride.h + at.s * a.shape.dilation_w * a.input_stride.w + at.c;
  }
  FBC_DEVICE bool inside(const PixelRow& pixel, int32_t h, int32_t w) const {
    return static_cast<uint32_t>(pixel.h + h) < static_cast<uint32_t>(a.shape.H) &&
           static_cast<uint32_t>(pixel.w + w) < static_cast<uint32_t>(a.shape.W);
  }

  FBC_DEVICE void load_input(const PixelRow& pixel, unsigned char* to) const {
    if (kAligned || a.input_aligned) {
      gpu::copy_async<16>(to, input + pixel.offset, inside(pixel, tap_h, tap_w));
      return;
    }
    Tap next = tap;
    gather_chunk(to, static_cast<const T*>(a.input), [&]() -> const T* {
      const bool valid = next.r < a.shape.R && inside(pixel, next.r * a.shape.dilation_h, next.s * a.shape.dilation_w);
      const T* from = valid ? input + pixel.offset + offset_of(next) : nullptr;
      next_column(next, a.shape);
      return from;
    });
  }
  FBC_DEVICE void load_grad(int64_t offset, unsigned char* to) const {
    const bool exists = offset != kNoOutput;
    if (kAligned || a.grad_aligned) {
      gpu::copy_async<16>(to, grad + offset + filter, exists && filter < a.shape.K);
      return;
    }
    int32_t k = filter;
    gather_chunk(to, static_cast<const T*>(a.grad), [&]() -> const T* {
      const T* from = exists && k < a.shape.K ? grad + offset + k : nullptr;
      ++k;
      return from;
    });
  }
  // The step that was located in `buffer`.
  FBC_DEVICE void load(WgradShared<Tile>& shared, int buffer, int stage) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int grad_row = thread / Tile::kGradChunks, input_row = thread / Tile::kInputChunks;
    unsigned char* to_grad =
        shared.stage[stage] + chunk_offset<Tile::kGradChunks>(grad_row, thread % Tile::kGradChunks);
    unsigned char* to_input = shared.stage[stage] + Tile::kGradBytes +
                              chunk_offset<Tile::kInputChunks>(input_row, thread % Tile::kInputChunks);
    FBC_UNROLL
    for (int i = 0; i < Tile::kDepth; i += Tile::kInputRows) {
      load_input(shared.rows[buffer][input_row + i], to_input + i * Tile::kInputChunks * 16);
    }
    FBC_UNROLL
    for (int i = 0; i < Tile::kDepth; i += Tile::kGradRows) {
      if (Tile::kGradRows > Tile::kDepth && grad_row >= Tile::kDepth) break;
      load_grad(shared.grad[buffer][grad_row + i], to_grad + i * Tile::kGradChunks * 16);
    }
  }
};

}  // namespace fbc::cuda
