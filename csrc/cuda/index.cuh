// Index arithmetic of the elementwise kernels: the digits of a number in a mixed radix, and several
// neighbouring elements as one access.
#pragma once

#include "../core/types.h"
#include "divisor.cuh"
#include "gpu.cuh"

// How often the loop that follows is unrolled; 1: it stays a loop. g++ is told nothing.
#if defined(__CUDACC__)
#define FBC_PRAGMA(text) _Pragma(#text)
#define FBC_UNROLL_BY(count) FBC_PRAGMA(unroll count)
#else
#define FBC_UNROLL_BY(count)
#endif

namespace fbc::cuda {

constexpr int64_t kNarrow = int64_t{1} << 31;

// A number as four digits, the last of which runs fastest; the first takes what is left.
struct Digits {
  int32_t d0, d1, d2, d3;
};
struct Radix {
  Divisor d1, d2, d3;
  bool narrow;  // every number is below 2^31; the digits always are
};
inline Radix make_radix(int64_t d1, int64_t d2, int64_t d3, bool narrow) {
  return {divisor(d1), divisor(d2), divisor(d3), narrow};
}
FBC_DEVICE Digits digits_of(const Radix& radix, int64_t number) {
  Digits out;
  if (!radix.narrow) {  // rare: the hardware's long division
    int64_t rest = number / radix.d3.value;
    out.d3 = static_cast<int32_t>(number - rest * radix.d3.value);
    const int64_t outer = rest / radix.d2.value;
    out.d2 = static_cast<int32_t>(rest - outer * radix.d2.value);
    out.d0 = static_cast<int32_t>(outer / radix.d1.value);
    out.d1 = static_cast<int32_t>(outer % radix.d1.value);
    return out;
  }
  const int32_t n = static_cast<int32_t>(number);
  const int32_t rest = radix.d3.divide(n);
  out.d3 = n - rest * radix.d3.value;
  const int32_t outer = radix.d2.divide(rest);
  out.d2 = rest - outer * radix.d2.value;
  out.d0 = radix.d1.divide(outer);
  out.d1 = outer - out.d0 * radix.d1.value;
  return out;
}

// kCount neighbouring elements, one or two accesses of at most 16 bytes.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T value[kCount];
};
template <typename T, int kCount>
inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, kCount>) == 0;
}

template <typename T, int kCount>
FBC_DEVICE void load_pack(const T* from, acc_t<T> (&value)[kCount]) {
  const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
  FBC_UNROLL
  for (int i = 0; i < kCount; ++i) value[i] = load_as_acc(&pack.value[i]);
}

// Rounds once, to nearest even, in hardware for the 16-bit types.
FBC_DEVICE void round_pair(float low, float high, BFloat16* to) {
  const uint32_t pair = gpu::pack_bfloat16(low, high);
  to[0].bits = static_cast<uint16_t>(pair);
  to[1].bits = static_cast<uint16_t>(pair >> 16);
}
FBC_DEVICE void round_pair(float low, float high, Half* to) {
  const uint32_t pair = gpu::pack_float16(low, high);
  to[0].bits = static_cast<uint16_t>(pair);
  to[1].bits = static_cast<uint16_t>(pair >> 16);
}
template <typename T, int kCount>
FBC_DEVICE void store_pack(T* to, const acc_t<T> (&value)[kCount]) {
  Pack<T, kCount> pack;
  if constexpr (sizeof(T) == 2) {
    static_assert(kCount % 2 == 0, "16-bit elements are rounded in pairs");
    FBC_UNROLL
    for (int i = 0; i < kCount; i += 2) round_pair(value[i], value[i + 1], &pack.value[i]);
  } else {
    FBC_UNROLL
    for (int i = 0; i < kCount; ++i) pack.value[i] = value[i];
  }
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}
template <typename T>
FBC_DEVICE void store_one(T* to, acc_t<T> value) {
  if constexpr (sizeof(T) == 2) {
    T pair[2];
    round_pair(value, acc_t<T>(0), pair);
    *to = pair[0];
  } else {
    *to = value;
  }
}

}  // namespace fbc::cuda
