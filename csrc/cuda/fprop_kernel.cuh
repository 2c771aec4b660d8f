// Forward convolution as an implicit matrix product on the tensor cores.
//
//   output[m][k] = activation(sum over columns of window[m][column] * weight[k][column] + bias[k])
//
//   m       pixel (n, p, q) of the rows of one draw        blocks: kPixels of them, of one draw
//   k       filter of one group                            blocks: kChannels of them, of one group
//   column  (r * S + s) * C + c of one group               steps of kDepth (64 bytes)
//
//                    weights [kChannels][64 B] x stages     one step:
//                    +--+--+--+                               wait for its copies, sync
//                    |  |  |  |                               start the copies of a later step
//   windows          +--+--+--+                               (sample the next step's weights)
//   [kPixels]  +--+  |        |                               multiply
//   [64 B]     |  |  |  sums  |  in registers; a warp owns 64 x 32 or 32 x 32 of them
//              +--+  +--------+
//
// Windows are gathered by cp.async with zero fill (conv_geometry.cuh), a stage is free once all
// warps have passed the barrier after its product. Two kernels, by where weights come from:
//
//   fprop_stored    from memory: given, or sampled by all blocks together in a first phase
//                   (weight_slab.cuh). Persistent: a block takes tiles blockIdx.x, + gridDim.x, ...
//   fprop_private   each block samples the weights of its tile, one step ahead of the product, half
//                   of the warps before and half after their product, so that both units are busy
//
// Where there are few tiles, several blocks share the steps of each (a tile of the launch is then a
// split of one), sample only the weights of their own, and the last one adds their sums in order
// (split_sum.cuh). Nobody waits for another split, so progress is that of weight_slab.cuh.
//
// Bounds: pixels beyond the last and columns beyond R * S * C read zeros, channels beyond the
// group's are not stored. Alignment: gather_unit(), weight_unit, output_pack() say what may be
// moved at once.
#pragma once

#include "fprop_args.cuh"

namespace fbc::cuda {

// Neighbouring blocks share the windows of a pixel tile; draws come one after another, and of a
// draw the splits in the order in which their weights are sampled.
template <typename Tile>
FBC_DEVICE TilePosition stored_tile(const FpropArgs& args, int32_t tile) {
  const int32_t channel_tiles = args.channel_tiles * args.conv.groups;
  const int32_t channel = tile % channel_tiles, rest = tile / channel_tiles;
  const int32_t outer = rest / args.pixel_tiles, splits = Tile::kSplits ? args.sum.splits : 1;
  return {outer / splits, channel / args.channel_tiles, channel % args.channel_tiles, rest % args.pixel_tiles,
          outer % splits};
}
// Neighbouring blocks sample the same weights of different draws: they share loc and scale.
template <typename Tile>
FBC_DEVICE TilePosition private_tile(const FpropArgs& args, int32_t tile) {
  const int32_t draw = tile % args.conv.num_samples, inner = tile / args.conv.num_samples;
  const int32_t splits = Tile::kSplits ? args.sum.splits : 1, rest = inner / splits;
  const int32_t channel = rest / args.pixel_tiles;
  return {draw, channel / args.channel_tiles, channel % args.channel_tiles, rest % args.pixel_tiles, inner % splits};
}
template <typename Tile>
FBC_DEVICE StepRange steps_of(const FpropArgs& args, const TilePosition& at) {
  if constexpr (Tile::kSplits) {
    return split_range(args.steps, args.sum.splits, at.split);
  } else {
    return {0, args.steps};
  }
}

template <typename T>
FBC_DEVICE ImageView<T> input_view(const FpropArgs& args) {
  return {static_cast<const T*>(args.input), args.input_stride.h, args.input_stride.w, args.step, args.gather_unit};
}

// Fills the tables of a tile, once every warp has done with those of the tile before.
template <typename Tile>
FBC_DEVICE void begin_tile(ConvShared<Tile>& shared, const FpropArgs& args, const TilePosition& at) {
  const ConvGeometry& g = args.conv;
  gpu::sync();
  const int32_t first = at.pixel_tile * Tile::kPixels;
  locate_pixels<Tile::kPixels, Tile::kThreads>(shared.rows, first, at.draw, at.group * g.C, args.input_stride, g);
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kPixels; i += Tile::kThreads) {
    int64_t offset = kNoOutput;
    if (first + i < g.pixels) {
      const PixelIndex pixel = pixel_index(first + i, g);
      const ImageStrides& stride = args.output.stride;
      offset = (int64_t{at.draw} * g.rows + pixel.n) * stride.n + pixel.p * stride.h + pixel.q * stride.w;
    }
    shared.out[i] = offset;
  }
  gpu::sync();
}

