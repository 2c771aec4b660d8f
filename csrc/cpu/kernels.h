// The CPU kernels as seen from outside: one table of typed pointers per instruction set.
//
// A kernel works on a range of rows and allocates nothing; threads belong to the caller, who passes
// `Parallel`. Kernels that sweep (fprop, dgrad, wgrad) run several ranges one after another through it.
#pragma once

#include <cstdint>

#include "../core/algorithm.h"
#include "../core/params.h"
#include "capability.h"

namespace fbc {

// run(tasks, task, context) calls task(context, thread, begin, end) over disjoint ranges that cover
// [0, tasks), in any order, and returns when all are done. `thread` is below `threads` and no two
// calls that run at the same time have the same one: it picks the scratch memory, never a result.
struct Parallel {
  int32_t threads;
  void (*run)(int64_t tasks, void (*task)(void* context, int32_t thread, int64_t begin, int64_t end), void* context);
};

// Flipout: image n of the output rows is convolved with loc + (t_n r_n^T) * delta, where loc + delta is
// the draw. Null: no signs.
struct FlipSigns {
  const float* input;   // r: (output_rows, C)
  const float* output;  // t: (output_rows, K)
};

struct FpropParams {
  ConvShape shape;
  Dtype dtype;         // of input
  Dtype weight_dtype;  // draws are rounded to it
  Dtype output_dtype;  // of output, pre_activation
  const void* input;   // (N, H, W, C)
  ImageStrides input_stride;
  bool square_input;  // the convolution reads input^2
  FlipSigns signs;
  void* output;          // (output_rows, P, Q, K)
  void* pre_activation;  // like output; null: not wanted
  ImageStrides output_stride;
  const void* bias;  // (num_samples, K) in acc_t, already sampled; null: none
  Activation activation;
  double activation_param;
  void* kept_weight;    // (num_samples, K, R, S, C/G), KRSC order, weight_dtype; null: not wanted
  double* kl_partials;  // (K, kl_chunks_per_row); null: no KL
};

struct DgradParams {
  ConvShape shape;
  Dtype dtype;         // of grad_input
  Dtype weight_dtype;  // draws are rounded to it
  FlipSigns signs;
  Dtype grad_dtype;  // acc_t; kBFloat16 for KernelTable::pairs
  const void* grad;  // (output_rows, P, Q, K) gradient by the pre-activation, NHWC
  void* grad_input;  // (N, H, W, C)
  ImageStrides grad_input_stride;
};

struct ActivationGradParams;

struct WgradParams {
  ConvShape shape;
  Dtype dtype;        // of input
  const void* input;  // (N, H, W, C)
  ImageStrides input_stride;
  bool square_input;  // the gradient is that of a convolution of input^2
  FlipSigns signs;
  Dtype grad_dtype;  // acc_t; kBFloat16 for KernelTable::pairs
  const void* grad;  // (output_rows, P, Q, K), NHWC
  // Makes the gradient strip by strip, with the sums for the bias, where nobody else reads it: grad is null.
  // For the direct kernels of one group, without signs.
  const ActivationGradParams* makes_grad;
};

// grad = grad_output * activation'(saved), in NHWC, with its sum per channel.
struct ActivationGradParams {
  int64_t rows, P, Q, K;    // rows = output_rows
  int64_t num_samples;      // bias sums are per draw: rows / num_samples consecutive rows each
  Dtype dtype;              // of grad_output and saved
  const void* grad_output;  // (rows, P, Q, K)
  ImageStrides grad_output_stride;
  const void* saved;  // output or pre-activation; null for linear
  ImageStrides saved_stride;
  Activation activation;
  double activation_param;
  Dtype grad_dtype;  // of grad: acc_t, or kBFloat16
  void* grad;        // (rows, P, Q, K), contiguous NHWC; null: only the sums
  void* grad_bias;   // (num_samples, K), acc_t; null: not wanted
};

// The elementwise half of Flipout and local reparameterisation. Images are NHWC and acc_t where no
// strides are given. Output rows are num_samples groups; row n of a group reads image n of the input
// where all groups share it (share_input), else its own.
struct AffineShape {
  int64_t rows, rows_per_sample;  // output rows
  int64_t P, Q, K;                // of the image that a pass goes over
  bool share_input;

