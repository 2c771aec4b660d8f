// What kernels receive: plain structs, no constructors. Strides count elements. Pointers marked
// "null:" may be null. CPU and CUDA kernels take the same structs.
#pragma once

#include <cstdint>

#include "activation.h"
#include "conv_shape.h"
#include "noise.h"
#include "types.h"

namespace fbc {

struct WeightStrides {  // of a (K, R, S, C/G) view of any tensor
  int64_t k, r, s, c;
};

struct ImageStrides {  // of an (N, H, W, C) view of any tensor
  int64_t n, h, w, c;
};

// What a convolution multiplies with: a draw of the weight, or one of the parts that Flipout and local
// reparameterisation take it apart into (the mean is a point mass at loc).
enum class WeightTerm : int32_t {
  kSample = 0,        // loc + scale * eps; where signs are used also its mirror image, loc - scale * eps
  kPerturbation = 1,  // scale * eps
  kVariance = 2,      // scale^2
};

// One posterior with its prior: a weight as (K, R, S, C/G), or a bias as (1, 1, 1, K).
// T is float or double: the dtype of the parameters and of the KL.
template <typename T>
struct PosteriorParams {
  int64_t K, R, S, C;    // C counts the channels of one group
  const T* loc;          // (K, R, S, C)
  const T* rho;          // (K, R, S, C); null: a point mass at loc, no noise and no KL
  const T* prior_loc;    // (K, R, S, C), strides may be 0; null: prior_loc_value
  const T* prior_scale;  // (K, R, S, C), strides may be 0, > 0; null: prior_scale_value
  WeightStrides loc_stride, rho_stride, prior_loc_stride, prior_scale_stride;
  T prior_loc_value, prior_scale_value;
  T scale_floor;
  NoiseKey noise;  // of sample 0; sample s uses offset + s
  Stream stream;
  uint64_t element_offset;  // number of the first element, for a shard of a larger weight
  WeightTerm term;          // what a draw is, and what gradients are by; not read on CUDA
  // Not read on CUDA:
  const T* scale;             // (K, R, S, C) contiguous, once for many draws; null: from rho
  int64_t loc_sample_stride;  // of a point mass that differs from draw to draw; else 0
  float* eps;                 // (K, R, S, C) contiguous: the noise of sample 0 of a problem with one sample; or null
  bool eps_drawn;             // eps is there to be read; else whoever draws leaves it there
};

// Where a sample goes: any strides, any storage type.
struct WeightOut {
  void* data;
  Dtype dtype;
  WeightStrides stride;
};

template <typename T>
struct PosteriorGrads {
  const T* grad_weight;  // (num_samples, K, R, S, C) gradient by each sample; null: none
  WeightStrides grad_weight_stride;
  int64_t grad_weight_sample_stride;
  int64_t num_samples;
  T grad_kl;    // gradient by the KL (0: none)
  T* grad_loc;  // (K, R, S, C) each; null: not wanted
  T* grad_rho;
  T* grad_prior_loc;  // full size; the caller sums over broadcast dimensions
  T* grad_prior_scale;
  WeightStrides grad_loc_stride, grad_rho_stride, grad_prior_loc_stride, grad_prior_scale_stride;
};

// The KL is summed in chunks of kKlChunk elements of one row k, each chunk in kKlLanes interleaved
// partial sums, the chunks in order in double: the same bits for any thread count, tile and kernel.
constexpr int64_t kKlChunk = 512;
constexpr int64_t kKlLanes = 16;

template <typename T>
FBC_INLINE int64_t kl_chunks_per_row(const PosteriorParams<T>& p) {
  return (p.R * p.S * p.C + kKlChunk - 1) / kKlChunk;
}

}  // namespace fbc
