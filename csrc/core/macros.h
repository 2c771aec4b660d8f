// The only macros that mathematics and kernels see.
//
// FBC_INLINE   host + device function that is always inlined. Always-inlining matters beyond speed: a
//              header function that the compiler emits once, from a unit built for AVX-512, could
//              be picked by the linker for the baseline too.
// FBC_UNROLL   full unrolling of the loop that follows (constant trip count).
// FBC_ROLLED   no unrolling of the loop that follows.
#pragma once

#if defined(__CUDACC__)
#define FBC_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define FBC_INLINE inline __attribute__((always_inline))
#else
#define FBC_INLINE inline
#endif

#if defined(__CUDA_ARCH__)
#define FBC_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // the host's half of a .cu file, whose front end knows no such pragma
#define FBC_UNROLL
#elif defined(__clang__)
#define FBC_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define FBC_UNROLL _Pragma("GCC unroll 32")
#else
#define FBC_UNROLL
#endif

#if defined(__CUDA_ARCH__)
#define FBC_ROLLED _Pragma("unroll 1")
#elif defined(__CUDACC__)
#define FBC_ROLLED
#elif defined(__clang__)
#define FBC_ROLLED _Pragma("clang loop unroll(disable)")
#elif defined(__GNUC__)
#define FBC_ROLLED _Pragma("GCC unroll 1")
#else
#define FBC_ROLLED
#endif
