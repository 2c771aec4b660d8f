// The names of csrc/cuda/gpu.cuh on the host interpreter (scheduler.h says what it can show).
#pragma once

#include <cmath>

#include "matrices.h"

#define FBC_KERNEL(threads, blocks) inline
#define FBC_DEVICE inline
#define FBC_PARAM const
#define threadIdx (::fbc::simt::block->current->index)
#define blockIdx (::fbc::simt::block->index)
#define blockDim (::fbc::simt::block->extent)
#define gridDim (::fbc::simt::block->launch->grid)

// Kernels view memory as vectors, which device compilers allow.
#define FBC_SIMT_ALIAS [[gnu::may_alias]]
struct alignas(8) FBC_SIMT_ALIAS float2 {
  float x, y;
};
struct alignas(16) FBC_SIMT_ALIAS float4 {
  float x, y, z, w;
};
struct alignas(16) FBC_SIMT_ALIAS double2 {
  double x, y;
};
struct alignas(8) FBC_SIMT_ALIAS int2 {
  int x, y;
};
struct alignas(16) FBC_SIMT_ALIAS int4 {
  int x, y, z, w;
};
struct alignas(8) FBC_SIMT_ALIAS uint2 {
  unsigned x, y;
};
struct alignas(16) FBC_SIMT_ALIAS uint4 {
  unsigned x, y, z, w;
};
#undef FBC_SIMT_ALIAS
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace fbc::gpu {

using simt::here;
using simt::Site;
constexpr size_t kMaxParameters = 32764;

// ---- threads ----------------------------------------------------------------------------------
inline unsigned char* shared() { return simt::block->shared; }
inline void sync(Site at = here("sync")) { simt::barrier(at); }

inline void sync_warp(Site at = here("sync_warp")) {
  simt::Warp& warp = *simt::block->current->warp;
  char* token = &warp.token[warp.phase & 1];  // phase counts the operations of the whole warp
  simt::before_here(token);
  simt::collective(at, nullptr, [](void**) {});
  simt::after_there(token);
}

// No order of memory: __shfl_xor_sync gives none.
template <typename T>
inline T shuffle_xor(T value, int mask, Site at = here("shuffle_xor")) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  struct Argument {
    T in, out;
    int mask;
  } a{value, T{}, mask};
  simt::collective(at, &a, [](void** lanes) {
    const int mask = static_cast<Argument*>(lanes[0])->mask;
    for (int i = 0; i < 32; ++i) {
      auto* mine = static_cast<Argument*>(lanes[i]);
      if (mine->mask != mask || mask < 0 || mask > 31) {
        simt::fail("lane %d has mask %d, lane 0 mask %d: want one mask, 0 to 31", i, mine->mask, mask);
      }
      mine->out = static_cast<Argument*>(lanes[i ^ mask])->in;
    }
  });
  return a.out;
}

// ---- asynchronous copies ----------------------------------------------------------------------
inline void expect_shared(const void* p, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(p);
  const unsigned char* base = simt::block->shared;
  const size_t size = simt::block->launch->shared_bytes;
  if (at < base || at + bytes > base + size) {
    simt::fail("%zu bytes at offset %td of %zu bytes of shared memory", bytes, at - base, size);
  }
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    simt::fail("misaligned shared address: %zu bytes at offset %td", bytes, at - base);
  }
}
inline void finish_copy(simt::Copy copy) {
  if (copy.done) {
    return;
  } else if (copy.valid) {
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  } else {
    std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
  }
}

// At the wait with seed 0, else there or at once; until then the destination is NaN.
template <int kBytes>
inline void copy_async(void* shared, const void* global, bool valid, Site at = here("copy_async")) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::Copy copy = {shared, global, kBytes, valid, false, 0};
  bool at_once;
  {
    const simt::Quiet quiet;
    simt::Thread& t = simt::enter(at);
    expect_shared(shared, kBytes);
    if (valid && reinterpret_cast<uintptr_t>(global) % kBytes != 0) {
      simt::fail("misaligned global address %p: want a multiple of %d", global, kBytes);
    }
    copy.group = t.open_group;
    at_once = simt::block->launch->seed != 0 && simt::block->random.below(2) == 0;
    copy.done = at_once;
    t.copies.push_back(copy);
  }
  std::memset(shared, 0xff, kBytes);
  copy.done = false;
  if (at_once) {
    finish_copy(copy);
  } else if (valid) {  // a sanitizer's report should name the line of the copy, not of the wait
    volatile unsigned char probe = *static_cast<const unsigned char*>(global);
    probe = static_cast<const unsigned char*>(global)[kBytes - 1];
    (void)probe;
  }
}
inline void copy_commit(Site at = here("copy_commit")) {
  const simt::Quiet quiet;
  ++simt::enter(at).open_group;
}
template <int kPending>
inline void copy_wait(Site at = here("copy_wait")) {
  static_assert(kPending >= 0, "a number of groups");
  std::vector<simt::Copy>* copies;
  size_t finished = 0;
  {
    const simt::Quiet quiet;
    simt::Thread& t = simt::enter(at);
    copies = &t.copies;
    while (finished < copies->size() && (*copies)[finished].group + kPending < t.open_group) {
      ++finished;
    }
  }
  for (size_t i = 0; i < finished; ++i) {
    simt::Copy copy;  // of the interpreter's own record, which the race detector must not see
    {
      const simt::Quiet quiet;
      copy = (*copies)[i];
    }
    finish_copy(copy);
  }
  const simt::Quiet quiet;
  copies->erase(copies->begin(), copies->begin() + static_cast<std::ptrdiff_t>(finished));
}

