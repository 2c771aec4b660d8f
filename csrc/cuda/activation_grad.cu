// The first pass of backward: the gradient by the pre-activation, and its sum per draw and channel.
//
//   grad[n, p, q, k]   = grad_output[n, p, q, k] * activation'(saved[n, p, q, k])
//   grad_bias[draw, k] = sum of grad over the rows of the draw, p and q
//
// Who owns what: block = (draw, chunk of items, tile of channels), one after another in a flat
// grid.
//
//   along channels (NHWC)                          along columns (NCHW)
//   item = pixel of the draw                       item = kVector columns of one channel
//   tile = across * kVector channels               tile = one channel, across = 1
//
//            across threads  -> channels
//     down   +---------------+      thread (d, a) takes items d, d + down, ... of the chunk
//     threads|               |      and adds them up in float32 (double for double);
//       |    |               |      then a tree over d in shared memory.
//       v    +---------------+
//
// A chunk's sum goes to partial[draw][chunk][k]; a second launch adds the chunks in order, in
// double. One chunk needs no second launch. What a chunk is follows from extents and layout, never
// from the device: the sums have the same bits on any grid.
//
// Shared memory: sums[kVector][256]. Bounds: any extents and strides; vectors of 16 bytes where
// strides and alignment allow, else single elements; every access is checked against items and
// channels.
//
// Source: the formulas are those of core/activation.h.
#include "../core/dispatch.h"
#include "epilogue.cuh"
#include "image.cuh"
#include "kernels.h"

