// Weight tiles that are copied from memory: a given tensor, or the slabs of weight_slab.cuh.
#pragma once

#include "conv_tile.cuh"

namespace fbc::cuda {

// Filter k of a draw, step t: data + draw * draw_stride + k * row_stride + t * step_stride, in
// bytes, 64 of them or what is left of the filter's `bytes`; `unit` (16, 8, 4, 2) of them are
// aligned.
struct StoredWeights {
  const unsigned char* data;
  int64_t draw_stride, step_stride, row_stride;
  int32_t bytes, unit;
};

// (num_samples, filters, columns) contiguous.
inline StoredWeights given_weights(const void* data, int64_t filters, int32_t columns, int32_t element_bytes) {
  const int32_t bytes = columns * element_bytes;
  int32_t unit = 16;
  while (unit > element_bytes &&
         (bytes % unit != 0 || reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(unit))) {
    unit /= 2;
  }
  return {static_cast<const unsigned char*>(data), filters * bytes, kRowBytes, bytes, bytes, unit};
}
// Slabs [draw][step][filter][64 bytes].
inline StoredWeights slab_weights(const unsigned char* slabs, int64_t filters, int32_t steps) {
  const int64_t slab = filters * kRowBytes;
  return {slabs, steps * slab, slab, kRowBytes, steps * kRowBytes, 16};
}

// The rows of a weight tile, copied from memory step by step, from step `first_step` on.
template <typename Tile>
class StoredRows {
 public:
  FBC_DEVICE StoredRows(const StoredWeights& from, const TilePosition& at, int32_t first_step, const ConvGeometry& g,
                        int thread) {
    const int row = thread / kRowChunks, chunk = thread % kRowChunks;
    const int32_t first = at.channel_tile * Tile::kChannels;
    const int64_t k = int64_t{at.group} * g.K + first + row;
    target_ = Tile::kWeights + chunk_offset<kRowChunks>(row, chunk);
    rows_ = g.K - first - row;
    left_ = from.bytes - chunk * 16 - first_step * kRowBytes;
    from_ = from.data + at.draw * from.draw_stride + first_step * from.step_stride + k * from.row_stride + chunk * 16;
  }
  FBC_DEVICE void advance(const StoredWeights& from) {
    from_ += from.step_stride;
    left_ -= kRowBytes;
  }
  FBC_DEVICE void copy(unsigned char* stage, const StoredWeights& from) const {
    if (from.unit == 16) {
      FBC_UNROLL
      for (int i = 0; i < kCopies; ++i) {
        const bool valid = (i * kRowStep < rows_) & (left_ > 0);
        gpu::copy_async<16>(stage + target_ + i * kRowStep * kRowBytes, from_ + i * kRowStep * from.row_stride, valid);
      }
    } else {
      FBC_ROLLED
      for (int i = 0; i < kCopies; ++i) {
        copy_units(stage + target_ + i * kRowStep * kRowBytes, from_ + i * kRowStep * from.row_stride, from.unit,
                   i * kRowStep < rows_ ? left_ : 0);
      }
    }
  }

 private:
  static constexpr int kRowStep = Tile::kThreads / kRowChunks;
  static constexpr int kCopies = Tile::kChannels / kRowStep;
  static_assert(Tile::kChannels % kRowStep == 0 && kRowStep % 8 == 0,
                "threads share the tile evenly, all rows of one are swizzled alike");

  // Filters that begin anywhere: the weights of a first layer, mostly.
  FBC_DEVICE static void copy_units(unsigned char* to, const unsigned char* from, int32_t unit, int32_t left) {
    FBC_ROLLED
    for (int32_t b = 0; b < 16; b += unit) {
      const bool valid = b < left;
      if (unit == 8) {
        gpu::copy_async<8>(to + b, from + b, valid);
      } else if (unit == 4) {
        gpu::copy_async<4>(to + b, from + b, valid);
      } else {
        uint16_t value = 0;
        if (valid) value = *reinterpret_cast<const uint16_t*>(from + b);
        *reinterpret_cast<uint16_t*>(to + b) = value;
      }
    }
  }

  int target_;  // where in a stage the thread's chunk of its first row goes
  int32_t rows_,
      left_;  // rows of the group from the thread's first on; bytes of a filter from here
  const unsigned char* from_;
};

}  // namespace fbc::cuda
