// What a forward launch passes to its kernel, and how the host plans it: from the shape alone.
#pragma once

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
  int32_t steps, pixel_tiles, channel_tiles,
      tiles;              // pixel tiles of a draw, channel tiles of a group
  StoredWeights weights;  // not for private sampling
  WeightSampler sampler;
  SlabPlan slabs;
  KlSum kl;
  void* kept;
};

enum class TileKind : int32_t { kLarge = 0, kTall = 1, kSmall = 2 };

// The workspace, in bytes from its begin: [counters and ticket, zeroed][KL slots][slabs].
struct FpropPlan {
  WeightSource source;
  TileKind tile;
  int32_t steps, pixel_tiles, channel_tiles, tiles, strips, tasks, slots;
  int64_t counters_bytes, slots_bytes, slabs_bytes;
};

// One of these per storage type, each in a file of its own.
template <typename T>
int launch_fprop(const FpropArgs& args, const FpropPlan& plan, StreamHandle stream);
extern template int launch_fprop<BFloat16>(const FpropArgs&, const FpropPlan&, StreamHandle);
extern template int launch_fprop<Half>(const FpropArgs&, const FpropPlan&, StreamHandle);
extern template int launch_fprop<float>(const FpropArgs&, const FpropPlan&, StreamHandle);

}  // namespace fbc::cuda
