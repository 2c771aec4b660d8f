// Memory of the test programs that host and device both see: as cudaMalloc aligns it, and not a
// byte longer than asked for (AddressSanitizer sees the first one too many).
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda/gpu.cuh"

namespace fbc::test {

constexpr size_t kAlignment = 256;

#if defined(__CUDACC__)
// After an error on the device nothing works any more in this process.
[[noreturn]] inline void give_up(cudaError_t status) {
  std::fflush(stdout);
  std::fprintf(stderr, "CUDA error %d: %s\n", static_cast<int>(status), cudaGetErrorString(status));
  std::exit(1);
}
// Managed memory, or where that does not move on demand (or FASTBCONV_TEST_MEMORY=pinned asks for
// it) memory of the host, which the GPU reads from afar: slow, and the same otherwise.
inline bool is_managed() {
  static const bool managed = [] {
    int concurrent = 0;
    if (const cudaError_t status = cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, 0)) {
      give_up(status);
    }
    const char* wanted = std::getenv("FASTBCONV_TEST_MEMORY");
    return concurrent != 0 && (wanted == nullptr || std::strcmp(wanted, "pinned") != 0);
  }();
  return managed;
}
inline void* allocate_for_both(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status =
      is_managed() ? cudaMallocManaged(&memory, bytes) : cudaHostAlloc(&memory, bytes, cudaHostAllocMapped);
  if (status != cudaSuccess) give_up(status);
  return memory;
}
inline void free_for_both(void* memory) {
  cudaDeviceSynchronize();  // work that is under way may use it still
  is_managed() ? cudaFree(memory) : cudaFreeHost(memory);
}
#endif

template <typename T>
struct DeviceAllocator {
  using value_type = T;
  DeviceAllocator() = default;
  template <typename U>
  DeviceAllocator(const DeviceAllocator<U>&) {}
  T* allocate(size_t count) {
#if defined(__CUDACC__)
    return static_cast<T*>(allocate_for_both(count * sizeof(T)));
#else
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kAlignment}));
#endif
  }
  void deallocate(T* memory, size_t) {
#if defined(__CUDACC__)
    free_for_both(memory);
#else
    ::operator delete(memory, std::align_val_t{kAlignment});
#endif
  }
  template <typename U>
  bool operator==(const DeviceAllocator<U>&) const {
    return true;
  }
  template <typename U>
  bool operator!=(const DeviceAllocator<U>&) const {
    return false;
  }
};

}  // namespace fbc::test
