// How the elementwise kernels walk images (rows, P, Q, K): in vectors of kVector neighbouring
// elements of one tensor, along the channels (NHWC) or along the columns (NCHW), or one by one
// where strides or alignment allow no vector.
//
//   along channels   vector v = (n, p, q, k / kVector)     a vector: one pixel, kVector channels
//   along columns    vector v = (n, k, p, q / kVector)     a vector: one channel, kVector columns
#pragma once

#include "../core/params.h"
#include "index.cuh"

namespace fbc::cuda {

template <typename scalar_t>
constexpr int kWideVector = 16 / static_cast<int>(sizeof(scalar_t));

struct ImageWalk {
  int64_t rows, P, Q, K;  // P merged into Q where all tensors allow it
  bool along_channels;
  bool wide;  // vectors of kWideVector elements; else single elements
};

struct ImageTensor {
  const void* data;      // null: not there
  ImageStrides* stride;  // adapted to the merged extents
};

inline bool steps_by(int64_t extent, int64_t stride, int64_t vector) { return extent == 1 || stride % vector == 0; }

template <typename scalar_t>
bool can_be_wide(const ImageWalk& walk, const ImageTensor* tensors, int count, bool along_channels) {
  constexpr int64_t kVector = kWideVector<scalar_t>;
  if ((along_channels ? walk.K : walk.Q) % kVector != 0) return false;
  for (int t = 0; t < count; ++t) {
    if (tensors[t].data == nullptr) continue;
    const ImageStrides& s = *tensors[t].stride;
    const int64_t inner = along_channels ? s.c : s.w;
    const int64_t other = along_channels ? s.w : s.c;
    const int64_t others = along_channels ? walk.Q : walk.K;
    if (inner != 1 || !steps_by(others, other, kVector) || !steps_by(walk.P, s.h, kVector) ||
        !steps_by(walk.rows, s.n, kVector) || !is_aligned<scalar_t, static_cast<int>(kVector)>(tensors[t].data)) {
      return false;
    }
  }
  return true;
}

// Merges P into Q where every tensor is dense there, then chooses. The first tensor decides the
// order where no vector fits.
template <typename scalar_t>
ImageWalk plan_walk(int64_t rows, int64_t P, int64_t Q, int64_t K, const ImageTensor* tensors, int count) {
  ImageWalk walk = {rows, P, Q, K, true, true};
  bool dense = P > 1 && P * Q < kNarrow;
  for (int t = 0; t < count; ++t) {
    const ImageStrides& s = *tensors[t].stride;
    dense = dense && (tensors[t].data == nullptr || Q == 1 || s.h == Q * s.w);
  }
  if (dense) {
    for (int t = 0; t < count; ++t)
      if (Q == 1) tensors[t].stride->w = tensors[t].stride->h;
    walk.P = 1, walk.Q = P * Q;
  }
  if (can_be_wide<scalar_t>(walk, tensors, count, true)) return walk;
  walk.along_channels = false;
  if (can_be_wide<scalar_t>(walk, tensors, count, false)) return walk;
  walk.wide = false;
  const ImageStrides& first = *tensors[0].stride;
  walk.along_channels = walk.K > 1 && first.c <= first.w;
  return walk;
}

template <typename scalar_t, int kVector>
FBC_DEVICE void load_vector(const scalar_t* from, acc_t<scalar_t> (&value)[kVector]) {
  if constexpr (kVector == 1) {
    value[0] = load_as_acc(from);
  } else {
    load_pack(from, value);
  }
}
template <typename scalar_t, int kVector>
FBC_DEVICE void store_vector(scalar_t* to, const acc_t<scalar_t> (&value)[kVector]) {
  if constexpr (kVector == 1) {
    store_one(to, value[0]);
  } else {
    store_pack(to, value);
  }
}

FBC_DEVICE int64_t pixel_offset(const ImageStrides& stride, int64_t n, int64_t p, int64_t q, int64_t k) {
  return n * stride.n + p * stride.h + q * stride.w + k * stride.c;
}

}  // namespace fbc::cuda
