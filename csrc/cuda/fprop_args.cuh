// What a forward launch passes to its kernel, and how the host plans it: from the shape alone.
#pragma once

#include "split_sum.cuh"
#include "weight_rows.cuh"
#include "weight_slab.cuh"

namespace fbc::cuda {

struct FpropArgs {
  ConvGeometry conv;
  const void* input;
  ImageStrides input_stride;
  int32_t gather_unit;
  Tap step;  // kDepth columns
  OutputView output;
  int32_t steps;
  int32_t pixel_tiles, channel_tiles;  // of a draw, of a group
  int32_t tiles;                       // of all, each as often as it has splits
  StoredWeights weights;               // not for private sampling
  WeightSampler sampler;
  SlabPlan slabs;
  SplitSum sum;
  KlSum kl;
  void* kept;
};

enum class TileKind : int32_t { kLarge = 0, kTall = 1, kSmall = 2, kFlat = 3 };

// How many blocks share the steps of a tile: the same for every source of weights, so that they
// give the same bits.
inline int32_t fprop_splits(const ConvShape& s, int32_t depth) {
  const int64_t images = s.num_samples * s.groups, pixels = s.rows_per_sample() * s.P * s.Q;
  const int64_t tiles = images * ((pixels + kSplitPixels - 1) / kSplitPixels) *
                        ((s.filters_per_group() + kSplitChannels - 1) / kSplitChannels);
  return split_count(tiles, (s.R * s.S * s.channels_per_group() + depth - 1) / depth);
}

// The workspace, in bytes from its begin:
// [counters and tickets, zeroed][KL slots][slabs of weights][slabs of sums].
struct FpropPlan {
  WeightSource source;
  TileKind tile;
  int32_t steps, splits, pixel_tiles, channel_tiles, tiles, strips, tasks, slots, counters;
  int64_t counters_bytes, slots_bytes, slabs_bytes, sums_bytes;
};

// One of these per storage type, each in a file of its own.
template <typename T>
int launch_fprop(const FpropArgs& args, const FpropPlan& plan, StreamHandle stream);
extern template int launch_fprop<BFloat16>(const FpropArgs&, const FpropPlan&, StreamHandle);
extern template int launch_fprop<Half>(const FpropArgs&, const FpropPlan&, StreamHandle);
extern template int launch_fprop<float>(const FpropArgs&, const FpropPlan&, StreamHandle);

}  // namespace fbc::cuda
