// Every GPU-only primitive that the kernels use, and nothing else.
//
// Under nvcc each is PTX or an intrinsic. Any other compiler takes the same names from "simt.h"
// (tests/simt), an interpreter that runs the kernels' own source on a CPU. Hence the rules for
// kernel files: no raw asm, no __syncthreads, no static __shared__ (shared() is carved by offsets),
// no <<<>>>, no device library, and no reliance on lanes running in step between two primitives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/macros.h"

#if !defined(__CUDACC__)
#include "simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

// FBC_KERNEL(256, 2) void name(...): at most 256 threads, at least 2 blocks on a multiprocessor.
#define FBC_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define FBC_DEVICE __device__ __forceinline__
#define FBC_PARAM const __grid_constant__  // a struct parameter that is never copied

namespace fbc::gpu {

// Bytes of parameters of one launch: a compiler before CUDA 12.1 refuses more than 4 KB, a driver
// before 530 cannot load the kernel.
#if CUDART_VERSION >= 12010
constexpr size_t kMaxParameters = 32764;
#else
constexpr size_t kMaxParameters = 4096;
#endif

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

FBC_DEVICE unsigned char* shared() { return dynamic_shared; }
FBC_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- threads ------------------------------------------------------------------------------------
FBC_DEVICE void sync() { __syncthreads(); }
FBC_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>  // float, double, int32_t, uint32_t
FBC_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- asynchronous copies to shared memory: visible to the copying thread after copy_wait(), to
// others after a sync() that follows it. kBytes 4, 8 or 16, both addresses aligned to it; zeros
// where !valid, and then `global` is not read.
template <int kBytes>
FBC_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
FBC_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>  // waits until at most kPending groups of this thread are in flight
FBC_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrices -----------------------------------------------------------------------------------
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and
// receives the two elements (2t, 2t + 1) of row g of each, g = lane / 4, t = lane % 4.
FBC_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices.
FBC_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8) += a (16 x 16) * b (16 x 8), float32 sums. Fragments as in the PTX ISA, section
// "Matrix Fragments for mma.m16n8k16": c[0], c[1] row g, columns 2t, 2t + 1; c[2], c[3] row g + 8.
#define FBC_MMA_16816(name, type)                                                         \
  FBC_DEVICE void name(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                   \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"             \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));         \
  }
FBC_MMA_16816(mma_bfloat16, "bf16")
FBC_MMA_16816(mma_float16, "f16")
#undef FBC_MMA_16816

// c (16 x 8) += a (16 x 8) * b (8 x 8) of tf32 values (to_tf32) in 32-bit registers.
FBC_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FBC_DEVICE uint32_t to_tf32(float value) {  // to nearest, ties away
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Two values rounded to nearest even, the first in the low half.
FBC_DEVICE uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
FBC_DEVICE uint32_t pack_float16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// ---- between blocks -----------------------------------------------------------------------------
// What a block has written before sync(); add_release() is seen by whoever then sees the new count.
FBC_DEVICE void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
// Follow it by sync() for the other threads of the block.
FBC_DEVICE void wait_at_least(const uint32_t* counter, uint32_t value) {
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
}
// Adds 1 and returns the count before, releasing and acquiring: the last block out sees all others.
FBC_DEVICE uint32_t take_ticket(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// ---- host side: 0, or the cudaError_t -----------------------------------------------------------
namespace detail {
template <typename T>
struct Exactly {
  using type = T;
};
template <typename T>  // keeps an argument out of deduction: it converts to what the kernel takes
using Argument = const typename Exactly<T>::type&;

// The driver's answers, one for each kernel, device and launch shape: a question takes about as
// long as a launch. All of them may be asked while a stream is captured.
template <typename Ask>
int ask_once(const void* kernel, int threads, size_t bytes, int* answer, Ask ask) {
  using Key = std::tuple<const void*, int, int, size_t>;
  struct Answers {
    std::mutex mutex;
    std::map<Key, int> known;
  };
  static Answers* const answers = new Answers;  // never destroyed: threads may outlive main()
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device)) return static_cast<int>(status);
  const Key key{kernel, device, threads, bytes};
  const std::lock_guard<std::mutex> lock(answers->mutex);
  const auto found = answers->known.find(key);
  if (found == answers->known.end()) {
    if (const cudaError_t status = ask(device)) return static_cast<int>(status);
    answers->known[key] = *answer;
  } else {
    *answer = found->second;
  }
  return 0;
}

// More than 48 KB of shared memory a block must be allowed, once on each device: then all that the
// device has. How much a launch takes is its own affair.
inline int set_shared_limit(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return 0;
  int limit = 0;
  return ask_once(kernel, 0, 0, &limit, [&](int device) {
    const cudaError_t status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return status != cudaSuccess ? status
                                 : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  });
}
}  // namespace detail

template <typename... Params>
int launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           detail::Argument<Params>... params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const int status = detail::set_shared_limit(function, shared_bytes)) return status;
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))...};
  return static_cast<int>(
      cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes, static_cast<cudaStream_t>(stream)));
}

// All blocks resident at once: for kernels whose blocks wait for one another.
template <typename... Params>
int launch_cooperative(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void* stream,
                       detail::Argument<Params>... params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const int status = detail::set_shared_limit(function, shared_bytes)) return status;
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))...};
  return static_cast<int>(cudaLaunchCooperativeKernel(function, grid, dim3(threads), arguments, shared_bytes,
                                                      static_cast<cudaStream_t>(stream)));
}

// How many blocks of this kernel the current device holds at once.
template <typename... Params>
int resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes, int* blocks) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const int status = detail::set_shared_limit(function, shared_bytes)) return status;
  return detail::ask_once(function, threads, shared_bytes, blocks, [&](int device) {
    int multiprocessors = 0, on_each = 0;
    cudaError_t status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess) {
      status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, function, threads, shared_bytes);
    }
    *blocks = multiprocessors * on_each;
    return status;
  });
}

inline int fill_zero(void* memory, size_t bytes, void* stream) {
  return static_cast<int>(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace fbc::gpu
#endif
