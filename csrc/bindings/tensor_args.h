// Tensor -> pointer, strides and the plain structs of csrc/core/params.h. Nothing is checked here.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/MemoryFormat.h>

#include <algorithm>
#include <array>

#include "../cpu/huge_pages.h"
#include "../core/params.h"
#include "checks.h"

namespace fbc {

// The tensor, with huge-page advice for host memory: for results and scratch that are fresh.
inline at::Tensor advised(at::Tensor tensor) {
  if (!tensor.is_cpu()) return tensor;
  advise_huge_pages(tensor.mutable_data_ptr(), static_cast<int64_t>(tensor.nbytes()));
  return tensor;
}

// Scratch for kernels, aligned to 64 bytes as at::empty does.
inline at::Tensor workspace(int64_t bytes) {
  return advised(at::empty({std::max<int64_t>(bytes, 1)}, at::TensorOptions().dtype(at::kByte)));
}

// Dtypes that kernels know. The caller has checked the tensor.
inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kFloat16;
    default: return Dtype::kFloat32;
  }
}

// Reads the seed, which must be in host memory.
inline NoiseKey noise_key(const at::Tensor& seed, int64_t add) {
  const int64_t* data = seed.const_data_ptr<int64_t>();
  const int64_t second = seed.stride(0);
  return {static_cast<uint64_t>(data[0]), static_cast<uint64_t>(data[second]) + static_cast<uint64_t>(add)};
}

// A parameter of up to four dimensions seen as (K, R, S, C): dimension 0 is K, dimension 1 is C,
// further dimensions are taps. A vector is one row of K = 1 and C = its length, as are all biases.
struct PosteriorExtents {
  int64_t K, R, S, C;
};
inline PosteriorExtents posterior_extents(at::IntArrayRef sizes) {
  switch (sizes.size()) {
    case 0: return {1, 1, 1, 1};
    case 1: return {1, 1, 1, sizes[0]};
    case 2: return {sizes[0], 1, 1, sizes[1]};
    case 3: return {sizes[0], 1, sizes[2], sizes[1]};
    default: return {sizes[0], sizes[2], sizes[3], sizes[1]};
  }
}

// Strides of `tensor` under that view; a dimension that is broadcast to `dim` dimensions has stride
// 0.
inline WeightStrides posterior_strides(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t dim) {
  std::array<int64_t, 4> stride = {0, 0, 0, 0};
  const size_t missing = static_cast<size_t>(dim) - sizes.size();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) stride[missing + d] = strides[d];
  switch (dim) {
    case 0: return {0, 0, 0, 0};
    case 1: return {0, 0, 0, stride[0]};
    case 2: return {stride[0], 0, 0, stride[1]};
    case 3: return {stride[0], 0, stride[2], stride[1]};
    default: return {stride[0], stride[2], stride[3], stride[1]};
  }
}
inline WeightStrides posterior_strides(const at::Tensor& tensor, int64_t dim) {
  return posterior_strides(tensor.sizes(), tensor.strides(), dim);
}

// tensor.to(dtype), without a way through the dispatcher where there is nothing to do.
inline at::Tensor in_dtype(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

// The (N, H, W, C) strides of a tensor of shape (N, C, H, W).
inline ImageStrides image_strides(const at::Tensor& image) {
  return {image.stride(0), image.stride(2), image.stride(3), image.stride(1)};
}

// One posterior with its prior as tensors; null: absent.
struct PosteriorTensors {
  const at::Tensor* loc;
  const at::Tensor* rho;
  const at::Tensor* prior_loc;
  const at::Tensor* prior_scale;
  double prior_loc_value, prior_scale_value;
  double scale_floor;
  const at::Tensor* seed;
  int64_t offset_add;
  Stream stream;
  int64_t element_offset;
  const at::Tensor* eps;  // as in PosteriorParams; null: none
  bool eps_drawn;

  // Of rho, the priors and the KL. loc may be 16-bit: a sample that was rounded before.
  at::ScalarType dtype() const { return loc->scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
};

// The caller has checked the dtype of loc.
inline void check_posterior(const PosteriorTensors& t, const char* rho, const char* prior_loc,
                            const char* prior_scale) {
  expect_like(rho, *t.loc, t.rho);
  expect_broadcastable(prior_loc, *t.loc, t.dtype(), t.prior_loc);
  expect_broadcastable(prior_scale, *t.loc, t.dtype(), t.prior_scale);
  TORCH_CHECK_VALUE(t.prior_scale != nullptr || t.prior_scale_value > 0, prior_scale,
                    ": expected a positive scale, got ", t.prior_scale_value);
  TORCH_CHECK_VALUE(t.scale_floor >= 0, "scale_floor: expected a value of at least 0, got ", t.scale_floor);
  TORCH_CHECK_VALUE(t.element_offset >= 0, "element_offset: expected a value of at least 0, got ", t.element_offset);
}

// Without the values of the seed: noise holds what is added to its offset. loc is T.
template <typename T>
PosteriorParams<T> posterior_params(const PosteriorTensors& t) {
  const PosteriorExtents extents = posterior_extents(t.loc->sizes());
  const int64_t dim = t.loc->dim();
  PosteriorParams<T> p = {};
  p.K = extents.K;
  p.R = extents.R;
  p.S = extents.S;
  p.C = extents.C;
  const auto bind = [dim](const at::Tensor* tensor, const T** pointer, WeightStrides* strides) {
    *pointer = tensor == nullptr ? nullptr : tensor->const_data_ptr<T>();
    if (tensor != nullptr) *strides = posterior_strides(*tensor, dim);
  };
  bind(t.loc, &p.loc, &p.loc_stride);
  bind(t.rho, &p.rho, &p.rho_stride);
  bind(t.prior_loc, &p.prior_loc, &p.prior_loc_stride);
  bind(t.prior_scale, &p.prior_scale, &p.prior_scale_stride);
  p.prior_loc_value = static_cast<T>(t.prior_loc_value);
  p.prior_scale_value = static_cast<T>(t.prior_scale_value);
  p.scale_floor = static_cast<T>(t.scale_floor);
  p.noise = {0, static_cast<uint64_t>(t.offset_add)};
  p.stream = t.stream;
  p.element_offset = static_cast<uint64_t>(t.element_offset);
  return p;
}

// The same with the seed read: for kernels of the CPU.
template <typename T>
PosteriorParams<T> host_posterior_params(const PosteriorTensors& t) {
  PosteriorParams<T> p = posterior_params<T>(t);
  if (t.seed != nullptr) p.noise = noise_key(*t.seed, t.offset_add);
  if (t.eps != nullptr) p.eps = t.eps->mutable_data_ptr<float>();
  p.eps_drawn = t.eps_drawn;
  return p;
}

}  // namespace fbc
