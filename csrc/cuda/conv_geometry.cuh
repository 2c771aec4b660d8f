// Where the rows and columns of an implicit matrix product lie in an image.
//
//   rows      pixels m of one draw, m = (n * P + p) * Q + q; a PixelRow says where the window of a
//             pixel begins (its tap r = s = 0, which may lie outside the image)
//   columns   kk = (r * S + s) * C + c, C the channels of one group; a Tap is kk as the digits
//             (r, s, c)
//
//   element (m, kk) = data[row.offset + r * dilation_h * stride.h + s * dilation_w * stride.w + c],
//   zero where (row.h + r * dilation_h, row.w + s * dilation_w) is outside the image
//
// So a tile of the product is gathered by asynchronous copies with zero fill, and stride, dilation
// and padding on any side are addresses and nothing else. A thread keeps its column from step to
// step: a Tap moves on by a fixed number of columns without a division.
//
// PixelGather<T, kWide, kRows, kThreads, kChunks> fills a tile of kRows rows of kChunks 16-byte
// chunks (mma.cuh) with the columns that begin at its tap:
//
//   PixelRow* rows (shared)  <- locate_pixels(), once per tile;  sync()
//   PixelGather gather(tid, first column, geometry)
//   per step: gather.copy(tile, rows, image, geometry); copy_commit();
//             gather.advance(image, geometry)
//
// kWide: every chunk is one 16-byte copy; needs wide_gather(). Else units of 8, 4 or 2 bytes, as
// gather_unit() says (2: ordinary loads and stores, for odd C of a 16-bit type).
// A group's first channel is part of the rows' offsets.
#pragma once

#include <cstring>

#include "../core/conv_shape.h"
#include "../core/params.h"
#include "mma.cuh"

namespace fbc::cuda {

struct ConvGeometry {
  int32_t C, K;  // of one group
  int32_t H, W, R, S, P, Q;
  int32_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int32_t groups, num_samples;
  int32_t rows;     // output rows of one draw
  int32_t pixels;   // rows * P * Q
  int32_t columns;  // R * S * C
  bool share_input;
};

inline ConvGeometry conv_geometry(const ConvShape& s) {
  const auto small = [](int64_t extent) { return static_cast<int32_t>(extent); };
  ConvGeometry g;
  g.C = small(s.channels_per_group());
  g.K = small(s.filters_per_group());
  g.H = small(s.H), g.W = small(s.W), g.R = small(s.R), g.S = small(s.S);
  g.P = small(s.P), g.Q = small(s.Q);
  g.stride_h = small(s.stride_h), g.stride_w = small(s.stride_w);
  g.pad_top = small(s.pad_top), g.pad_left = small(s.pad_left);
  g.dilation_h = small(s.dilation_h), g.dilation_w = small(s.dilation_w);
  g.groups = small(s.groups), g.num_samples = small(s.num_samples);
  g.rows = small(s.rows_per_sample());
  g.pixels = small(s.rows_per_sample() * s.P * s.Q);
  g.columns = small(s.R * s.S * s.channels_per_group());
  g.share_input = s.share_input;
  return g;
}

// Tiles and steps that cover an extent.
FBC_INLINE int32_t covers(int32_t extent, int32_t tile) { return extent / tile + (extent % tile != 0); }

// ---- columns ------------------------------------------------------------------------------------
struct Tap {
  int32_t r, s, c;
};
FBC_INLINE Tap tap_of(int32_t column, const ConvGeometry& g) {
  const int32_t filter = column / g.C;
  return {filter / g.S, filter % g.S, column % g.C};
}
// tap += by: both are digits of a number of columns. The result may lie beyond the last column (r
// >= R).
FBC_INLINE void advance_tap(Tap& tap, const Tap& by, const ConvGeometry& g) {
  tap.c += by.c;
  tap.s += by.s;
  tap.r += by.r;
  if (tap.c >= g.C) {
    tap.c -= g.C;
    tap.s += 1;
  }
  if (tap.s >= g.S) {
    tap.s -= g.S;
    tap.r += 1;
  }
}
FBC_INLINE void next_column(Tap& tap, const ConvGeometry& g) { advance_tap(tap, {0, 0, 1}, g); }

// ---- rows ---------------------------------------------------------------------------------------
struct alignas(16) PixelRow {
  int64_t offset;
  int32_t h, w;  // h is kNoPixel where the row is beyond the last pixel: every tap is then outside
};
constexpr int32_t kNoPixel = INT32_MIN / 2;

FBC_DEVICE PixelRow load_row(const PixelRow& row) {  // one access of 16 bytes
  uint4 bits;
  std::memcpy(&bits, __builtin_assume_aligned(&row, 16), sizeof bits);
  return {static_cast<int64_t>(bits.x | static_cast<uint64_t>(bits.y) << 32), static_cast<int32_t>(bits.z),
          static_cast<int32_t>(bits.w)};
}

struct PixelIndex {
  int32_t n, p, q;  // n counts within the draw
};
FBC_INLINE PixelIndex pixel_index(int32_t m, const ConvGeometry& g) {
  const int32_t line = m / g.Q;
  return {line / g.P, line % g.P, m % g.Q};
}

// The window of pixel m of a draw in the input, from channel `channel` on.
FBC_INLINE PixelRow pixel_row(int32_t m, int32_t draw, int32_t channel, const ImageStrides& stride,
                              const ConvGeometry& g) {
  if (m >= g.pixels) return {0, kNoPixel, 0};
  const PixelIndex at = pixel_index(m, g);
  const int64_t n = at.n + (g.share_input ? int64_t{0} : int64_t{draw} * g.rows);
  const int32_t h = at.p * g.stride_h - g.pad_top, w = at.q * g.stride_w - g.pad_left;
  return {n * stride.n + h * stride.h + w * stride.w + channel, h, w};
}
template <int kRows, int kThreads>
FBC_DEVICE void locate_pixels(PixelRow (&rows)[kRows], int32_t first, int32_t draw, int32_t channel,
                              const ImageStrides& stride, const ConvGeometry& g) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows; i += kThreads) {
    rows[i] = pixel_row(first + i, draw, channel, stride, g);
  }
}

