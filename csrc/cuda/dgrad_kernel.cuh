// Data gradient of a convolution by tensor cores.
//
//   grad_input[n,h,w,c] = sum over draws s' of n, over r,s,k   grad[n,p,q,k] * W_s'[k,r,s,c]
//                         with p * stride_h = h + pad_top - r * dilation_h   (q alike)
//
// A product of matrices per group: M = input pixels, N = channels, summed over (tap, filter).
//
//             64 channels              4 warps, 2 x 2, of 64 pixels x 32 channels
//           +------+------+            a stage (of three), kDepth = 32 (16-bit) or 16 (tf32):
//    128    | w0   | w1   |              grad    128 pixels x kDepth filters: rows of 64 bytes
//    pixels +------+------+              weights kDepth (tap, filter) x 64 channels, transposed by
//           | w2   | w3   |                      the loads (KRSC memory has channels innermost)
//           +------+------+
//
// Phases: pixels with the same (h mod stride_h, w mod stride_w) meet the same taps, so a tile holds
// pixels of one phase, and only the taps that exist for it are enumerated: r = r0 + i * tap_step.
// Within a phase, pixel i along h reads output i + shift + tap * step: addresses and a bounds test,
// as in the forward direction. Addresses are found once a tap and move on by kDepth filters a step.
// A phase without taps (a 1 x 1 filter with stride 2 has three) gets zeros, and so do pixels that
// no output reads: every element is written.
//
// A tile belongs to one draw, or with share_input sums over the draws, in order, inside the block:
// no atomics. Order of a sum: draw, tap, filter. Where there are few tiles, several blocks share
// the steps of each, and the last one adds their sums in order (split_sum.cuh). All of it depends
// on the shape alone.
//
// Weights: given in memory, or (kPrivate) sampled by each block one stage ahead, with the bits that
// sample() writes; nothing of a weight's size is then in memory.
//
// Alignment: kAligned copies 16 bytes of filters (grad) and of channels (weights) at a time;
// otherwise each operand that does not allow it goes element by element (odd K, 1 or 3 channels).
//
// Sources: strided data gradient by phases, CUTLASS 2.x implicit_gemm_convolution_strided_dgrad.h.
#pragma once

#include "dgrad_tile.cuh"

#include <type_traits>

namespace fbc::cuda {

template <typename T>
FBC_DEVICE void dgrad_multiply(Accumulators<DgradTile>& acc, const unsigned char* stage, int warp, int lane) {
  using Tile = DgradTile;
  constexpr int kChunks = Tile::kChannels / kChunkElements<T>;
  const int pixel = warp / Tile::kWarpColumns * Tile::kWarpPixels;
  const int channel = warp % Tile::kWarpColumns * Tile::kWarpChannels;
  FBC_UNROLL
  for (int chunk = 0; chunk < kRowChunks; chunk += 2) {
    uint32_t a[Tile::kM][4], b[Tile::kN][4];
    FBC_UNROLL
    for (int j = 0; j < Tile::kN; ++j) {
      load_b_transposed<T, kChunks>(b[j], stage + Tile::kWeights, chunk * kChunkElements<T>, channel + 16 * j, lane);
    }
    FBC_UNROLL
    for (int i = 0; i < Tile::kM; ++i) {
      load_a<T, kRowChunks>(a[i], stage, pixel + 16 * i, chunk, lane);
    }
    multiply<T, Tile::kM, Tile::kN>(acc.value, a, b);
  }
}

// What is loaded next: a step of the reduction of one draw.
template <typename T, bool kPrivate, bool kAligned>
struct DgradLoader {
  const DgradArgs& a;
  const DgradShared& shared;
  int32_t group, channel;    // channel: the tile's first
  int32_t draw, steps_left;  // of the draw
  DgradGrad<T, kAligned> grad;
  std::conditional_t<kPrivate, SampledWeight<T>, GivenWeight<T, kAligned>> weight;