namespace fbc::cuda {
namespace {

constexpr int kGradThreads = 256;
// Few channels to a block, so that few chunks come one after another; 8 floats are one sector.
constexpr int kSumChannels = 8, kSumSegments = kGradThreads / kSumChannels;
// Chunks are made so large that a launch has about this many blocks.
constexpr int64_t kWantedBlocks = 1024;

struct GradPlan {
  int64_t items, chunk_items, chunks, tiles;
  int32_t across, down, steps;
};

template <typename scalar_t>
struct GradWalk {
  using T = acc_t<scalar_t>;
  Radix radix;  // item -> (0, n within the draw, p, q / size)
  GradPlan plan;
  Divisor tiles, chunks;
  int64_t rows_per_sample, K;
  const scalar_t* grad_output;
  const scalar_t* saved;  // null: linear
  scalar_t* grad;         // null: only the sums
  T* partial;             // null: no sums
  ImageStrides grad_output_stride, saved_stride, grad_stride;
  Activation activation;
  T activation_param;
  bool along_channels;
};

// ---- device ---------------------------------------------------------------------------------
// One item: adds its gradient to sum and stores it.
template <typename scalar_t, int kVector>
FBC_DEVICE void walk_item(const GradWalk<scalar_t>& w, int64_t item, int64_t first_row, int64_t k,
                          acc_t<scalar_t> (&sum)[kVector]) {
  using T = acc_t<scalar_t>;
  const Digits d = digits_of(w.radix, item);
  const int64_t n = first_row + d.d1;
  const int64_t q = w.along_channels ? d.d3 : static_cast<int64_t>(d.d3) * kVector;
  T grad[kVector];
  load_vector(w.grad_output + pixel_offset(w.grad_output_stride, n, d.d2, q, k), grad);
  if (w.saved != nullptr) {
    T saved[kVector];
    load_vector(w.saved + pixel_offset(w.saved_stride, n, d.d2, q, k), saved);
    differentiate_each(w.activation, saved, grad, w.activation_param);
  }
  FBC_UNROLL
  for (int i = 0; i < kVector; ++i) sum[i] += grad[i];
  if (w.grad != nullptr) {
    store_vector(w.grad + pixel_offset(w.grad_stride, n, d.d2, q, k), grad);
  }
}

// Tree over `down`; thread (0, a) ends with the sums of its channels.
template <int kVector, typename T>
FBC_DEVICE void sum_down(T* shared, int thread, int across, int down, T (&sum)[kVector]) {
  FBC_UNROLL
  for (int i = 0; i < kVector; ++i) shared[i * kGradThreads + thread] = sum[i];
  for (int half = down / 2; half > 0; half /= 2) {
    gpu::sync();
    if (thread < half * across) {
      FBC_UNROLL
      for (int i = 0; i < kVector; ++i) {
        shared[i * kGradThreads + thread] += shared[i * kGradThreads + thread + half * across];
      }
    }
  }
  FBC_UNROLL
  for (int i = 0; i < kVector; ++i) sum[i] = shared[i * kGradThreads + thread];
}

template <typename scalar_t, int kVector>
FBC_KERNEL(kGradThreads, sizeof(scalar_t) == 8 ? 2 : 4)
void activation_grad_kernel(FBC_PARAM GradWalk<scalar_t> w) {
  using T = acc_t<scalar_t>;
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int outer = w.tiles.divide(block), tile = block - outer * w.tiles.value;
  const int draw = w.chunks.divide(outer), chunk = outer - draw * w.chunks.value;
  const int d = thread / w.plan.across, a = thread - d * w.plan.across;
  const int64_t channel = static_cast<int64_t>(tile) * w.plan.across + a;
  const int64_t k = w.along_channels ? channel * kVector : channel;
  const int64_t first = chunk * w.plan.chunk_items + d;
  const int64_t end = first - d + w.plan.chunk_items;
  const int64_t last = end < w.plan.items ? end : w.plan.items;
  T sum[kVector] = {};
  if (k < w.K) {
    FBC_UNROLL_BY(2)
    for (int64_t item = first; item < last; item += w.plan.down) {
      walk_item(w, item, draw * w.rows_per_sample, k, sum);
    }
  }
  if (w.partial == nullptr) return;
  sum_down(reinterpret_cast<T*>(gpu::shared()), thread, w.plan.across, w.plan.down, sum);
  if (d != 0 || k >= w.K) return;
  T* const to = w.partial + static_cast<int64_t>(outer) * w.K + k;
  if (w.along_channels) {
    FBC_UNROLL
    for (int i = 0; i < kVector; ++i) to[i] = sum[i];
  } else {
    T total = T(0);
    FBC_UNROLL
    for (int i = 0; i < kVector; ++i) total += sum[i];
    to[0] = total;
  }
}

// out[draw, k] = sum over chunks of partial[draw, chunk, k]: thread = (segment of chunks, channel).
template <typename T>
FBC_KERNEL(kGradThreads, 4)
void sum_chunks_kernel(const T* partial, int64_t chunks, int64_t K, Divisor tiles, T* out) {
  double* const shared = reinterpret_cast<double*>(gpu::shared());
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int draw = tiles.divide(block), segment = thread / kSumChannels;
  const int64_t k = static_cast<int64_t>(block - draw * tiles.value) * kSumChannels + thread % kSumChannels;
  const int64_t length = (chunks + kSumSegments - 1) / kSumSegments;
  const int64_t first = segment * length;
  const int64_t last = first + length < chunks ? first + length : chunks;
  double sum = 0.0;
  if (k < K) {
    FBC_UNROLL_BY(8)
    for (int64_t c = first; c < last; ++c) {
      sum += static_cast<double>(partial[(draw * chunks + c) * K + k]);
    }
  }
  shared[thread] = sum;
  gpu::sync();
  if (segment != 0 || k >= K) return;
  for (int s = 1; s < kSumSegments; ++s) sum += shared[s * kSumChannels + thread];
  out[draw * K + k] = static_cast<T>(sum);
}

// ---- host -----------------------------------------------------------------------------------
// size: elements of a vector.
GradPlan plan_grad(const ActivationGradParams& p, int64_t size, bool along_channels) {
  GradPlan plan = {};
  const int64_t rows = p.rows / p.num_samples;
  plan.items = rows * p.P * p.Q / (along_channels ? 1 : size);
  plan.across = 1;
  const int64_t vectors = along_channels ? p.K / size : 1;
  while (along_channels && plan.across < 32 / (size > 1 ? 4 : 1) && plan.across < vectors) {
    plan.across *= 2;
  }
  plan.down = kGradThreads / plan.across;
  plan.tiles = along_channels ? (vectors + plan.across - 1) / plan.across : p.K;
  const int64_t steps_of_all = (plan.items + plan.down - 1) / plan.down;
  const int64_t total = steps_of_all * plan.tiles * p.num_samples;
  const int64_t steps = (total + kWantedBlocks - 1) / kWantedBlocks;
  plan.steps = static_cast<int32_t>(steps < 4 ? 4 : steps);
  plan.chunk_items = static_cast<int64_t>(plan.steps) * plan.down;
  plan.chunks = (plan.items + plan.chunk_items - 1) / plan.chunk_items;
  return plan;
}

template <typename scalar_t>
int run_activation_grad(const ActivationGradParams& p, void* workspace, StreamHandle stream) {
  using T = acc_t<scalar_t>;
  GradWalk<scalar_t> w = {};
  const bool linear = p.activation == Activation::kLinear;
  w.grad_output_stride = p.grad_output_stride;
  w.saved_stride = p.saved_stride;
  w.grad_stride = p.grad_stride;
  const ImageTensor tensors[3] = {
      {p.grad_output, &w.grad_output_stride}, {linear ? nullptr : p.saved, &w.saved_stride}, {p.grad, &w.grad_stride}};
  const ImageWalk walk = plan_walk<scalar_t>(p.rows, p.P, p.Q, p.K, tensors, 3);
  const int64_t size = walk.wide ? kWideVector<scalar_t> : 1;
  w.plan = plan_grad(p, size, walk.along_channels);
  w.rows_per_sample = p.rows / p.num_samples, w.K = p.K;
  w.radix = make_radix(w.rows_per_sample, walk.P, walk.along_channels ? walk.Q : walk.Q / size, w.plan.items < kNarrow);
  const int64_t blocks = w.plan.tiles * w.plan.chunks * p.num_samples;
  if (blocks >= kNarrow) return 1;
  w.tiles = divisor(w.plan.tiles), w.chunks = divisor(w.plan.chunks);
  w.grad_output = static_cast<const scalar_t*>(p.grad_output);
  w.saved = linear ? nullptr : static_cast<const scalar_t*>(p.saved);
  w.grad = static_cast<scalar_t*>(p.grad);
  T* const out = static_cast<T*>(p.grad_bias);
  const bool direct = w.plan.chunks == 1;
  w.partial = out == nullptr || direct ? out : static_cast<T*>(workspace);
  w.activation = p.activation;
  w.activation_param = static_cast<T>(p.activation_param);
  w.along_channels = walk.along_channels;
  const dim3 grid(static_cast<unsigned>(blocks));
  const size_t shared_bytes = kGradThreads * static_cast<size_t>(size) * sizeof(T);
  const int status =
      walk.wide ? gpu::launch(activation_grad_kernel<scalar_t, kWideVector<scalar_t>>, grid, kGradThreads, shared_bytes,
                              stream, w)
                : gpu::launch(activation_grad_kernel<scalar_t, 1>, grid, kGradThreads, shared_bytes, stream, w);
  if (status != 0 || out == nullptr || direct) return status;
  const int64_t tiles = (p.K + kSumChannels - 1) / kSumChannels;
  return gpu::launch(sum_chunks_kernel<T>, dim3(static_cast<unsigned>(tiles * p.num_samples)), kGradThreads,
                     kGradThreads * sizeof(double), stream, static_cast<const T*>(w.partial), w.plan.chunks, p.K,
                     divisor(tiles), out);
}

}  // namespace

size_t activation_grad_workspace(const ActivationGradParams& params) {
  if (params.grad_bias == nullptr || params.num_samples == 0) return 0;
  const bool is_double = params.dtype == Dtype::kFloat64, is_float = params.dtype == Dtype::kFloat32;
  int64_t chunks = 0;  // of the layout that needs most
  for (const int64_t size : {1, is_double ? 2 : is_float ? 4 : 8}) {
    for (const bool along_channels : {true, false}) {
      const int64_t some = plan_grad(params, size, along_channels).chunks;
      chunks = some > chunks ? some : chunks;
    }
  }
  return static_cast<size_t>(params.num_samples * chunks * params.K * (is_double ? 8 : 4));
}

int activation_grad(const ActivationGradParams& params, void* workspace, StreamHandle stream) {
  const int64_t channels = params.num_samples * params.K;
  if (params.rows * params.P * params.Q * params.K == 0) {
    if (params.grad_bias == nullptr || channels == 0) return 0;
    const int64_t bytes = params.dtype == Dtype::kFloat64 ? 8 : 4;
    return gpu::fill_zero(params.grad_bias, static_cast<size_t>(channels * bytes), stream);
  }
  int status = 1;
  visit_dtype(params.dtype,
              [&](auto tag) { status = run_activation_grad<typename decltype(tag)::type>(params, workspace, stream); });
  return status;
}

}  // namespace fbc::cuda