  int64_t image(int64_t row) const { return share_input ? row % rows_per_sample : row; }
};

// out[row] = image(row) * sign[row], constant over space.
struct SignParams {
  AffineShape shape;
  Dtype dtype;        // of image
  const void* image;  // (images, P, Q, K)
  ImageStrides image_stride;
  const float* sign;  // (rows, K)
  void* out;          // (rows, P, Q, K)
};

// z = mean + bias + sign * delta       Flipout
// z = mean + bias + eps * deviation    local; deviation = sqrt(max(variance, 0))
struct AffineForwardParams {
  AffineShape shape;
  const void* mean;     // (images, P, Q, K)
  const float* sign;    // (rows, K); null: local
  const void* second;   // (rows, P, Q, K) delta, or (images, P, Q, K) variance
  void* deviation;      // (images, P, Q, K), local
  NoiseKey noise;       // of sample 0
  uint64_t row_offset;  // number of the first row of a group
  const void* bias;     // (num_samples, K); null: none
  Activation activation;
  double activation_param;
  Dtype dtype;           // of output, pre_activation
  void* output;          // (rows, P, Q, K)
  void* pre_activation;  // like output; null: not wanted
  ImageStrides output_stride;
};

// Local: the gradients by mean and by variance, summed over the draws that share an image.
struct LocalBackwardParams {
  AffineShape shape;
  const void* grad;       // (rows, P, Q, K) by z
  const void* deviation;  // (images, P, Q, K)
  NoiseKey noise;
  uint64_t row_offset;
  void* grad_mean;      // (images, P, Q, K); null: that of one draw is `grad`
  void* grad_variance;  // (images, P, Q, K); null: not wanted
};

// grad_input = by_mean + sum over rows of an image  sign * second      Flipout
// grad_input = by_mean + 2 input * second                              local
struct AffineInputGradParams {
  AffineShape shape;    // P, Q, K of the input
  const void* by_mean;  // (images, P, Q, K)
  const void* second;   // (rows, P, Q, K) by the signed input, or (images, ...) by its square
  const float* sign;    // (rows, K); null: local
  Dtype dtype;          // of input, grad_input
  const void* input;    // (images, P, Q, K); local
  ImageStrides input_stride;
  void* grad_input;  // (images, P, Q, K)
  ImageStrides grad_input_stride;
};

// Each works on a range of image rows, numbered over images (rows x P, or images x P) in order.
template <typename T>
struct AffineKernels {
  void (*apply_signs)(const SignParams&, int64_t begin, int64_t end);              // rows x P
  void (*forward)(const AffineForwardParams&, int64_t begin, int64_t end);         // rows x P
  void (*local_backward)(const LocalBackwardParams&, int64_t begin, int64_t end);  // images x P
  void (*input_grad)(const AffineInputGradParams&, int64_t begin, int64_t end);    // images x P
};

// The three directions by one method. workspace: the bytes that *_workspace() asks for with
// Parallel::threads, 64-byte aligned, uninitialised.
template <typename T>
struct ConvKernels {
  int64_t (*fprop_workspace)(const FpropParams&, int32_t threads);
  void (*fprop)(const FpropParams&, const PosteriorParams<T>&, Parallel, void* workspace);
  int64_t (*dgrad_workspace)(const DgradParams&, int32_t threads);
  void (*dgrad)(const DgradParams&, const PosteriorParams<T>&, Parallel, void* workspace);
  int64_t (*wgrad_workspace)(const WgradParams&, int32_t threads);
  void (*wgrad)(const WgradParams&, const PosteriorParams<T>&, const PosteriorGrads<T>&, Parallel,
                void* workspace);  // fills PosteriorGrads' outputs; its grad_weight is ignored
};

// T is float or double: the dtype of the parameters, of the KL and of every sum.
template <typename T>
struct KernelTable {
  // Rows [k_begin, k_end) of one posterior. kl_partials is the whole (K, chunks) array.
  void (*sample)(const PosteriorParams<T>&, int64_t sample, int64_t k_begin, int64_t k_end, const WeightOut& out,
                 double* kl_partials);
  void (*kl)(const PosteriorParams<T>&, int64_t k_begin, int64_t k_end, double* kl_partials);
  void (*posterior_backward)(const PosteriorParams<T>&, const PosteriorGrads<T>&, int64_t k_begin, int64_t k_end);

  ConvKernels<T> direct;       // any convolution
  ConvKernels<T> pairs;        // of bfloat16, in its own arithmetic: what pairs_fit() accepts; null: none
  ConvKernels<T> winograd2;    // what winograd_fits() accepts
  ConvKernels<T> winograd2x4;  // likewise
  ConvKernels<T> winograd4;    // likewise
  AffineKernels<T> affine;
  int64_t (*activation_grad_workspace)(const ActivationGradParams&, int32_t threads);
  void (*activation_grad)(const ActivationGradParams&, Parallel, void* workspace);
};

struct NoiseKernels {
  // out[i] = standard normal of element first + i
  void (*normals)(NoiseKey, Stream, uint64_t first, int64_t count, float* out);
  // out[i] = the sign of element first + i: +1 or -1
  void (*signs)(NoiseKey, Stream, uint64_t first, int64_t count, float* out);
};

// For measuring the processor; see peak.inc.
struct ProbeKernels {
  int64_t operations;  // of one iteration: a multiplication and an addition in each lane of each chain
  // A lane of the sum of the chains, which keeps them from being left out.
  float (*multiply_adds)(int64_t iterations, float factor, float term);
};

template <typename T>
const KernelTable<T>& kernels();  // of current_isa()
const NoiseKernels& noise_kernels();
const ProbeKernels& probe_kernels(Isa isa);  // of one that the processor has

// Of kDirect or one of Winograd's.
template <typename T>
const ConvKernels<T>& conv_kernels(Algorithm method) {
  const KernelTable<T>& table = kernels<T>();
  if (method == Algorithm::kWinograd2) return table.winograd2;
  if (method == Algorithm::kWinograd2x4) return table.winograd2x4;
  return method == Algorithm::kWinograd4 ? table.winograd4 : table.direct;
}

// Whether the Winograd kernels compute this: 3x3, no stride, no dilation, one group; any padding.
inline bool winograd_fits(const ConvShape& s) {
  return s.R == 3 && s.S == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1 &&
         s.groups == 1;
}

// Whether the kernels for pairs of bfloat16 compute this, where the processor has them: without signs and
// squares, and not groups of a few channels, which the direct kernels spread over vectors.
inline bool pairs_fit(const ConvShape& s) {
  return s.groups == 1 || s.channels_per_group() > 4 || s.filters_per_group() > 4;
}

double sum_kl_partials(const double* partials, int64_t count);  // in order

}  // namespace fbc