// ---- gathering ----------------------------------------------------------------------------------
template <typename T>
struct ImageView {
  const T* data;
  int64_t stride_h, stride_w;
  Tap step;      // tap_of(columns of a tile): what advance() moves by
  int32_t unit;  // gather_unit()
};

// The widest copy, in bytes (16, 8, 4, 2), that stays inside one tap and is aligned at every pixel.
inline int32_t gather_unit(const void* data, const ImageStrides& stride, const ConvShape& shape,
                           int32_t element_bytes) {
  const int64_t counts[] = {shape.channels_per_group(), shape.N > 1 ? stride.n : 0, shape.H > 1 ? stride.h : 0,
                            shape.W > 1 ? stride.w : 0};
  int32_t unit = 16;
  while (unit > element_bytes && reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(unit)) {
    unit /= 2;
  }
  for (const int64_t count : counts) {
    while (unit > element_bytes && count * element_bytes % unit != 0) unit /= 2;
  }
  return unit;
}
inline bool wide_gather(int32_t unit) { return unit == 16; }

template <typename T, bool kWide, int kRows, int kThreads, int kChunks = 4>
class PixelGather {
 public:
  // At the tile of columns that begins at `first`; advance() moves on by one.
  FBC_DEVICE PixelGather(int thread, int32_t first, const ConvGeometry& g)
      : row_(thread / kPieces), tap_(tap_of(first + thread % kPieces * kPieceElements, g)) {
    target_ = tile_offset<T, kChunks>(row_, thread % kPieces * kPieceElements);
  }
  FBC_DEVICE void advance(const ImageView<T>& image, const ConvGeometry& g) { advance_tap(tap_, image.step, g); }

