// The block tile of a convolution's matrix product: shared memory, the product of one step, and the
// way from the sums to memory.
//
//        kChannels               a stage holds one step of kDepth columns, rows of 64 bytes
//       +---------+              (32 sixteen-bit or 16 float elements, swizzled: mma.cuh):
//       | w | w | |                activations  [kPixels][64 bytes]
//       |---+---|-| kPixels        weights      [kChannels][64 bytes]
//       | w | w | |              w: one warp's part, kWarpPixels x 32, as 16 x 8 products
//       +---------+
//
// A sum is formed in the order of its columns, kDepth / 2 at a time: the same for every tile shape,
// so results do not depend on which tile is used.
#pragma once

#include "conv_geometry.cuh"
#include "epilogue.cuh"
#include "index.cuh"
#include "mma.cuh"

namespace fbc::cuda {

constexpr int kRowBytes = 64;
constexpr int kRowChunks = kRowBytes / 16;
template <typename T>
constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));

// kSplits_: its kernels can share a tile's steps among blocks (split_sum.cuh).
template <int kPixels_, int kChannels_, int kWarpRows, int kWarpColumns_, int kStages_, bool kSplits_ = false>
struct ConvTile {
  static constexpr int kPixels = kPixels_, kChannels = kChannels_, kStages = kStages_;
  static constexpr int kWarpColumns = kWarpColumns_;
  static constexpr bool kSplits = kSplits_;
  static constexpr int kWarps = kWarpRows * kWarpColumns, kThreads = 32 * kWarps;
  static constexpr int kBlocks = 512 / kThreads;  // at least so many on a multiprocessor
  static constexpr int kWarpPixels = kPixels / kWarpRows, kWarpChannels = kChannels / kWarpColumns;
  static constexpr int kM = kWarpPixels / 16, kN = kWarpChannels / 16;
  static constexpr int kWeights = kPixels * kRowBytes;  // where they begin in a stage
  static constexpr int kStageBytes = (kPixels + kChannels) * kRowBytes;
  static_assert(kWarpChannels == 32 && kWarpPixels % 32 == 0, "store_tile() is made for these");
};
using LargeTile = ConvTile<128, 128, 2, 4, 4>;
using TallTile = ConvTile<256, 64, 4, 2, 3>;
using SmallTile = ConvTile<64, 64, 2, 2, 4, true>;
using FlatTile = ConvTile<128, 32, 4, 1, 4, true>;

struct TilePosition {
  int32_t draw, group, channel_tile, pixel_tile, split;
};
// Sums of a block, and what the last block out finds.
struct BlockScratch {
  double partial[2][8];
  uint32_t last;
};

template <typename Tile>
struct ConvShared {
  alignas(128) unsigned char stage[Tile::kStages][Tile::kStageBytes];
  PixelRow rows[Tile::kPixels];
  int64_t out[Tile::kPixels];  // offset of each pixel in the output; kNoOutput beyond the last
  TilePosition at;
  BlockScratch scratch;
};
constexpr int64_t kNoOutput = INT64_MIN;

template <typename Tile>
FBC_DEVICE ConvShared<Tile>& conv_shared() {
  return *reinterpret_cast<ConvShared<Tile>*>(gpu::shared());
}

template <typename Tile>
struct Accumulators {
  float value[Tile::kM][2 * Tile::kN][4];

  FBC_DEVICE void clear() {
    FBC_UNROLL
    for (int i = 0; i < Tile::kM; ++i) {
      FBC_UNROLL
      for (int j = 0; j < 2 * Tile::kN; ++j) {
        FBC_UNROLL
        for (int e = 0; e < 4; ++e) value[i][j][e] = 0.0f;
      }
    }
  }
};

// acc += activations * weights of one stage.
template <typename T, typename Tile>
FBC_DEVICE void multiply_stage(Accumulators<Tile>& acc, const unsigned char* stage, int warp, int lane) {
  const int pixel = warp / Tile::kWarpColumns * Tile::kWarpPixels;
  const int channel = warp % Tile::kWarpColumns * Tile::kWarpChannels;
  FBC_UNROLL
  for (int chunk = 0; chunk < kRowChunks; chunk += 2) {
    uint32_t a[Tile::kM][4], b[Tile::kN][4];
    FBC_UNROLL
    for (int j = 0; j < Tile::kN; ++j) {
      load_b<T, kRowChunks>(b[j], stage + Tile::kWeights, channel + 16 * j, chunk, lane);
    }
    FBC_UNROLL
    for (int i = 0; i < Tile::kM; ++i) {
      load_a<T, kRowChunks>(a[i], stage, pixel + 16 * i, chunk, lane);
    }
    multiply<T, Tile::kM, Tile::kN>(acc.value, a, b);
  }
}

// ---- from the sums to memory --------------------------------------------------------------------
struct OutputView {
  void* data;
  void* pre_activation;  // null: not wanted
  ImageStrides stride;
  const float* bias;  // (num_samples, all channels); null: none
  Activation activation;
  float activation_param;
  int32_t pack;  // elements of one access: 8, 4 or 1
};

