// The CPU kernels as seen from outside: one table of typed pointers per instruction set.
//
// A kernel works on a range of rows and allocates nothing; threads belong to the caller, who passes
// `Parallel`. Kernels that sweep (fprop, dgrad, wgrad) run several ranges one after another through it.
#pragma once

#include <cstdint>

#include "../core/params.h"
#include "capability.h"

namespace fbc {

// run(tasks, task, context) calls task(context, thread, begin, end) over disjoint ranges that cover
// [0, tasks), in any order, and returns when all are done. `thread` is below `threads` and no two
// calls that run at the same time have the same one: it picks the scratch memory, never a result.
struct Parallel {
  int32_t threads;
  void (*run)(int64_t tasks, void (*task)(void* context, int32_t thread, int64_t begin, int64_t end),
              void* context);
};

struct FpropParams {
  ConvShape shape;
  Dtype dtype;                  // of input, output, pre_activation
  const void* input;            // (N, H, W, C)
  ImageStrides input_stride;
  void* output;                 // (output_rows, P, Q, K)
  void* pre_activation;         // like output; null: not wanted
  ImageStrides output_stride;
  const void* bias;             // (num_samples, K) in acc_t, already sampled; null: none
  Activation activation;
  double activation_param;
  void* kept_weight;            // (num_samples, K, R, S, C/G) in KRSC order, dtype; null: not wanted
  double* kl_partials;          // (K, kl_chunks_per_row); null: no KL
};

struct DgradParams {
  ConvShape shape;
  Dtype dtype;                  // of grad_input
  const void* grad;             // (output_rows, P, Q, K) gradient by the pre-activation, NHWC, acc_t
  void* grad_input;             // (N, H, W, C)
  ImageStrides grad_input_stride;
};

struct WgradParams {
  ConvShape shape;
  Dtype dtype;                  // of input
  const void* input;            // (N, H, W, C)
  ImageStrides input_stride;
  const void* grad;             // (output_rows, P, Q, K), NHWC, acc_t
};

// grad = grad_output * activation'(saved), in NHWC and acc_t, with its sum per channel.
struct ActivationGradParams {
  int64_t rows, P, Q, K;        // rows = output_rows
  int64_t num_samples;          // bias sums are per draw: rows / num_samples consecutive rows each
  Dtype dtype;                  // of grad_output and saved
  const void* grad_output;      // (rows, P, Q, K)
  ImageStrides grad_output_stride;
  const void* saved;            // output or pre-activation; null for linear
  ImageStrides saved_stride;
  Activation activation;
  double activation_param;
  void* grad;                   // (rows, P, Q, K), contiguous NHWC, acc_t; null: only the sums
  void* grad_bias;              // (num_samples, K), acc_t; null: not wanted
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
  void (*sample)(const PosteriorParams<T>&, int64_t sample, int64_t k_begin, int64_t k_end,
                 const WeightOut& out, double* kl_partials);
  void (*kl)(const PosteriorParams<T>&, int64_t k_begin, int64_t k_end, double* kl_partials);
  void (*posterior_backward)(const PosteriorParams<T>&, const PosteriorGrads<T>&, int64_t k_begin,
                             int64_t k_end);

  ConvKernels<T> direct;     // any convolution
  ConvKernels<T> winograd2;  // what winograd_fits() accepts
  int64_t (*activation_grad_workspace)(const ActivationGradParams&, int32_t threads);
  void (*activation_grad)(const ActivationGradParams&, Parallel, void* workspace);
};

struct NoiseKernels {
  // out[i] = standard normal of element first + i
  void (*normals)(NoiseKey, Stream, uint64_t first, int64_t count, float* out);
  // out[i] = the sign of element first + i: +1 or -1
  void (*signs)(NoiseKey, Stream, uint64_t first, int64_t count, float* out);
};

template <typename T>
const KernelTable<T>& kernels();  // of current_isa()
const NoiseKernels& noise_kernels();

// Whether the Winograd kernels compute this: 3x3, no stride, no dilation, one group; any padding.
inline bool winograd_fits(const ConvShape& s) {
  return s.R == 3 && s.S == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.groups == 1;
}

double sum_kl_partials(const double* partials, int64_t count);  // in order

}  // namespace fbc
