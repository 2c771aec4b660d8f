// One 16-byte chunk of a shared tile from elements that need not lie together in memory.
#pragma once

#include "../core/types.h"
#include "gpu.cuh"
#include "mma.cuh"

namespace fbc::cuda {

// next() gives the address of one element after another, null for a zero; `readable` is any valid
// address. Floats are copied asynchronously, 16-bit elements (cp.async moves 4 bytes at least)
// through registers: both are visible after the copy_wait() and sync() of an asynchronous copy.
template <typename T, typename Next>
FBC_DEVICE void gather_chunk(unsigned char* to, const T* readable, Next next) {
  if constexpr (sizeof(T) == 4) {
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      const T* from = next();
      gpu::copy_async<4>(to + 4 * i, from != nullptr ? from : readable, from != nullptr);
    }
  } else {
    uint32_t pair[4];
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      const T* low = next();
      const T* high = next();
      pair[i] = (low != nullptr ? low->bits : 0u) | (high != nullptr ? high->bits : 0u) << 16;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
}

// Whether chunks of this view can be copied whole: `channels` a group, all strides and the address
// multiples of 16 bytes.
template <typename T>
inline bool chunks_aligned(const void* data, int64_t n, int64_t h, int64_t w, int64_t channels) {
  constexpr int64_t kPerChunk = 16 / static_cast<int64_t>(sizeof(T));
  return (n | h | w | channels) % kPerChunk == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace fbc::cuda