  FBC_DEVICE DgradLoader(const DgradArgs& args, const DgradShared& memory, int32_t in_group, int32_t first_channel,
                         int32_t first_draw, int32_t first_step)
      : a(args), shared(memory), group(in_group), channel(first_channel), draw(first_draw) {
    start_draw(first_step);
  }
  FBC_DEVICE void start_draw(int32_t step) {
    steps_left = covers(shared.phase.depth, kDepth<T>) - step;
    grad.start(a, shared, group, draw, step * kDepth<T>);
    weight.start(a, shared, group, channel, draw, step * kDepth<T>);
  }
  FBC_DEVICE void load(unsigned char* stage) {
    grad.load(a, shared, stage);
    weight.load(a, shared, stage);
    if (--steps_left == 0) {
      ++draw;
      start_draw(0);
    } else {
      grad.advance(a, shared);
      weight.advance(a, shared);
    }
  }
};

template <typename T>
FBC_DEVICE void dgrad_share(const DgradArgs& a, int32_t phase, DgradShared& shared) {
  shared.phase = Phase(a, phase);
  shared.depth_step = tap_of(kDepth<T>, shared.phase.taps);
  shared.row_step = tap_of(WeightRows<T, 4>::kRowStep, shared.phase.taps);
}

// Block index = ((((split * groups + group) * tile_draws + draw) * phases + phase) * pixel_tiles +
// pixel tile) * channel_tiles + channel tile: neighbours read the same gradient.
template <typename T, bool kPrivate, bool kAligned>
FBC_KERNEL(128, 3)
void dgrad_kernel(FBC_PARAM DgradArgs a) {
  using Tile = DgradTile;
  DgradShared& shared = *reinterpret_cast<DgradShared*>(gpu::shared());
  const int thread = static_cast<int>(threadIdx.x), warp = thread >> 5, lane = thread & 31;
  int32_t index = static_cast<int32_t>(blockIdx.x) % a.tiles;
  const int32_t channel = index % a.channel_tiles * Tile::kChannels;
  index /= a.channel_tiles;
  const int32_t first_pixel = index % a.pixel_tiles * Tile::kPixels;
  index /= a.pixel_tiles;
  if (thread == 0) dgrad_share<T>(a, index % a.phases, shared);
  index /= a.phases;
  const int32_t draw = index % a.tile_draws, group = index / a.tile_draws;
  gpu::sync();
  const Phase& phase = shared.phase;
  if (first_pixel >= a.shape.rows * phase.h.extent * phase.w.extent) return;  // a smaller phase

  dgrad_locate(a, phase, first_pixel, int64_t{draw} * a.shape.rows, shared.tile);
  gpu::sync();
  const int32_t draws = a.shape.share_input ? a.shape.num_samples : 1;
  const int32_t steps_each = a.shape.P > 0 && a.shape.Q > 0 ? covers(phase.depth, kDepth<T>) : 0;  // of a draw
  StepRange range = {0, draws * steps_each};
  if (a.sum.splits > 1 && range.end > 0) {
    range = split_range(range.end, a.sum.splits, static_cast<int32_t>(blockIdx.x) / a.tiles);
  }
  const int32_t steps = range.end - range.begin;
  const int32_t before = range.begin == 0 ? 0 : range.begin / steps_each;  // draws
  DgradLoader<T, kPrivate, kAligned> loader(a, shared, group, channel, draw + before,
                                            range.begin - before * steps_each);
  const auto load = [&](int stage, bool any) {
    if (any) loader.load(shared.tile.stage[stage]);
    gpu::copy_commit();
  };
  Accumulators<Tile> acc;
  acc.clear();
  for (int i = 0; i < Tile::kStages - 1; ++i) load(i, i < steps);
  int stage = 0;
  for (int32_t left = steps; left > 0; --left) {
    gpu::copy_wait<Tile::kStages - 2>();
    gpu::sync();  // this stage has arrived, and nobody reads the one before it any more
    load(stage == 0 ? Tile::kStages - 1 : stage - 1, left >= Tile::kStages);
    dgrad_multiply<T>(acc, shared.tile.stage[stage], warp, lane);
    stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
  }
  gpu::copy_wait<0>();
  gpu::sync();
  if (a.sum.splits > 1) {
    const int32_t block = static_cast<int32_t>(blockIdx.x), split = block / a.tiles;
    const int32_t pixels = a.shape.rows * phase.h.extent * phase.w.extent - first_pixel;
    if (!add_splits(acc, a.sum, block - split * a.tiles, split, pixels, a.shape.C - channel, shared.tile.scratch)) {
      return;
    }
  }
  const OutputView view = {a.grad_input, nullptr, a.input_stride, nullptr, Activation::kLinear, 0.0f, a.pack};
  store_tile<T>(acc, shared.tile, view, nullptr, group * a.shape.C + channel, (group + 1) * a.shape.C, warp, lane);
}

}  // namespace fbc::cuda
