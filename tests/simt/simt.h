// The names of csrc/cuda/gpu.cuh on the host interpreter (scheduler.h).
#pragma once

#include <algorithm>
#include <cmath>

#include "core/types.h"
#include "scheduler.h"

#define FBC_KERNEL(threads, blocks) inline
#define FBC_DEVICE inline
#define FBC_PARAM const
#define threadIdx (::fbc::simt::block->current->index)
#define blockIdx (::fbc::simt::block->index)
#define blockDim (::fbc::simt::block->threads_extent)
#define gridDim (::fbc::simt::block->grid_extent)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace fbc::gpu {

inline unsigned char* shared() { return simt::block->shared; }
inline void sync() { simt::barrier(); }
inline void sync_warp() {
  simt::collective("sync_warp", nullptr, [](void**) {});
}

template <typename T>
inline T shuffle_xor(T value, int mask) {
  struct Argument {
    T in, out;
    int mask;
  } a{value, T{}, mask};
  simt::collective("shuffle_xor", &a, [](void** slot) {
    for (int i = 0; i < 32; ++i) {
      auto* mine = static_cast<Argument*>(slot[i]);
      mine->out = static_cast<Argument*>(slot[i ^ mine->mask])->in;
    }
  });
  return a.out;
}

inline void expect_shared(const char* operation, const void* p, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(p);
  const simt::Block& b = *simt::block;
  if (at < b.shared || at + bytes > b.shared + b.shared_bytes) {
    simt::fail(operation, ": address outside shared memory");
  }
  if (reinterpret_cast<uintptr_t>(p) % bytes) simt::fail(operation, ": misaligned shared address");
}

template <int kBytes>
inline void copy_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  expect_shared("copy_async", shared, kBytes);
  if (valid && reinterpret_cast<uintptr_t>(global) % kBytes) {
    simt::fail("copy_async: misaligned global address");
  }
  simt::block->current->open.push_back({shared, global, kBytes, valid});
}
inline void copy_commit() {
  simt::Thread* t = simt::block->current;
  t->groups.push_back(std::move(t->open));
  t->open.clear();
}
template <int kPending>
inline void copy_wait() {
  auto& groups = simt::block->current->groups;
  while (static_cast<int>(groups.size()) > kPending) {
    for (const simt::Copy& c : groups.front()) {
      if (c.valid) {
        std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
      } else {
        std::memset(c.to, 0, static_cast<size_t>(c.bytes));
      }
    }
    groups.erase(groups.begin());
  }
}

template <bool kTransposed>
inline void load_matrices_any(uint32_t (&r)[4], const void* row) {
  struct Argument {
    uint32_t* r;
    const unsigned char* row;
  } a{r, static_cast<const unsigned char*>(row)};
  expect_shared("load_matrices", row, 16);
  const char* name = kTransposed ? "load_matrices_transposed" : "load_matrices";
  simt::collective(name, &a, [](void** slot) {
    uint16_t matrix[4][8][8];
    for (int l = 0; l < 32; ++l)
      std::memcpy(matrix[l / 8][l % 8], static_cast<Argument*>(slot[l])->row, 16);
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int m = 0; m < 4; ++m) {
        const uint16_t low = kTransposed ? matrix[m][2 * t][g] : matrix[m][g][2 * t];
        const uint16_t high = kTransposed ? matrix[m][2 * t + 1][g] : matrix[m][g][2 * t + 1];
        static_cast<Argument*>(slot[l])->r[m] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices_any<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices_any<true>(r, row);
}

template <typename T>
inline float half_of(uint32_t pair, int which) {
  const T value = {static_cast<uint16_t>(pair >> (16 * which))};
  return load_as_acc(&value);
}

struct MmaArgument {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
// kDepth columns of a; unpack(word, which) gives the values of a register.
template <int kDepth, typename Unpack>
inline void mma_any(const char* name, MmaArgument* argument, Unpack unpack) {
  simt::collective(name, argument, [unpack](void** slot) {
    constexpr int kPerWord = kDepth / 8;
    float a[16][kDepth], b[kDepth][8], c[16][8];
    for (int l = 0; l < 32; ++l) {
      const auto* q = static_cast<const MmaArgument*>(slot[l]);
      const int g = l >> 2, t = l & 3;
      for (int e = 0; e < kPerWord; ++e) {
        const int k = t * kPerWord + e;
        for (int i = 0; i < 4; ++i) a[g + (i & 1) * 8][k + (i >> 1) * (kDepth / 2)] = unpack(q->a[i], e);
        for (int i = 0; i < 2; ++i) b[k + i * (kDepth / 2)][g] = unpack(q->b[i], e);
      }
      for (int i = 0; i < 4; ++i) c[g + (i >> 1) * 8][t * 2 + (i & 1)] = q->c[i];
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < kDepth; ++k)
        for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 32; ++l) {
      const auto* q = static_cast<const MmaArgument*>(slot[l]);
      for (int i = 0; i < 4; ++i) q->c[i] = c[(l >> 2) + (i >> 1) * 8][(l & 3) * 2 + (i & 1)];
    }
  });
}
inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaArgument q{c, a, {b0, b1}};
  mma_any<16>("mma_bfloat16", &q, [](uint32_t w, int e) { return half_of<BFloat16>(w, e); });
}
inline void mma_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaArgument q{c, a, {b0, b1}};
  mma_any<16>("mma_float16", &q, [](uint32_t w, int e) { return half_of<Half>(w, e); });
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaArgument q{c, a, {b0, b1}};
  mma_any<8>("mma_tf32", &q, [](uint32_t w, int) { return bits_to_float(w & 0xffffe000u); });
}
inline uint32_t to_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  return value != value ? bits : (bits + 0x1000u) & 0xffffe000u;
}

template <typename T>
inline uint32_t pack_pair(float low, float high) {
  T a, b;
  store_from_acc(&a, low);
  store_from_acc(&b, high);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
inline uint32_t pack_bfloat16(float low, float high) { return pack_pair<BFloat16>(low, high); }
inline uint32_t pack_float16(float low, float high) { return pack_pair<Half>(low, high); }

inline void add_release(uint32_t* counter, uint32_t value) {
  simt::maybe_preempt(4);
  __atomic_add_fetch(counter, value, __ATOMIC_RELEASE);
}
inline void wait_at_least(const uint32_t* counter, uint32_t value) {
  for (int turns = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; ++turns) {
    if (turns > 20000000) simt::fail("deadlock in wait_at_least");
    simt::let_others_run();
  }
}
inline uint32_t take_ticket(uint32_t* counter) {
  simt::maybe_preempt(4);
  return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
}

template <typename... Params>
int launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void*,
           const Params&... params) {
  simt::run_grid(grid, threads, shared_bytes, [&] { kernel(params...); });
  return 0;
}
template <typename... Params>
int launch_cooperative(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void*,
                       const Params&... params) {
  simt::run_cooperative(grid, threads, shared_bytes, [&] { kernel(params...); });
  return 0;
}
template <typename... Params>
int resident_blocks(void (*)(Params...), int, size_t, int* blocks) {
  *blocks = simt::settings().resident_blocks;
  return 0;
}
inline int fill_zero(void* memory, size_t bytes, void*) {
  std::memset(memory, 0, bytes);
  return 0;
}

}  // namespace fbc::gpu
