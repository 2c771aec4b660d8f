// Argument checks of the operators: what memory safety needs, before any pointer is taken. Checks
// that only help the user live in fastbconv/functional/.
//
// Messages read "name: expected X, got Y". A wrong value or shape is a ValueError, a wrong dtype a
// TypeError, something valid that no kernel does a NotImplementedError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>

namespace fbc {

using OptionalTensor = std::optional<at::Tensor>;

// The tensor behind an optional argument; null where it is absent.
inline const at::Tensor* get_if_defined(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? &*tensor : nullptr;
}

inline void expect_defined(const char* name, const at::Tensor& got) {
  TORCH_CHECK_TYPE(got.defined(), name, ": expected a tensor, got None");
}

inline void expect_dim(const char* name, int64_t expected, const at::Tensor& got) {
  TORCH_CHECK_VALUE(got.dim() == expected, name, ": expected ", expected, " dimensions, got ", got.dim(), " (shape ",
                    got.sizes(), ")");
}

inline void expect_shape(const char* name, at::IntArrayRef expected, at::IntArrayRef got) {
  TORCH_CHECK_VALUE(got == expected, name, ": expected shape ", expected, ", got ", got);
}

inline void expect_dtype(const char* name, at::ScalarType expected, const at::Tensor& got) {
  TORCH_CHECK_TYPE(got.scalar_type() == expected, name, ": expected dtype ", expected, ", got ", got.scalar_type());
}

inline void expect_device(const char* name, at::Device expected, const at::Tensor& got) {
  TORCH_CHECK_VALUE(got.device() == expected, name, ": expected a tensor on ", expected,
                    ", as the other arguments, got ", got.device());
}

inline void expect_length(const char* name, size_t expected, size_t got) {
  TORCH_CHECK_VALUE(got == expected, name, ": expected ", expected, " values, got ", got);
}

// Upper bound 2^31 - 1: index arithmetic multiplies such values with extents and must not overflow.
inline void expect_in_range(const char* name, int64_t least, int64_t got) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(got >= least && got <= kMost, name, ": expected a value of at least ", least, " and at most ",
                    kMost, ", got ", got);
}

// Its values are not looked at: on a GPU they are the kernels' to read.
inline void expect_seed(at::Device device, const at::Tensor& seed) {
  expect_defined("seed", seed);
  expect_dtype("seed", at::kLong, seed);
  expect_shape("seed", {2}, seed.sizes());
  expect_device("seed", device, seed);
}

// Parameters are float32 or float64.
inline void expect_parameter(const char* name, const at::Tensor& got) {
  expect_defined(name, got);
  TORCH_CHECK_TYPE(got.scalar_type() == at::kFloat || got.scalar_type() == at::kDouble, name,
                   ": expected dtype float32 or float64, got ", got.scalar_type());
}

// What kernels read through a pointer: everything else would be taken for one of these.
inline void expect_gradient_dtype(const char* name, const at::Tensor& got) {
  const at::ScalarType type = got.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
                   ": expected dtype float32, float64, bfloat16 or float16, got ", type);
}

// A companion of a parameter: same shape, dtype and device.
inline void expect_like(const char* name, const at::Tensor& like, const at::Tensor* got) {
  if (got == nullptr) return;
  expect_dtype(name, like.scalar_type(), *got);
  expect_shape(name, like.sizes(), got->sizes());
  expect_device(name, like.device(), *got);
}

// A prior: device of the parameter, and a shape that broadcasts to the parameter's.
inline void expect_broadcastable(const char* name, const at::Tensor& like, at::ScalarType dtype,
                                 const at::Tensor* got) {
  if (got == nullptr) return;
  expect_dtype(name, dtype, *got);
  expect_device(name, like.device(), *got);
  const int64_t missing = like.dim() - got->dim();
  bool fits = missing >= 0;
  for (int64_t d = 0; fits && d < got->dim(); ++d) fits = got->size(d) == 1 || got->size(d) == like.size(missing + d);
  TORCH_CHECK_VALUE(fits, name, ": expected a shape that broadcasts to ", like.sizes(), ", got ", got->sizes());
}

}  // namespace fbc
