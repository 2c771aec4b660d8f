// Splitting the reduction of a tile among blocks, where a launch has fewer tiles than a GPU has
// multiprocessors: few pixels and many columns.
//
//   steps of a tile   |-- split 0 --|-- split 1 --| ... |-- split n-1 --|   a block each
//   slab (tile, split)   its float32 sums, as they lie in registers: [product][thread][4 floats]
//   ticket               one per tile; who takes the last one adds the slabs in the order of their
//                        splits, its own among them, and writes the output
//
// How many splits there are follows from the shape alone, and so does the order of every sum: no
// float atomics, no matter who comes last. Nobody waits for anybody. Products beyond the last pixel
// are neither written nor read. One split: no slab, no ticket.
#pragma once

#include "conv_tile.cuh"

namespace fbc::cuda {

struct SplitSum {
  float* slabs;
  uint32_t* tickets;  // zero before the launch
  int32_t splits;
};

struct StepRange {
  int32_t begin, end;
};
FBC_INLINE StepRange split_range(int32_t steps, int32_t splits, int32_t split) {
  const int32_t each = steps / splits, more = steps % splits;
  const int32_t begin = split * each + (split < more ? split : more);
  return {begin, begin + each + (split < more ? 1 : 0)};
}

// tiles: of kSplitPixels x kSplitChannels, whatever the kernel's own are, so that all of them split
// alike. Constants, because what is computed must not depend on the device that is present; those
// of an H100, counted and not measured: 132 multiprocessors; a step costs a block about as much as
// two slabs cost the one that reads them all, so beyond sqrt(2 steps) splits the tail grows faster
// than the loop shrinks.
constexpr int32_t kSplitPixels = 128, kSplitChannels = 64;
inline int32_t split_count(int64_t tiles, int64_t steps) {
  constexpr int64_t kMultiprocessors = 132, kLeastSteps = 8;
  int64_t splits = tiles > 0 ? kMultiprocessors / tiles : 1;
  if (splits > steps / kLeastSteps) splits = steps / kLeastSteps;
  while (splits > 1 && splits * splits > 2 * steps) --splits;
  return static_cast<int32_t>(splits > 1 ? splits : 1);
}

// Room for the slabs of `images` (draws, groups, phases) of so many pixels and channels, and for
// their tickets: enough for every kernel's tiles.
inline int64_t split_slab_bytes(int32_t splits, int64_t images, int32_t pixels, int32_t channels) {
  if (splits == 1) return 0;
  return splits * images * covers(pixels, kSplitPixels) * kSplitPixels * covers(channels, kSplitChannels) *
         kSplitChannels * 4;
}
inline int64_t split_tickets(int32_t splits, int64_t images, int32_t pixels, int32_t channels) {
  return splits == 1 ? 0 : images * covers(pixels, 64) * covers(channels, 32);
}

// acc, of one split -> of the whole tile, in the block that returns true; the others are done.
// `pixels`, `channels`: what is left from the tile's first on. Every warp has done with the stages.
template <typename Tile>
FBC_DEVICE bool add_splits(Accumulators<Tile>& acc, const SplitSum& sum, int32_t tile, int32_t split, int32_t pixels,
                           int32_t channels, BlockScratch& scratch) {
  constexpr int kColumns = 2 * Tile::kN, kProduct = Tile::kThreads * 4;  // floats
  constexpr int kProducts = Tile::kM * kColumns;
  constexpr int kAtOnce = kProducts > 8 ? 1 : 2;  // slabs: 16 loads under way
  constexpr int64_t kSlab = int64_t{kProducts} * kProduct;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const bool inside = warp % Tile::kWarpColumns * Tile::kWarpChannels < channels;
  const int32_t left = inside ? pixels - warp / Tile::kWarpColumns * Tile::kWarpPixels : 0;
  float* first = sum.slabs + tile * (sum.splits * kSlab) + thread * 4;
  float* own = first + split * kSlab;
  FBC_UNROLL
  for (int i = 0; i < Tile::kM; ++i) {
    FBC_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      const float (&v)[4] = acc.value[i][j];
      if (16 * i < left) {
        *reinterpret_cast<float4*>(own + (i * kColumns + j) * kProduct) = make_float4(v[0], v[1], v[2], v[3]);
      }
    }
  }
  gpu::sync();
  if (thread == 0) {
    scratch.last = gpu::take_ticket(sum.tickets + tile) + 1 == static_cast<uint32_t>(sum.splits) ? 1u : 0u;
  }
  gpu::sync();
  if (scratch.last == 0) return false;
  acc.clear();
  FBC_ROLLED
  for (int32_t s = 0; s < sum.splits; s += kAtOnce, first += kAtOnce * kSlab) {
    float4 v[kAtOnce][kProducts];
    FBC_UNROLL
    for (int i = 0; i < kAtOnce * kProducts; ++i) {
      const int slab = i / kProducts, product = i % kProducts;
      v[slab][product] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (product / kColumns * 16 < left && s + slab < sum.splits) {
        v[slab][product] = *reinterpret_cast<const float4*>(first + slab * kSlab + product * kProduct);
      }
    }
    FBC_UNROLL
    for (int i = 0; i < kAtOnce * kProducts; ++i) {
      const float4& from = v[i / kProducts][i % kProducts];
      float (&to)[4] = acc.value[i % kProducts / kColumns][i % kColumns];
      to[0] += from.x, to[1] += from.y, to[2] += from.z, to[3] += from.w;
    }
  }
  return true;
}

}  // namespace fbc::cuda
