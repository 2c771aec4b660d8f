// The seam between the CUDA operators and CUDA: current stream, device guard, launch errors.
//
// With FBC_SIMT_HOST there is no CUDA at all. The kernels' sources are then compiled for an
// interpreter on the CPU (tests/simt), "device" tensors are CPU tensors, and the operators are
// registered under the CPU key. FBC_HAS_CUDA tells whether the CUDA operators are compiled, one way
// or the other.
#pragma once

#if defined(FBC_SIMT_HOST) || defined(FBC_WITH_CUDA)
#define FBC_HAS_CUDA
#endif

#if defined(FBC_HAS_CUDA)

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <string>

#if defined(FBC_SIMT_HOST)
#define FBC_CUDA_KEY CPU
#else
#define FBC_CUDA_KEY CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fbc::device {

// Launches go to the tensor's device while this lives.
#if defined(FBC_SIMT_HOST)
constexpr at::DeviceType kType = at::kCPU;
struct Guard {
  explicit Guard(const at::Tensor&) {}
};
inline void* current_stream(const at::Tensor&) { return nullptr; }
inline std::string error_text(int status) { return "the interpreter's error " + std::to_string(status); }
// ATen's 16-bit convolutions of a CPU are wrong for some shapes: float32 is rounded instead.
inline at::ScalarType convolution_dtype(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }
#else
constexpr at::DeviceType kType = at::kCUDA;
struct Guard {
  explicit Guard(const at::Tensor& tensor) : guard(tensor.device()) {}
  c10::cuda::CUDAGuard guard;
};
inline void* current_stream(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}
// The error is taken out of the runtime's memory of it: a later, innocent call shall not report it.
inline std::string error_text(int status) {
  cudaGetLastError();
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
inline at::ScalarType convolution_dtype(at::ScalarType type) { return type; }
#endif

// "fastbconv::bconv2d of input [8, 3, 32, 32], weight [16, 3, 3, 3]: CUDA error: ..."
struct Site {
  const char* op;
  const char* first_name;
  at::IntArrayRef first;
  const char* second_name = nullptr;  // null: one shape says it
  at::IntArrayRef second = {};
};
inline void check_launch(int status, const Site& site) {
  if (status == 0) return;
  const std::string text = error_text(status);
  if (site.second_name == nullptr) {
    TORCH_CHECK(false, site.op, " of ", site.first_name, " ", site.first, ": CUDA error: ", text);
  }
  TORCH_CHECK(false, site.op, " of ", site.first_name, " ", site.first, ", ", site.second_name, " ", site.second,
              ": CUDA error: ", text);
}

// Scratch memory of one launch, aligned to 256 bytes; null where none is needed. An ordinary
// tensor: a captured graph owns it.
struct Workspace {
  Workspace(size_t bytes, const at::Tensor& like) {
    if (bytes == 0) return;
    memory = at::empty({static_cast<int64_t>(bytes) + kAlignment},
                       at::TensorOptions().dtype(at::kByte).device(like.device()));
  }
  void* data() const {
    if (!memory.defined()) return nullptr;
    const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr int64_t kAlignment = 256;
  at::Tensor memory;
};

// Whether cuDNN's float32 convolutions may round to tf32. The type of the argument has changed over
// versions of the framework.
template <typename Op>
bool allows_tf32(bool (at::Context::*allows)(std::optional<Op>) const) {
  return (at::globalContext().*allows)(Op::CONV);
}
inline bool allows_tf32(bool (at::Context::*allows)(const std::string&) const) {
  return (at::globalContext().*allows)("conv");
}
inline bool allows_tf32(bool (at::Context::*allows)() const) { return (at::globalContext().*allows)(); }
inline bool tf32_convolutions() { return allows_tf32(&at::Context::allowTF32CuDNN); }

}  // namespace fbc::device

#endif  // FBC_HAS_CUDA
