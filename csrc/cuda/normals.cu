// The noise itself: normals, random signs, raw Philox words and derived seeds.
//
//   normals       out[i] = eps of element first + i       a thread: one Philox block, four elements
//   signs         out[i] = sign of element first + i      likewise
//   philox        out[i] = Philox4x32-10(counter[i], key[i])
//   derive_seeds  out[i] = (word 0 | word 1 << 32, word 2 | word 3 << 32) of block first + i,
//                          stream 15
//
// One launch covers everything, thread by thread; element accesses, bounds checked, no alignment
// asked.
//
// Source: core/noise.h, Note [Noise addressing].
#include "kernels.h"
#include "noise_quad.cuh"

namespace fbc::cuda {
namespace {

constexpr int kNoiseThreads = 256;

FBC_DEVICE int64_t thread_number() { return static_cast<int64_t>(blockIdx.x) * kNoiseThreads + threadIdx.x; }
FBC_DEVICE NoiseKey key_of(const int64_t* seed, int64_t sample) {
  return {static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1]) + static_cast<uint64_t>(sample)};
}

// The four elements of one block, those inside [first, first + count) stored. draw(element, z)
// gives those of the block that begins with `element`.
template <typename Draw>
FBC_DEVICE void draw_block(uint64_t first, int64_t count, float* out, Draw&& draw) {
  const uint64_t shift = first % kElementsPerCounter;
  const int64_t start = 4 * thread_number() - static_cast<int64_t>(shift);
  if (start >= count) return;
  float z[4];
  draw((first - shift) + 4 * static_cast<uint64_t>(thread_number()), z);
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (start + i >= 0 && start + i < count) out[start + i] = z[i];
  }
}

FBC_KERNEL(kNoiseThreads, 4)
void normals_kernel(const int64_t* seed, int64_t sample, Stream stream, uint64_t first, int64_t count, float* out) {
  const NoiseKey key = key_of(seed, sample);
  draw_block(first, count, out, [&](uint64_t element, float (&z)[4]) { normal_quad(key, stream, element, z); });
}

FBC_KERNEL(kNoiseThreads, 4)
void signs_kernel(const int64_t* seed, int64_t sample, Stream stream, uint64_t first, int64_t count, float* out) {
  const NoiseKey key = key_of(seed, sample);
  draw_block(first, count, out, [&](uint64_t element, float (&z)[4]) {
    const PhiloxWords words = noise_words(key, stream, element / kElementsPerCounter);
    FBC_UNROLL
    for (int j = 0; j < 4; ++j) z[j] = sign_of_word(words.word[j]);
  });
}

FBC_KERNEL(kNoiseThreads, 4)
void philox_kernel(const int64_t* counter, const int64_t* key, int64_t count, int64_t* out) {
  const int64_t i = thread_number();
  if (i >= count) return;
  PhiloxWords words;
  for (int j = 0; j < 4; ++j) words.word[j] = static_cast<uint32_t>(counter[4 * i + j]);
  words = philox4x32_10(words, static_cast<uint32_t>(key[2 * i]), static_cast<uint32_t>(key[2 * i + 1]));
  for (int j = 0; j < 4; ++j) out[4 * i + j] = static_cast<int64_t>(words.word[j]);
}

FBC_KERNEL(kNoiseThreads, 4)
void derive_kernel(const int64_t* seed, int64_t first, int64_t count, int64_t* out) {
  const int64_t i = thread_number();
  if (i >= count) return;
  const PhiloxWords words = noise_words(key_of(seed, 0), Stream::kDerive, static_cast<uint64_t>(first + i));
  for (int j = 0; j < 2; ++j) {
    out[2 * i + j] = static_cast<int64_t>(static_cast<uint64_t>(words.word[2 * j]) |
                                          static_cast<uint64_t>(words.word[2 * j + 1]) << 32);
  }
}

// Grids are limited to 2^31 - 1 blocks; `threads` of them are wanted.
inline bool fits(int64_t threads) { return threads < kNoiseThreads * ((int64_t{1} << 31) - 1); }
inline int64_t quads_of(int64_t first, int64_t count) {
  return count <= 0 ? 0 : (first % kElementsPerCounter + count + 3) / 4;
}
inline dim3 grid_of_threads(int64_t threads) {
  return dim3(static_cast<unsigned>((threads + kNoiseThreads - 1) / kNoiseThreads));
}

}  // namespace

int normals(const int64_t* seed, int64_t sample, Stream stream_number, int64_t first, int64_t count, float* out,
            StreamHandle stream) {
  const int64_t quads = quads_of(first, count);
  if (quads == 0) return 0;
  if (!fits(quads)) return 1;
  return gpu::launch(normals_kernel, grid_of_threads(quads), kNoiseThreads, 0, stream, seed, sample, stream_number,
                     static_cast<uint64_t>(first), count, out);
}

int signs(const int64_t* seed, int64_t sample, Stream stream_number, int64_t first, int64_t count, float* out,
          StreamHandle stream) {
  const int64_t quads = quads_of(first, count);
  if (quads == 0) return 0;
  if (!fits(quads)) return 1;
  return gpu::launch(signs_kernel, grid_of_threads(quads), kNoiseThreads, 0, stream, seed, sample, stream_number,
                     static_cast<uint64_t>(first), count, out);
}

int philox(const int64_t* counter, const int64_t* key, int64_t count, int64_t* out, StreamHandle stream) {
  if (count <= 0) return 0;
  if (!fits(count)) return 1;
  return gpu::launch(philox_kernel, grid_of_threads(count), kNoiseThreads, 0, stream, counter, key, count, out);
}

int derive_seeds(const int64_t* seed, int64_t first, int64_t count, int64_t* out, StreamHandle stream) {
  if (count <= 0) return 0;
  if (!fits(count)) return 1;
  return gpu::launch(derive_kernel, grid_of_threads(count), kNoiseThreads, 0, stream, seed, first, count, out);
}

}  // namespace fbc::cuda