// ---- matrices ---------------------------------------------------------------------------------
template <bool kTransposed>
inline void load_matrices_any(uint32_t (&r)[4], const void* row, Site at) {
  simt::MatricesArgument a;
  {
    const simt::Quiet quiet;
    simt::block->current->at = at;
    expect_shared(row, 16);
  }
  a.r = r;
  std::memcpy(a.row, row, 16);  // as early as it may happen: nothing but a barrier orders lanes
  simt::collective(at, &a, simt::distribute_matrices<kTransposed>);
}
inline void load_matrices(uint32_t (&r)[4], const void* row, Site at = here("load_matrices")) {
  load_matrices_any<false>(r, row, at);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, Site at = here("load_matrices_transposed")) {
  load_matrices_any<true>(r, row, at);
}

inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         Site at = here("mma_bfloat16")) {
  simt::MmaArgument q{c, a, {b0, b1}};
  simt::collective(at, &q, [](void** lanes) { simt::multiply_fragments<16>(lanes, simt::half_of<BFloat16>); });
}
inline void mma_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        Site at = here("mma_float16")) {
  simt::MmaArgument q{c, a, {b0, b1}};
  simt::collective(at, &q, [](void** lanes) { simt::multiply_fragments<16>(lanes, simt::half_of<Half>); });
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site at = here("mma_tf32")) {
  simt::MmaArgument q{c, a, {b0, b1}};
  simt::collective(at, &q, [](void** lanes) {
    simt::multiply_fragments<8>(lanes, [](uint32_t w, int) { return simt::tf32_value(w); });
  });
}
inline uint32_t to_tf32(float value) {
  return value != value ? 0x7fffffffu : (float_to_bits(value) + 0x1000u) & 0xffffe000u;
}
inline uint32_t pack_bfloat16(float low, float high) { return simt::pack_pair<BFloat16>(low, high); }
inline uint32_t pack_float16(float low, float high) { return simt::pack_pair<Half>(low, high); }

// ---- between blocks ---------------------------------------------------------------------------
inline void enter_signal(Site at, const void* counter) {
  const simt::Quiet quiet;
  simt::enter(at, 4);
  if (reinterpret_cast<uintptr_t>(counter) % 4 != 0) simt::fail("misaligned counter %p", counter);
}
inline void add_release(uint32_t* counter, uint32_t value, Site at = here("add_release")) {
  enter_signal(at, counter);
  __atomic_add_fetch(counter, value, __ATOMIC_RELEASE);
}
inline void wait_at_least(const uint32_t* counter, uint32_t value, Site at = here("wait_at_least")) {
  enter_signal(at, counter);
  {
    const simt::Quiet quiet;
    if (__atomic_load_n(counter, __ATOMIC_RELAXED) < value) simt::wait_for_flag(counter, value);
  }
  __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}
inline uint32_t take_ticket(uint32_t* counter, Site at = here("take_ticket")) {
  enter_signal(at, counter);
  return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
}

// ---- host side --------------------------------------------------------------------------------
namespace detail {
template <typename T>
struct Exactly {
  using type = T;
};
template <typename T>  // keeps an argument out of deduction: it converts to what the kernel takes
using Argument = const typename Exactly<T>::type&;

template <typename... Params>
int launch_any(bool cooperative, void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
               Argument<Params>... params) {
  static_assert((sizeof(Params) + ... + 0) <= kMaxParameters, "bytes of kernel parameters");
  const auto call = [&] { kernel(params...); };
  simt::Launch launch;
  launch.grid = grid;
  launch.threads = threads;
  launch.shared_bytes = shared_bytes;
  launch.cooperative = cooperative;
  launch.body = [](const void* argument) { (*static_cast<decltype(call)*>(argument))(); };
  launch.argument = &call;
  return simt::run(launch);
}
}  // namespace detail

template <typename... Params>
int launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void*,
           detail::Argument<Params>... params) {
  return detail::launch_any<Params...>(false, kernel, grid, threads, shared_bytes, params...);
}
template <typename... Params>
int launch_cooperative(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void*,
                       detail::Argument<Params>... params) {
  return detail::launch_any<Params...>(true, kernel, grid, threads, shared_bytes, params...);
}
template <typename... Params>
int resident_blocks(void (*)(Params...), int, size_t, int* blocks) {
  *blocks = simt::resident_blocks(simt::settings().seed);
  return 0;
}
inline int fill_zero(void* memory, size_t bytes, void*) {
  if (bytes > 0) std::memset(memory, 0, bytes);
  return 0;
}

}  // namespace fbc::gpu
