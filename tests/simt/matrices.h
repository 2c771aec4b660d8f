// The warp-wide matrix instructions of csrc/cuda/gpu.cuh, from their definitions: PTX ISA, sections
// "ldmatrix" and "Matrix Fragments for mma.m16n8k16 / mma.m16n8k8". Sums are float32 in the order
// of k; hardware adds several products at once, so results agree within rounding, not bit by bit.
#pragma once

#include "core/types.h"
#include "scheduler.h"

namespace fbc::simt {

// Four 8 x 8 matrices of 16-bit elements; lane l holds row l % 8 of matrix l / 8.
struct MatricesArgument {
  uint16_t row[8];
  uint32_t* r;
};
template <bool kTransposed>
inline void distribute_matrices(void** lanes) {
  const auto element = [&](int m, int i, int j) {
    return uint32_t{static_cast<const MatricesArgument*>(lanes[m * 8 + i])->row[j]};
  };
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    uint32_t* r = static_cast<MatricesArgument*>(lanes[l])->r;
    for (int m = 0; m < 4; ++m) {
      r[m] = kTransposed ? element(m, 2 * t, g) | element(m, 2 * t + 1, g) << 16
                         : element(m, g, 2 * t) | element(m, g, 2 * t + 1) << 16;
    }
  }
}

struct MmaArgument {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
// c (16 x 8) += a (16 x kDepth) * b (kDepth x 8). unpack(register, which) is an element of it; a
// register holds kDepth / 8 neighbours in k.
template <int kDepth, typename Unpack>
inline void multiply_fragments(void** lanes, Unpack unpack) {
  constexpr int kPerRegister = kDepth / 8;
  float a[16][kDepth], b[kDepth][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto* q = static_cast<const MmaArgument*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < kPerRegister; ++e) {
      const int k = t * kPerRegister + e;
      for (int i = 0; i < 4; ++i) {
        a[g + (i & 1) * 8][k + (i >> 1) * (kDepth / 2)] = unpack(q->a[i], e);
      }
      for (int i = 0; i < 2; ++i) b[k + i * (kDepth / 2)][g] = unpack(q->b[i], e);
    }
    for (int i = 0; i < 4; ++i) c[g + (i >> 1) * 8][t * 2 + (i & 1)] = q->c[i];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int l = 0; l < 32; ++l) {
    const auto* q = static_cast<const MmaArgument*>(lanes[l]);
    for (int i = 0; i < 4; ++i) q->c[i] = c[l / 4 + (i >> 1) * 8][l % 4 * 2 + (i & 1)];
  }
}

template <typename T>
inline float half_of(uint32_t pair, int which) {
  const T value = {static_cast<uint16_t>(pair >> (16 * which))};
  return load_as_acc(&value);
}
inline float tf32_value(uint32_t bits) { return bits_to_float(bits & 0xffffe000u); }

template <typename T>
inline uint32_t pack_pair(float low, float high) {
  T a, b;
  store_from_acc(&a, low);
  store_from_acc(&b, high);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

}  // namespace fbc::simt