template <typename T, typename Tile>
FBC_DEVICE void end_tile(ConvShared<Tile>& shared, const FpropArgs& args, const TilePosition& at,
                         Accumulators<Tile>& acc, int warp, int lane) {
  const int32_t begin = at.group * args.conv.K;
  const float* bias = args.output.bias;
  if (bias != nullptr) bias += static_cast<int64_t>(at.draw) * args.conv.groups * args.conv.K;
  gpu::copy_wait<0>();
  gpu::sync();
  if constexpr (Tile::kSplits) {
    if (args.sum.splits > 1) {
      const int32_t images = at.draw * args.conv.groups + at.group;
      const int32_t tile = (images * args.pixel_tiles + at.pixel_tile) * args.channel_tiles + at.channel_tile;
      const int32_t pixels = args.conv.pixels - at.pixel_tile * Tile::kPixels;
      const int32_t channels = args.conv.K - at.channel_tile * Tile::kChannels;
      if (!add_splits(acc, args.sum, tile, at.split, pixels, channels, shared.scratch)) return;
    }
  }
  store_tile<T, Tile>(acc, shared, args.output, bias, begin + at.channel_tile * Tile::kChannels, begin + args.conv.K,
                      warp, lane);
}

template <typename T, bool kWide, typename Tile>
FBC_DEVICE void stored_product(ConvShared<Tile>& shared, const FpropArgs& args, const TilePosition& at,
                               SlabWatch& watch, Accumulators<Tile>& acc, int warp, int lane) {
  constexpr int kStages = Tile::kStages;
  const int thread = static_cast<int>(threadIdx.x);
  const ImageView<T> image = input_view<T>(args);
  const StepRange steps = steps_of<Tile>(args, at);
  StoredRows<Tile> weights(args.weights, at, steps.begin, args.conv, thread);
  PixelGather<T, kWide, Tile::kPixels, Tile::kThreads> gather(thread, steps.begin * kDepth<T>, args.conv);
  watch.begin_tile(args.slabs, at.draw, Tile::kSplits && args.sum.splits > 1);
  const auto start = [&](int32_t step, int into) {
    if (step < steps.end) {
      gather.copy(shared.stage[into], shared.rows, image, args.conv);
      gather.advance(image, args.conv);
      watch.wait(args.slabs, step, steps.end);
      weights.copy(shared.stage[into], args.weights);
      weights.advance(args.weights);
    }
    gpu::copy_commit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) start(steps.begin + stage, stage);
  int now = 0;  // the stage of this step; the one before it has just become free
  FBC_ROLLED
  for (int32_t step = steps.begin; step < steps.end; ++step) {
    gpu::copy_wait<kStages - 2>();
    gpu::sync();
    start(step + kStages - 1, now == 0 ? kStages - 1 : now - 1);
    multiply_stage<T, Tile>(acc, shared.stage[now], warp, lane);
    now = now == kStages - 1 ? 0 : now + 1;
  }
}

template <typename T, bool kWide, typename Tile>
FBC_KERNEL(Tile::kThreads, Tile::kBlocks)
void fprop_stored(FBC_PARAM FpropArgs args) {
  ConvShared<Tile>& shared = conv_shared<Tile>();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  SlabWatch watch = {INT32_MAX, 0};
  if (args.slabs.tasks > 0) {
    sample_slabs<T, Tile::kThreads>(args.slabs, args.sampler, args.conv.num_samples,
                                    kept_weight<T>(args.kept, args.sampler), args.kl, shared.scratch);
    watch.ready = 0;
  }
  for (int32_t tile = static_cast<int32_t>(blockIdx.x); tile < args.tiles; tile += static_cast<int32_t>(gridDim.x)) {
    const TilePosition at = stored_tile<Tile>(args, tile);
    Accumulators<Tile> acc;
    acc.clear();
    begin_tile(shared, args, at);
    stored_product<T, kWide, Tile>(shared, args, at, watch, acc, warp, lane);
    end_tile<T, Tile>(shared, args, at, acc, warp, lane);
  }
}

