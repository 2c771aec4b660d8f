// Bias and activation after a convolution of somebody else's, in place:
//
//   y = z + bias[draw of n, k]     pre_activation[n, p, q, k] = y     z[n, p, q, k] = activation(y)
//
// Who owns what (image.cuh): a block takes kVectorsPerThread * 256 consecutive vectors, a thread
// vectors t, t + 256 of them. No tile, no shared memory. Per element the storage is read once and
// written once (twice with pre_activation); sums are float32 (double for double), rounded once.
//
// Bounds: any extents and strides; vectors of 16 bytes where strides and alignment allow, else
// single elements.
//
// Source: the formulas are those of core/activation.h.
#include "../core/dispatch.h"
#include "epilogue.cuh"
#include "image.cuh"
#include "kernels.h"

namespace fbc::cuda {
namespace {

constexpr int kBiasThreads = 256;
constexpr int kVectorsPerThread = 2;

template <typename scalar_t>
struct BiasWalk {
  Radix radix;
  int64_t vectors;
  scalar_t* z;
  scalar_t* pre_activation;     // null: not wanted
  const acc_t<scalar_t>* bias;  // null: none
  ImageStrides stride;
  int64_t K;
  Divisor rows_per_sample;
  Activation activation;
  acc_t<scalar_t> activation_param;
  bool along_channels;
};

struct VectorPlace {
  int64_t offset;
  int64_t bias;  // index of the first channel's bias
};

template <typename scalar_t, int kVector>
FBC_DEVICE VectorPlace place_of(const BiasWalk<scalar_t>& w, int64_t vector) {
  const Digits d = digits_of(w.radix, vector);
  const int64_t draw = w.rows_per_sample.divide(d.d0);
  if (w.along_channels) {
    const int64_t k = static_cast<int64_t>(d.d3) * kVector;
    return {pixel_offset(w.stride, d.d0, d.d1, d.d2, k), draw * w.K + k};
  }
  const int64_t q = static_cast<int64_t>(d.d3) * kVector;
  return {pixel_offset(w.stride, d.d0, d.d2, q, d.d1), draw * w.K + d.d1};
}

template <typename scalar_t, int kVector>
FBC_DEVICE void finish_vector(const BiasWalk<scalar_t>& w, const VectorPlace& place,
                              acc_t<scalar_t> (&value)[kVector]) {
  using T = acc_t<scalar_t>;
  if (w.bias != nullptr) {
    if (w.along_channels) {
      T bias[kVector];
      load_vector(w.bias + place.bias, bias);
      FBC_UNROLL
      for (int i = 0; i < kVector; ++i) value[i] += bias[i];
    } else {
      const T bias = w.bias[place.bias];
      FBC_UNROLL
      for (int i = 0; i < kVector; ++i) value[i] += bias;
    }
  }
  if (w.pre_activation != nullptr) store_vector(w.pre_activation + place.offset, value);
  activate_each(w.activation, value, w.activation_param);
  store_vector(w.z + place.offset, value);
}

template <typename scalar_t, int kVector>
FBC_KERNEL(kBiasThreads, 4)
void bias_activation_kernel(FBC_PARAM BiasWalk<scalar_t> w) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kBiasThreads * kVectorsPerThread) + threadIdx.x;
  VectorPlace place[kVectorsPerThread] = {};
  acc_t<scalar_t> value[kVectorsPerThread][kVector] = {};
  FBC_UNROLL
  for (int j = 0; j < kVectorsPerThread; ++j) {
    const int64_t v = first + j * kBiasThreads;
    if (v >= w.vectors) continue;
    place[j] = place_of<scalar_t, kVector>(w, v);
    load_vector(static_cast<const scalar_t*>(w.z) + place[j].offset, value[j]);
  }
  FBC_UNROLL
  for (int j = 0; j < kVectorsPerThread; ++j) {
    if (first + j * kBiasThreads < w.vectors) finish_vector(w, place[j], value[j]);
  }
}

template <typename scalar_t>
int run_bias_activation(const BiasActivationParams& p, StreamHandle stream) {
  using T = acc_t<scalar_t>;
  BiasWalk<scalar_t> w = {};
  w.stride = p.z_stride;
  ImageStrides same = p.z_stride;  // of pre_activation
  const ImageTensor tensors[2] = {{p.z, &w.stride}, {p.pre_activation, &same}};
  ImageWalk walk = plan_walk<scalar_t>(p.rows, p.P, p.Q, p.K, tensors, 2);
  if (walk.wide && walk.along_channels && !is_aligned<T, kWideVector<scalar_t>>(p.bias)) {
    walk.wide = false;
  }
  const int64_t size = walk.wide ? kWideVector<scalar_t> : 1;
  w.vectors = p.rows * p.P * p.Q * p.K / size;
  const bool narrow = w.vectors < kNarrow;
  w.radix = walk.along_channels ? make_radix(walk.P, walk.Q, walk.K / size, narrow)
                                : make_radix(walk.K, walk.P, walk.Q / size, narrow);
  w.z = static_cast<scalar_t*>(p.z);
  w.pre_activation = static_cast<scalar_t*>(p.pre_activation);
  w.bias = static_cast<const T*>(p.bias);
  w.K = p.K;
  w.rows_per_sample = divisor(p.rows / p.num_samples);
  w.activation = p.activation;
  w.activation_param = static_cast<T>(p.activation_param);
  w.along_channels = walk.along_channels;
  constexpr int64_t kPerBlock = kBiasThreads * kVectorsPerThread;
  const int64_t blocks = (w.vectors + kPerBlock - 1) / kPerBlock;
  if (blocks >= kNarrow) return 1;
  const dim3 grid(static_cast<unsigned>(blocks));
  return walk.wide
             ? gpu::launch(bias_activation_kernel<scalar_t, kWideVector<scalar_t>>, grid, kBiasThreads, 0, stream, w)
             : gpu::launch(bias_activation_kernel<scalar_t, 1>, grid, kBiasThreads, 0, stream, w);
}

}  // namespace

int bias_activation(const BiasActivationParams& params, StreamHandle stream) {
  if (params.rows * params.P * params.Q * params.K == 0) return 0;
  int status = 1;
  visit_dtype(params.dtype,
              [&](auto tag) { status = run_bias_activation<typename decltype(tag)::type>(params, stream); });
  return status;
}

}  // namespace fbc::cuda
