// The CUDA kernels as seen from outside: plain launchers. No CUDA header and no torch is needed to
// include this.
//
// A launcher enqueues on `stream` (a cudaStream_t) of the current device, allocates nothing, never
// waits for the device, and returns 0 or a cudaError_t. All pointers are device pointers. Strides
// count elements. "null:" says what a null pointer means. A launcher that needs scratch memory has a
// *_workspace() function: bytes, a function of the arguments' extents alone; aligned to 256, any
// content.
//
// Every result depends on the arguments and never on the number of blocks, the device or its load.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/params.h"

namespace fbc::cuda {

using StreamHandle = void*;

// 'expected at most ...' limits of one launch of a table; longer lists take several launches.
constexpr int kSmallTable = 2;   // a layer: weight and bias
constexpr int kLargeTable = 48;  // a group of layers; 4 KB < parameters < 32 KB, CUDA 12.1 and later

// One posterior that a launch samples. T: float or double.
template <typename T>
struct SampleEntry {
  PosteriorParams<T> posterior;  // noise.offset is added to seed[1]; noise.key is ignored
  const int64_t* seed;           // (2,): key and offset. null with posterior.rho null
  void* sample;                  // (num_samples, K, R, S, C), strides below; null: only the KL
  Dtype sample_dtype;
  WeightStrides sample_stride;
  int64_t sample_sample_stride;  // between draws
  int64_t num_samples;
  T* kl;  // this posterior's KL is written here (0 for a point mass); null: no KL
};

// weight = loc + scale * eps for every entry and draw, and the KL of each, in one launch.
template <typename T>
size_t sample_workspace(const SampleEntry<T>* entries, int count);
template <typename T>
int sample(const SampleEntry<T>* entries, int count, void* workspace, StreamHandle stream);

// Gradients of one posterior.
template <typename T>
struct PosteriorGradEntry {
  PosteriorParams<T> posterior;
  const int64_t* seed;
  // Gradient by draw s of element e is the sum over slabs, in order, of
  //   grad_weight[slab * grad_slab_stride + s * grad_sample_stride + element strides].
  const void* grad_weight;  // null: none
  Dtype grad_dtype;
  WeightStrides grad_stride;
  int64_t grad_sample_stride, grad_slab_stride;
  int64_t num_samples, slabs;
  // Like grad_weight (num_samples 1), summed over draws already, each times its eps: then no noise is
  // made again. null: eps is drawn.
  const void* grad_weight_eps;
  const T* grad_kl;  // scalar; null: 0
  T* grad_loc;       // (K, R, S, C) each; null: not wanted
  T* grad_rho;
  T* grad_prior_loc;  // full size; the caller sums over broadcast dimensions
  T* grad_prior_scale;
  WeightStrides grad_loc_stride, grad_rho_stride, grad_prior_loc_stride, grad_prior_scale_stride;
};
template <typename T>
int posterior_backward(const PosteriorGradEntry<T>* entries, int count, StreamHandle stream);

// out[i] = standard normal of element first + i of draw `sample`.
int normals(const int64_t* seed, int64_t sample, Stream stream_number, int64_t first, int64_t count, float* out,
            StreamHandle stream);
// out[i] = sign of element first + i of draw `sample`: +1 or -1.
int signs(const int64_t* seed, int64_t sample, Stream stream_number, int64_t first, int64_t count, float* out,
          StreamHandle stream);
// out (count, 4) = Philox4x32-10 of counter (count, 4) and key (count, 2); int64 holding uint32.
int philox(const int64_t* counter, const int64_t* key, int64_t count, int64_t* out, StreamHandle stream);
// out (count, 2): seeds derive(seed, first), derive(seed, first + 1), ...
int derive_seeds(const int64_t* seed, int64_t first, int64_t count, int64_t* out, StreamHandle stream);

// z <- activation(z + bias) in place, z (rows, P, Q, K) of any strides; rows are num_samples equal
// groups, each with its bias.
struct BiasActivationParams {
  int64_t rows, P, Q, K;
  int64_t num_samples;
  Dtype dtype;
  void* z;
  ImageStrides z_stride;
  void* pre_activation;  // z + bias is written here too, strides of z; null: not wanted
  const void* bias;      // (num_samples, K), acc_t; null: none
  Activation activation;
  double activation_param;
};
int bias_activation(const BiasActivationParams& params, StreamHandle stream);

// grad = grad_output * activation'(saved), with its sum per draw and channel.
struct ActivationGradParams {
  int64_t rows, P, Q, K;
  int64_t num_samples;
  Dtype dtype;              // of grad_output, saved, grad
  const void* grad_output;  // (rows, P, Q, K)
  ImageStrides grad_output_stride;
  const void* saved;  // output or pre-activation; null for linear
  ImageStrides saved_stride;
  Activation activation;
  double activation_param;
  void* grad;  // (rows, P, Q, K); null: only the sums
  ImageStrides grad_stride;
  void* grad_bias;  // (num_samples, K), acc_t of dtype; null: not wanted
};
size_t activation_grad_workspace(const ActivationGradParams& params);
int activation_grad(const ActivationGradParams& params, void* workspace, StreamHandle stream);

// ---- one-pass convolution: implicit GEMM with mma.sync ------------------------------------------
// bfloat16 and float16 data, or float32 data with tf32 products; parameters float32; sums float32.
// Images are NHWC in memory up to the strides of n, h and w: stride.c is 1 (any value where C is 1).

// How a launch gets its weights.
enum class WeightSource : int32_t {
  kGiven = 0,        // from memory, sampled before
  kCooperative = 1,  // sampled once per launch, by all blocks together, into the workspace
  kPrivate = 2,      // sampled by each block for itself: few pixel tiles, or a draw per example
};

struct ConvWeight {
  WeightSource source;
  const void* given;                 // kGiven: (num_samples, K, R, S, C/G) contiguous, dtype
  PosteriorParams<float> posterior;  // the others; noise.offset is added to seed[1]
  const int64_t* seed;
  // kPrivate: scale of each weight, contiguous KRSC, float32, made by scale_of(); null: made from rho
  // each time. With a draw per example the loop must not contain a softplus.
  const float* scale;
};
int scale_of(const PosteriorParams<float>& posterior, float* scale, StreamHandle stream);

struct FpropParams {
  ConvShape shape;
  Dtype dtype;        // of input, output, pre_activation; kFloat32 means tf32 products
  const void* input;  // (N, H, W, C)
  ImageStrides input_stride;
  void* output;                // (output_rows, P, Q, K)
  void* pre_activation;        // like output; null: not wanted
  ImageStrides output_stride;  // any
  const float* bias;           // (num_samples, K), sampled before; null: none
  Activation activation;
  float activation_param;
  void* kept_weight;  // (num_samples, K, R, S, C/G) contiguous, dtype; null: not wanted
  float* kl;          // the weight's KL is written here; null: no KL. Not for kGiven
};
size_t fprop_workspace(const FpropParams& params, const ConvWeight& weight);
int fprop(const FpropParams& params, const ConvWeight& weight, void* workspace, StreamHandle stream);

struct DgradParams {
  ConvShape shape;
  Dtype dtype;       // of grad and grad_input
  const void* grad;  // (output_rows, P, Q, K) by the pre-activation; stride.k is 1
  ImageStrides grad_stride;
  void* grad_input;                // (N, H, W, C), every element is written
  ImageStrides grad_input_stride;  // any
};
size_t dgrad_workspace(const DgradParams& params, const ConvWeight& weight);
int dgrad(const DgradParams& params, const ConvWeight& weight, void* workspace, StreamHandle stream);

// Gradient by the weight, as slabs that posterior_backward() sums in order while it forms the
// gradients by loc and rho. How many slabs is a function of the shape alone.
struct WgradParams {
  ConvShape shape;
  Dtype dtype;        // of input and grad
  const void* input;  // (N, H, W, C)
  ImageStrides input_stride;
  const void* grad;  // (output_rows, P, Q, K); stride.k is 1
  ImageStrides grad_stride;
  PosteriorParams<float> posterior;  // its noise weighs the draws where num_samples > 1
  const int64_t* seed;
  float* slabs;      // (wgrad_slabs(), K, R, S, C/G): sum over draws of dW_s
  float* slabs_eps;  // the same of dW_s * eps_s; null where num_samples is 1
};
int64_t wgrad_slabs(const WgradParams& params);
int wgrad(const WgradParams& params, StreamHandle stream);

// Null, or why the one-pass kernels cannot compute this.
const char* one_pass_cannot(const ConvShape& shape, Dtype dtype);
// Which source fprop and dgrad should use: a function of the shape alone.
WeightSource best_source(const ConvShape& shape);

}  // namespace fbc::cuda
