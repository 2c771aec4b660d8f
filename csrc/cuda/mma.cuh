// Tiles in shared memory and the warp-level matrix product, once for the three product types.
//
//   storage    mma             16-byte chunk   depth of one mma (two chunks)
//   BFloat16   m16n8k16        8 elements      16
//   Half       m16n8k16        8 elements      16
//   float      m16n8k8, tf32   4 elements      8
//
// A tile has rows of kChunks chunks. Chunk j of row i lies at chunk j ^ (i mod kChunks) (of a
// 64-byte row at j ^ (i / 2 mod 4)), so that the eight rows of an 8 x 8 matrix fall into different
// banks. An operand lies with its reduction index along the rows ([m][k], [n][k]) or down the
// columns ([k][m], [k][n]: the _transposed functions).
#pragma once

#include "../core/types.h"
#include "gpu.cuh"

namespace fbc {

template <typename T>
struct Mma;
template <>
struct Mma<BFloat16> {
  static FBC_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    gpu::mma_bfloat16(c, a, b0, b1);
  }
  static FBC_DEVICE uint32_t pack(float low, float high) { return gpu::pack_bfloat16(low, high); }
};
template <>
struct Mma<Half> {
  static FBC_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    gpu::mma_float16(c, a, b0, b1);
  }
  static FBC_DEVICE uint32_t pack(float low, float high) { return gpu::pack_float16(low, high); }
};
template <>
struct Mma<float> {
  static FBC_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    gpu::mma_tf32(c, a, b0, b1);
  }
};

template <typename T>
constexpr int kChunkElements = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kMmaDepth = 2 * kChunkElements<T>;

template <int kChunks>
FBC_DEVICE int chunk_offset(int row, int chunk) {  // bytes from the start of the tile
  static_assert(kChunks == 4 || kChunks == 8 || kChunks == 16, "rows of 64, 128 or 256 bytes");
  const int swizzle = kChunks == 4 ? (row >> 1) & 3 : row & 7;
  return (row * kChunks + (chunk ^ swizzle)) * 16;
}
template <typename T, int kChunks>
FBC_DEVICE int tile_offset(int row, int column) {  // bytes, of one element
  constexpr int kPerChunk = kChunkElements<T>;
  return chunk_offset<kChunks>(row, column / kPerChunk) + column % kPerChunk * static_cast<int>(sizeof(T));
}

template <typename T>
FBC_DEVICE void round_fragment(uint32_t (&r)[4]) {
  if constexpr (sizeof(T) == 4) {
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) r[i] = gpu::to_tf32(bits_to_float(r[i]));
  }
}

// a: rows [row, row + 16) by chunks [chunk, chunk + 2) of a tile [m][k].
template <typename T, int kChunks>
FBC_DEVICE void load_a(uint32_t (&a)[4], const unsigned char* tile, int row, int chunk, int lane) {
  gpu::load_matrices(a, tile + chunk_offset<kChunks>(row + (lane & 15), chunk + (lane >> 4)));
  round_fragment<T>(a);
}
// Two n8 tiles: b[0], b[1] for rows [row, row + 8), b[2], b[3] for [row + 8, row + 16) of [n][k].
template <typename T, int kChunks>
FBC_DEVICE void load_b(uint32_t (&b)[4], const unsigned char* tile, int row, int chunk, int lane) {
  gpu::load_matrices(b, tile + chunk_offset<kChunks>(row + (lane & 7) + (lane >> 4) * 8, chunk + ((lane >> 3) & 1)));
  round_fragment<T>(b);
}
// Of a float tile [k][m] or [k][n], reduction index k of a product's 8 is row transposed_row(k): the
// four rows that a load reads at once then lie in different banks. Where both operands are
// transposed the order does not matter; a tile [k][n] that meets a tile [m][k] is filled with it.
template <typename T>
FBC_DEVICE int transposed_row(int k) {
  if constexpr (sizeof(T) == 2) {
    return k;
  } else {
    return (k & ~7) | ((k & 3) << 1) | ((k >> 2) & 1);
  }
}

// a: columns [column, column + 16) by rows [row, row + depth) of a tile [k][m].
template <typename T, int kChunks>
FBC_DEVICE void load_a_transposed(uint32_t (&a)[4], const unsigned char* tile, int row, int column, int lane) {
  if constexpr (sizeof(T) == 2) {
    gpu::load_matrices_transposed(
        a, tile + chunk_offset<kChunks>(row + (lane & 7) + (lane >> 4) * 8, column / 8 + ((lane >> 3) & 1)));
  } else {
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      a[i] = *reinterpret_cast<const uint32_t*>(
          tile + tile_offset<T, kChunks>(row + 2 * (lane & 3) + (i >> 1), column + (lane >> 2) + 8 * (i & 1)));
    }
    round_fragment<T>(a);
  }
}
// Two n8 tiles: columns [column, column + 16) by rows [row, row + depth) of a tile [k][n].
template <typename T, int kChunks>
FBC_DEVICE void load_b_transposed(uint32_t (&b)[4], const unsigned char* tile, int row, int column, int lane) {
  if constexpr (sizeof(T) == 2) {
    gpu::load_matrices_transposed(
        b, tile + chunk_offset<kChunks>(row + (lane & 7) + ((lane >> 3) & 1) * 8, column / 8 + (lane >> 4)));
  } else {
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      b[i] = *reinterpret_cast<const uint32_t*>(
          tile + tile_offset<T, kChunks>(row + 2 * (lane & 3) + (i & 1), column + (lane >> 2) + 8 * (i >> 1)));
    }
    round_fragment<T>(b);
  }
}

// acc (16 kM x 16 kN) += a * b: kM fragments of a, kN pairs of b. acc[i][2j + h] is the 16 x 8 tile
// i, 2j + h.
template <typename T, int kM, int kN>
FBC_DEVICE void multiply(float (&acc)[kM][2 * kN][4], const uint32_t (&a)[kM][4], const uint32_t (&b)[kN][4]) {
  FBC_UNROLL
  for (int i = 0; i < kM; ++i) {
    FBC_UNROLL
    for (int j = 0; j < 2 * kN; ++j) {
      Mma<T>::multiply(acc[i][j], a[i], b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
    }
  }
}

}  // namespace fbc