  FBC_DEVICE void copy(unsigned char* tile, const PixelRow (&rows)[kRows], const ImageView<T>& image,
                       const ConvGeometry& g) const {
    unsigned char* to = tile + target_;
    if (kWide || image.unit == 8) {
      copy_unit<kPieceBytes>(to, rows, image, tap_, g);
      return;
    }
    const int unit_elements = image.unit / static_cast<int>(sizeof(T));
    Tap tap = tap_;
    FBC_ROLLED
    for (int b = 0; b < kPieceBytes; b += image.unit) {
      if (image.unit == 4) {
        copy_unit<4>(to + b, rows, image, tap, g);
      } else {
        copy_elements(to + b, rows, image, tap, g);
      }
      advance_tap(tap, {0, 0, unit_elements}, g);
    }
  }

 private:
  static constexpr int kPieceBytes = kWide ? 16 : 8;
  static constexpr int kPieceElements = kPieceBytes / static_cast<int>(sizeof(T));
  static constexpr int kPieces = kChunks * 16 / kPieceBytes;  // of a row
  static constexpr int kRowStep = kThreads / kPieces;
  static constexpr int kStepBytes = kRowStep * kChunks * 16;
  static constexpr int kCopies = kRows / kRowStep;
  static constexpr int kBatch = kCopies < 4 ? kCopies : 4;  // rows at a time: registers
  static_assert(kThreads % kPieces == 0 && kRows % kRowStep == 0 && kCopies % kBatch == 0,
                "threads share the tile evenly");
  static_assert(kRowStep % 8 == 0, "all rows of a thread are swizzled alike");

  struct Source {
    const T* data;  // of a tap, where a window begins at offset 0
    int32_t h, w;
    bool inside;  // the tap is one of the filter's
  };
  static FBC_DEVICE Source source(const Tap& tap, const ImageView<T>& image, const ConvGeometry& g) {
    const int32_t h = tap.r * g.dilation_h, w = tap.s * g.dilation_w;
    return {image.data + (h * image.stride_h + w * image.stride_w + tap.c), h, w, tap.r < g.R};
  }
  // Without branches: most taps are inside.
  static FBC_DEVICE bool reads(const PixelRow& row, const Source& from, const ConvGeometry& g) {
    const bool h = static_cast<uint32_t>(row.h + from.h) < static_cast<uint32_t>(g.H);
    const bool w = static_cast<uint32_t>(row.w + from.w) < static_cast<uint32_t>(g.W);
    return from.inside & h & w;
  }

  template <int kBytes>
  FBC_DEVICE void copy_unit(unsigned char* to, const PixelRow (&rows)[kRows], const ImageView<T>& image, const Tap& tap,
                            const ConvGeometry& g) const {
    const Source from = source(tap, image, g);
    FBC_ROLLED
    for (int batch = 0; batch < kCopies; batch += kBatch) {
      FBC_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const PixelRow row = load_row(rows[row_ + (batch + i) * kRowStep]);
        gpu::copy_async<kBytes>(to + (batch + i) * kStepBytes, from.data + row.offset, reads(row, from, g));
      }
    }
  }
  // One element of each row by ordinary loads, a batch of them under way before the first is
  // stored.
  FBC_DEVICE void copy_elements(unsigned char* to, const PixelRow (&rows)[kRows], const ImageView<T>& image,
                                const Tap& tap, const ConvGeometry& g) const {
    const Source from = source(tap, image, g);
    FBC_ROLLED
    for (int batch = 0; batch < kCopies; batch += kBatch) {
      T value[kBatch];
      FBC_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const PixelRow row = load_row(rows[row_ + (batch + i) * kRowStep]);
        value[i] = T{};
        if (reads(row, from, g)) value[i] = from.data[row.offset];
      }
      FBC_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        *reinterpret_cast<T*>(to + (batch + i) * kStepBytes) = value[i];
      }
    }
  }

  int row_, target_;  // the thread's first row, and where in the tile its piece of that row goes
  Tap tap_;
};

}  // namespace fbc::cuda
