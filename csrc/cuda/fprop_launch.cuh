// Chooses the kernel of a plan; the kernels of one storage type are compiled where this is
// included.
#pragma once

#include "fprop_kernel.cuh"

namespace fbc::cuda {

template <typename Tile>
int launch_stored(void (*kernel)(FpropArgs), const FpropArgs& args, StreamHandle stream) {
  constexpr size_t kShared = sizeof(ConvShared<Tile>);
  if (args.slabs.tasks == 0) {
    if (args.tiles == 0) return 0;
    return gpu::launch(kernel, dim3(static_cast<unsigned>(args.tiles)), Tile::kThreads, kShared, stream, args);
  }
  int blocks = 0;
  if (const int status = gpu::resident_blocks(kernel, Tile::kThreads, kShared, &blocks)) {
    return status;
  }
  const int32_t useful = args.slabs.tasks > args.tiles ? args.slabs.tasks : args.tiles;
  if (blocks > useful) blocks = useful;
  return gpu::launch_cooperative(kernel, dim3(static_cast<unsigned>(blocks)), Tile::kThreads, kShared, stream, args);
}

template <typename T, bool kWide, typename Tile>
int launch_private(const FpropArgs& args, StreamHandle stream) {
  return gpu::launch(fprop_private<T, kWide, Tile>, dim3(static_cast<unsigned>(args.tiles)), Tile::kThreads,
                     sizeof(ConvShared<Tile>), stream, args);
}

// plan_fprop() pairs narrow copies with the tall stored tile and the small private one, at most,
// and splits with the small tile and the flat one.
template <typename T, bool kWide>
int launch_fprop_as(const FpropArgs& args, const FpropPlan& plan, StreamHandle stream) {
  if (plan.source == WeightSource::kPrivate) {
    if constexpr (kWide) {
      if (plan.tile == TileKind::kTall) return launch_private<T, kWide, TallTile>(args, stream);
      if (plan.tile == TileKind::kFlat) return launch_private<T, kWide, FlatTile>(args, stream);
    }
    return launch_private<T, kWide, SmallTile>(args, stream);
  }
  if constexpr (kWide) {
    if (plan.tile == TileKind::kLarge) {
      return launch_stored<LargeTile>(fprop_stored<T, kWide, LargeTile>, args, stream);
    }
  }
  if (plan.tile == TileKind::kTall) {
    return launch_stored<TallTile>(fprop_stored<T, kWide, TallTile>, args, stream);
  }
  return launch_stored<SmallTile>(fprop_stored<T, kWide, SmallTile>, args, stream);
}

template <typename T>
int launch_fprop(const FpropArgs& args, const FpropPlan& plan, StreamHandle stream) {
  return wide_gather(args.gather_unit) ? launch_fprop_as<T, true>(args, plan, stream)
                                       : launch_fprop_as<T, false>(args, plan, stream);
}

}  // namespace fbc::cuda
