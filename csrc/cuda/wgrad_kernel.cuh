// Weight gradient of a convolution by tensor cores, with the sums that a posterior's gradient
// needs.
//
//   slabs[z][k,r,s,c]     = sum over draws s' of dW_s'              over the pixels of slab z
//   slabs_eps[z][k,r,s,c] = sum over draws s' of dW_s' * eps_s'
//   dW_s'[k,r,s,c]        = sum over n,p,q of draw s'  grad[n,p,q,k] * input[n, h(p,r), w(q,s), c]
//
// A product of matrices: M = filters of the group, N = columns (r, s, c), summed over pixels.
//
//            columns                4 warps, 2 x 2, of 32 filters x half the columns: 128 columns,
//            64
//          +---------+---------+    for tf32 or unaligned operands. With draws an element has three
//   filters| warp 0  | warp 1  |    sums (the draw's product, all, all times eps): warps of 16 x
//   32,
//     64   +---------+---------+    eight of them, or four and 32 filters (tf32, unaligned).
//          | warp 2  | warp 3  |    A stage (of three): kDepth pixels x filters of grad, kDepth
//          pixels
//          +---------+---------+    x columns of input; kDepth = 32 pixels (16-bit) or 16 (tf32)
//
// Both operands lie with the pixels down the columns of their tiles and are transposed by the
// loads. The pixels of a step are located by one warp, a step before they are copied.
//
// Pixels are cut into steps of kDepth pixels of one draw, in the order (draw, n, p, q); slab z
// takes an equal run of steps, cut by the shape alone. A block owns one tile of one slab, writes
// each of its elements once and adds in index order: no atomics, no order that depends on the
// machine. At the end of a draw (or of the slab within it) the product is moved to the running
// sums, with eps made again from its address.
//
// Alignment: kAligned copies 16 bytes of channels at a time; otherwise each operand whose strides
// do not allow it goes element by element (1 or 3 channels, odd K). Zeros replace what lies
// outside.
//
// Sources: implicit GEMM, cuDNN (arXiv 1410.0759) section 3; multi-stage cp.async pipeline and
// XOR-swizzled tiles, CUTLASS 2.x (include/cutlass/gemm/threadblock/mma_multistage.h).
#pragma once

#include "noise_quad.cuh"
#include "wgrad_tile.cuh"

namespace fbc::cuda {

template <typename Tile, bool kDraws>
struct WgradSums {
  static constexpr int kTall = Tile::kTall;
  static constexpr int kWide = 2 * Tile::kPairs;
  float product[kTall][kWide][4];
  float sum[kDraws ? kTall : 1][kDraws ? kWide : 1][4];
  float sum_eps[kDraws ? kTall : 1][kDraws ? kWide : 1][4];
};

template <int kM, int kN>
FBC_DEVICE void clear(float (&x)[kM][kN][4]) {
  FBC_UNROLL
  for (int i = 0; i < kM; ++i) {
    FBC_UNROLL
    for (int j = 0; j < kN; ++j) {
      FBC_UNROLL
      for (int e = 0; e < 4; ++e) x[i][j][e] = 0.0f;
    }
  }
}

template <typename T, typename Tile, bool kDraws>
FBC_DEVICE void wgrad_multiply(WgradSums<Tile, kDraws>& sums, const unsigned char* stage, const WgradPlace& place) {
  FBC_UNROLL
  for (int row = 0; row < Tile::kDepth; row += kMmaDepth<T>) {
    uint32_t a[Tile::kTall][4], b[Tile::kPairs][4];
    FBC_UNROLL
    for (int i = 0; i < Tile::kTall; ++i) {
      load_a_transposed<T, Tile::kGradChunks>(a[i], stage, row, place.warp_row + 16 * i, place.lane);
    }
    FBC_UNROLL
    for (int j = 0; j < Tile::kPairs; ++j) {
      load_b_transposed<T, Tile::kInputChunks>(b[j], stage + Tile::kGradBytes, row, place.warp_column + 16 * j,
                                               place.lane);
    }
    multiply<T>(sums.product, a, b);
  }
}

// sum += product, sum_eps += product * eps, product = 0. Four lanes hold eight columns of rows g
// and g + 8; a pair of lanes draws four neighbours of either row and swaps halves.
template <typename Tile>
FBC_DEVICE void wgrad_finish_draw(const WgradArgs& a, WgradSums<Tile, true>& sums, const WgradPlace& place,
                                  int32_t draw) {
  const NoiseKey noise = {static_cast<uint64_t>(a.seed[0]),
                          static_cast<uint64_t>(a.seed[1]) + a.noise.offset + static_cast<uint64_t>(draw)};
  const bool odd = (place.lane & 1) != 0;
  FBC_UNROLL
  for (int i = 0; i < Tile::kTall; ++i) {
    const int64_t k = static_cast<int64_t>(place.group) * a.shape.K + place.filter_of(i, odd ? 1 : 0);
    FBC_UNROLL
    for (int j = 0; j < 2 * Tile::kPairs; ++j) {
      const int64_t column = place.column_of(j) + (place.lane & 2) * 2;
      float z[4];
      normal_quad(noise, a.stream, a.element_offset + static_cast<uint64_t>(k * a.shape.columns + column), z);
      const float other0 = gpu::shuffle_xor(odd ? z[0] : z[2], 1);
      const float other1 = gpu::shuffle_xor(odd ? z[1] : z[3], 1);
      const float eps[4] = {odd ? other0 : z[0], odd ? other1 : z[1], odd ? z[2] : other0, odd ? z[3] : other1};
      FBC_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float product = sums.product[i][j][e];
        sums.sum[i][j][e] += product;
        sums.sum_eps[i][j][e] = fused_multiply_add(product, eps[e], sums.sum_eps[i][j][e]);
        sums.product[i][j][e] = 0.0f;
      }
    }
  }
}