// Samples the weights of one step of the tile into its stage.
template <typename T, typename Tile>
FBC_DEVICE void sample_stage(unsigned char* stage, const FpropArgs& args, const TilePosition& at, NoiseKey key,
                             int32_t step) {
  constexpr int kRowQuads = kDepth<T> / 4, kQuads = Tile::kChannels * kRowQuads;
  static_assert(kQuads % Tile::kThreads == 0, "threads share the tile evenly");
  const WeightSampler& w = args.sampler;
  FBC_ROLLED
  for (int number = static_cast<int>(threadIdx.x); number < kQuads; number += Tile::kThreads) {
    const int row = number / kRowQuads, element = number % kRowQuads * 4;
    const int32_t filter = at.channel_tile * Tile::kChannels + row;
    const int32_t k = at.group * args.conv.K + filter, column = step * kDepth<T> + element;
    float value[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (filter < args.conv.K && column < w.columns) {
      float eps[4];
      draw_eps_quad(w, key, k, column, eps);
      combine_quad(load_weight_quad(w, k, column, w.columns), eps, value);
      if (args.kept != nullptr && at.pixel_tile == 0) {
        kept_weight<T>(args.kept, w).store(w, at.draw, k, column, value);
      }
    }
    store_weight_quad(reinterpret_cast<T*>(stage + Tile::kWeights + tile_offset<T, kRowChunks>(row, element)), value);
  }
}

// The divergence of the tile's filters (of its split's columns), after the product: inside it would
// cost it registers.
template <typename T, typename Tile>
FBC_DEVICE void sum_kl_of_tile(ConvShared<Tile>& shared, const FpropArgs& args, const TilePosition& at) {
  const WeightSampler& w = args.sampler;
  const int32_t first = at.channel_tile * Tile::kChannels, left = args.conv.K - first;
  const int32_t filters = left < Tile::kChannels ? left : Tile::kChannels;
  const StepRange steps = steps_of<Tile>(args, at);
  const int32_t begin = steps.begin * kDepth<T>, end = steps.end * kDepth<T>;
  const int32_t row_quads = covers((end < w.columns ? end : w.columns) - begin, 4);
  double kl = 0.0;
  for (int32_t number = static_cast<int32_t>(threadIdx.x); number < filters * row_quads; number += Tile::kThreads) {
    const int32_t k = at.group * args.conv.K + first + number / row_quads;
    const int32_t column = begin + number % row_quads * 4;
    kl += kl_of_quad(w, load_weight_quad(w, k, column, w.columns), k, column);
  }
  kl = block_sum<Tile::kThreads>(kl, shared.scratch, 0);
  if (threadIdx.x == 0) {
    const int32_t channel = at.group * args.channel_tiles + at.channel_tile;
    args.kl.slot[Tile::kSplits ? channel * args.sum.splits + at.split : channel] = kl;
  }
  finish_kl<Tile::kThreads>(args.kl, static_cast<uint32_t>(args.kl.slots), shared.scratch);
}

template <typename T, bool kWide, typename Tile>
FBC_DEVICE void private_product(ConvShared<Tile>& shared, const FpropArgs& args, const TilePosition& at,
                                Accumulators<Tile>& acc, int warp, int lane) {
  constexpr int kStages = Tile::kStages;
  const ImageView<T> image = input_view<T>(args);
  const NoiseKey key = draw_key(args.sampler, at.draw);
  const bool late = (warp & 4) != 0;  // of two warps on one scheduler one samples, one multiplies
  const StepRange steps = steps_of<Tile>(args, at);
  PixelGather<T, kWide, Tile::kPixels, Tile::kThreads> gather(static_cast<int>(threadIdx.x), steps.begin * kDepth<T>,
                                                              args.conv);
  const auto start = [&](int32_t step, int into) {
    if (step < steps.end) {
      gather.copy(shared.stage[into], shared.rows, image, args.conv);
      gather.advance(image, args.conv);
    }
    gpu::copy_commit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) start(steps.begin + stage, stage);
  sample_stage<T, Tile>(shared.stage[0], args, at, key, steps.begin);
  int now = 0;  // the stage of this step; the one before it has just become free
  FBC_ROLLED
  for (int32_t step = steps.begin; step < steps.end; ++step) {
    gpu::copy_wait<kStages - 2>();
    gpu::sync();
    start(step + kStages - 1, now == 0 ? kStages - 1 : now - 1);
    const int next = now == kStages - 1 ? 0 : now + 1;
    if (late) multiply_stage<T, Tile>(acc, shared.stage[now], warp, lane);
    if (step + 1 < steps.end) {
      sample_stage<T, Tile>(shared.stage[next], args, at, key, step + 1);
    }
    if (!late) multiply_stage<T, Tile>(acc, shared.stage[now], warp, lane);
    now = next;
  }
}

template <typename T, bool kWide, typename Tile>
FBC_KERNEL(Tile::kThreads, Tile::kBlocks)
void fprop_private(FBC_PARAM FpropArgs args) {
  ConvShared<Tile>& shared = conv_shared<Tile>();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) shared.at = private_tile<Tile>(args, static_cast<int32_t>(blockIdx.x));
  gpu::sync();
  const TilePosition& at = shared.at;  // rather than in registers, of which the product needs all
  Accumulators<Tile> acc;
  acc.clear();
  begin_tile(shared, args, at);
  private_product<T, kWide, Tile>(shared, args, at, acc, warp, lane);
  end_tile<T, Tile>(shared, args, at, acc, warp, lane);
  if (args.kl.out != nullptr && at.draw == 0 && at.pixel_tile == 0) {
    sum_kl_of_tile<T, Tile>(shared, args, at);
  }
}

}  // namespace fbc::cuda
