// The noise of core/noise.h as machine code: test_cuda_compile.py compares it with and without
// contraction of a * b + c. plain_kernel shows that the comparison can fail.
#include "core/noise.h"
#include "cuda/noise_quad.cuh"

__global__ void noise_kernel(fbc::NoiseKey key, fbc::Stream stream, uint64_t first, float* out) {
  const uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x;
  out[i] = fbc::standard_normal(key, stream, first + i);
}

__global__ void noise_words_kernel(fbc::NoiseKey key, uint64_t first, uint32_t* words, float* out) {
  const uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x;
  const fbc::PhiloxWords w = fbc::noise_words(key, fbc::Stream::kLocal, first + i);
  for (int j = 0; j < 4; ++j) words[4 * i + j] = w.word[j];
  const fbc::NormalPair z = fbc::box_muller(w.word[0], w.word[1]);
  out[2 * i] = z.cosine;
  out[2 * i + 1] = z.sine;
}

__global__ void noise_quad_kernel(fbc::NoiseKey key, uint64_t first, float* out) {
  const uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x;
  float z[4];
  fbc::cuda::normal_quad(key, fbc::Stream::kWeight, first + 4 * i, z);
  for (int j = 0; j < 4; ++j) out[4 * i + j] = z[j];
}

__global__ void plain_kernel(const float* a, const float* b, float* c) {
  c[threadIdx.x] = a[threadIdx.x] * b[threadIdx.x] + c[threadIdx.x];
}