// How many channels lie aligned next to one another at every pixel.
inline int32_t output_pack(const void* data, const ImageStrides& stride, int64_t group_channels, bool grouped,
                           int32_t element_bytes) {
  if (stride.c != 1) return 1;
  for (const int32_t pack : {8, 4}) {
    const int64_t bytes = pack * element_bytes < 16 ? pack * element_bytes : 16;
    const bool strides = stride.n % pack == 0 && stride.h % pack == 0 && stride.w % pack == 0;
    const bool begins = !grouped || group_channels % pack == 0;
    if (strides && begins && reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0) {
      return pack;
    }
  }
  return 1;
}

// value[i] to channel i < count.
template <typename T>
FBC_DEVICE void store_channels(T* to, int64_t stride, int pack, int count, const float (&value)[8]) {
  if (pack == 8 && count >= 8) {
    store_pack(to, value);
    return;
  }
  FBC_UNROLL
  for (int i = 0; i < 8; i += 4) {
    if (pack >= 4 && count >= i + 4) {
      const float four[4] = {value[i], value[i + 1], value[i + 2], value[i + 3]};
      store_pack(to + i, four);
    } else {
      FBC_UNROLL
      for (int e = i; e < i + 4; ++e) {
        if (e < count) store_one(to + e * stride, value[e]);
      }
    }
  }
}

// One pixel, eight channels: z = sum + bias; output activation(z). `staged`: the eight sums in
// shared memory, where an activation is applied one value at a time (its code exists once).
template <typename T>
FBC_DEVICE void finish_pixel(float* staged, const float (&bias)[8], const OutputView& view, int64_t offset, int count) {
  float z[8];
  FBC_UNROLL
  for (int i = 0; i < 8; ++i) z[i] = staged[i] + bias[i];
  if (view.pre_activation != nullptr) {
    store_channels(static_cast<T*>(view.pre_activation) + offset, view.stride.c, view.pack, count, z);
  }
  if (view.activation == Activation::kRelu) {
    FBC_UNROLL
    for (int i = 0; i < 8; ++i) z[i] = activate<Activation::kRelu>(z[i], 0.0f);
  } else if (view.activation != Activation::kLinear) {
    FBC_UNROLL
    for (int i = 0; i < 8; ++i) staged[i] = z[i];
    FBC_ROLLED
    for (int i = 0; i < 8; ++i) {
      staged[i] = activate_at_run_time(view.activation, staged[i], view.activation_param);
    }
    FBC_UNROLL
    for (int i = 0; i < 8; ++i) z[i] = staged[i];
  }
  store_channels(static_cast<T*>(view.data) + offset, view.stride.c, view.pack, count, z);
}

// Each warp turns its sums, 32 pixels at a time, from fragments into rows through its own piece of
// the stages (free by now: the caller has synchronised), and stores 8 channels a lane. `channel`:
// the tile's first, of `channels` (all groups) that begin at view.bias and the offsets.
template <typename T, typename Tile>
FBC_DEVICE void store_tile(const Accumulators<Tile>& acc, ConvShared<Tile>& shared, const OutputView& view,
                           const float* bias, int32_t channel, int32_t channel_end, int warp, int lane) {
  constexpr int kPitch = 40, kRound = 32;  // floats of a row, rows of a round
  static_assert(Tile::kWarps * kRound * kPitch * 4 <= sizeof(shared.stage), "fits the stages");
  float* piece = reinterpret_cast<float*>(shared.stage) + warp * kRound * kPitch;
  const int pixel = warp / Tile::kWarpColumns * Tile::kWarpPixels;
  const int first = channel + warp % Tile::kWarpColumns * Tile::kWarpChannels + (lane & 3) * 8;
  const int count = channel_end - first;
  float addend[8];
  FBC_UNROLL
  for (int i = 0; i < 8; ++i) addend[i] = bias != nullptr && i < count ? bias[first + i] : 0.0f;
  FBC_UNROLL
  for (int round = 0; round < Tile::kM / 2; ++round) {
    gpu::sync_warp();
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      FBC_UNROLL
      for (int j = 0; j < 2 * Tile::kN; ++j) {
        const float* pair = &acc.value[2 * round + i / 2][j][i % 2 * 2];
        *reinterpret_cast<float2*>(piece + ((lane >> 2) + 8 * i) * kPitch + j * 8 + (lane & 3) * 2) =
            make_float2(pair[0], pair[1]);
      }
    }
    gpu::sync_warp();
    FBC_ROLLED
    for (int row = lane >> 2; row < kRound; row += 8) {
      const int64_t offset = shared.out[pixel + round * kRound + row];
      if (offset != kNoOutput && count > 0) {
        finish_pixel<T>(piece + row * kPitch + (lane & 3) * 8, addend, view, offset + first * view.stride.c, count);
      }
    }
  }
}

}  // namespace fbc::cuda