// Sums of a tile -> slab: column pairs as float2 where the rows of the slab begin on 8 bytes.
template <int kTall, int kWide>
FBC_DEVICE void wgrad_store(const WgradArgs& a, const float (&sums)[kTall][kWide][4], float* slab,
                            const WgradPlace& place) {
  const bool paired = a.shape.columns % 2 == 0 && reinterpret_cast<uintptr_t>(slab) % 8 == 0;
  FBC_UNROLL
  for (int i = 0; i < kTall; ++i) {
    FBC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t filter = place.filter_of(i, half);
      if (filter >= a.shape.K) continue;
      float* row = slab + (static_cast<int64_t>(place.group) * a.shape.K + filter) * a.shape.columns;
      FBC_UNROLL
      for (int j = 0; j < kWide; ++j) {
        const int32_t column = place.column_of(j) + (place.lane & 3) * 2;
        const float x = sums[i][j][2 * half], y = sums[i][j][2 * half + 1];
        if (paired) {
          if (column < a.shape.columns) *reinterpret_cast<float2*>(row + column) = make_float2(x, y);
        } else {
          if (column < a.shape.columns) row[column] = x;
          if (column + 1 < a.shape.columns) row[column + 1] = y;
        }
      }
    }
  }
}

// Block index = ((slab * groups + group) * filter_tiles + filter tile) * column_tiles + column
// tile: neighbours read the same gradient.
template <typename Tile>
FBC_DEVICE WgradPlace wgrad_place(const WgradArgs& a) {
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int32_t block = static_cast<int32_t>(blockIdx.x), tile = block / a.column_tiles;
  const int32_t slice = tile / a.filter_tiles;
  WgradPlace place;
  place.column = (block - tile * a.column_tiles) * Tile::kColumns;
  place.filter = (tile - slice * a.filter_tiles) * Tile::kFilters;
  place.slab = slice / a.shape.groups;
  place.group = slice - place.slab * a.shape.groups;
  place.warp_row = warp / 2 * 16 * Tile::kTall;
  place.warp_column = warp % 2 * (Tile::kColumns / 2);
  place.lane = static_cast<int>(threadIdx.x) & 31;
  return place;
}

template <typename T, bool kDraws, bool kAligned>
FBC_KERNEL((WgradTile<T, kDraws, kAligned>::kThreads), (WgradTile<T, kDraws, kAligned>::kBlocks))
void wgrad_kernel(FBC_PARAM WgradArgs a) {
  using Tile = WgradTile<T, kDraws, kAligned>;
  WgradShared<Tile>& shared = *reinterpret_cast<WgradShared<Tile>*>(gpu::shared());
  const int thread = static_cast<int>(threadIdx.x), warp = thread >> 5;
  const WgradPlace place = wgrad_place<Tile>(a);
  const int64_t begin = place.slab * a.steps / a.slab_count;
  const int64_t end = (place.slab + 1) * a.steps / a.slab_count;
  const int32_t steps = static_cast<int32_t>(end - begin);
  PixelWalk at(a, begin, Tile::kDepth);
  int32_t draw = at.draw, steps_left = at.steps_left;  // of the step to be multiplied next
  const WgradLoader<T, kDraws, kAligned> loader(a, place);
  WgradSums<Tile, kDraws> sums;
  clear(sums.product);
  if constexpr (kDraws) {
    clear(sums.sum);
    clear(sums.sum_eps);
  }

  // Turn t multiplies step t - 2, copies step t and locates step t + 1.
  wgrad_locate(a, at, thread, 0, shared);
  int stage = Tile::kStages - 1, buffer = 0;
  for (int32_t left = steps + Tile::kStages - 1; left > 0; --left) {
    stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
    gpu::copy_wait<Tile::kStages - 2>();
    gpu::sync();  // this stage has arrived, and nobody reads the one before it any more
    if (left >= Tile::kStages) loader.load(shared, buffer, stage == 0 ? Tile::kStages - 1 : stage - 1);
    gpu::copy_commit();
    buffer ^= 1;
    if (left > Tile::kStages) {
      at.advance(a, Tile::kDepth);
      if (warp == (left & (Tile::kThreads / 32 - 1))) {
        wgrad_locate(a, at, place.lane, buffer, shared);
      }
    }
    if (left > steps) continue;
    wgrad_multiply<T>(sums, shared.stage[stage], place);
    if constexpr (kDraws) {
      if (--steps_left == 0 || left == 1) {
        wgrad_finish_draw(a, sums, place, draw);
        ++draw;
        steps_left = a.steps_per_draw;
      }
    }
  }
  gpu::copy_wait<0>();

  const int64_t base = int64_t{place.slab} * a.shape.groups * a.shape.K * a.shape.columns;
  if constexpr (kDraws) {
    wgrad_store(a, sums.sum, a.slabs + base, place);
    wgrad_store(a, sums.sum_eps, a.slabs_eps + base, place);
  } else {
    wgrad_store(a, sums.product, a.slabs + base, place);
  }
}

}  // namespace fbc::cuda
