// Note [Noise addressing]
// A draw is a pure function of its address and of nothing else: not of thread, tile, batch split,
// memory layout, device, instruction set or dtype. This is public API: a change of one bit is a
// breaking release, and tests/data/noise_golden.npz pins it.
//
//   address  = (key, offset, stream, element)      key, offset: the two int64 of a seed, as uint64
//   counter  = word 0   low 32 bits of element / 4
//              word 1   next 28 bits of element / 4, stream in the top 4 bits
//              word 2,3 low and high half of offset + sample
//   key      = low and high half of key
//   word j of Philox4x32-10(counter, key) belongs to element 4 * (element / 4) + j.
//
// Element numbers: weight KRSC order over the logical (K, R, S, C/G), whatever the strides; bias k;
// input sign n*C + c, output sign n*K + k; local ((n*P + p)*Q + q)*K + k.
// Words (0, 1) and (2, 3) give one Box-Muller pair each: the first word the radius,
// u = (word >> 1 + 0.5) / 2^31, the second the angle: 31 bits over half a turn, the top bit the
// cosine's sign. The first element of a pair takes the cosine, the second the sine.
// A random sign is the low bit of its element's word: 0 means +1, 1 means -1.
// |z| <= 6.66 (31-bit u; a normal exceeds it with probability 3e-11).
#pragma once

#include <cstdint>

#include "macros.h"
#include "math.h"
#include "philox.h"

namespace fbc {

enum class Stream : uint32_t {
  kWeight = 0,
  kBias = 1,
  kSignInput = 2,
  kSignOutput = 3,
  kLocal = 4,
  kRounding = 5,
  kDerive = 15,
};

struct NoiseKey {
  uint64_t key;
  uint64_t offset;  // of the seed, plus sample, plus offset_add; wraps modulo 2^64
};

constexpr int kElementsPerCounter = 4;

FBC_INLINE PhiloxWords noise_words(NoiseKey noise, Stream stream, uint64_t block) {
  const PhiloxWords counter = {
      {static_cast<uint32_t>(block),
       static_cast<uint32_t>((block >> 32) & 0x0fffffffu) | (static_cast<uint32_t>(stream) << 28),
       static_cast<uint32_t>(noise.offset), static_cast<uint32_t>(noise.offset >> 32)}};
  return philox4x32_10(counter, static_cast<uint32_t>(noise.key), static_cast<uint32_t>(noise.key >> 32));
}

// u = (word >> 1 + 0.5) / 2^31, split for its logarithm.
FBC_INLINE SplitFloat split_uniform(uint32_t word) {
  return split_at_sqrt2(fused_multiply_add(static_cast<float>(static_cast<int32_t>(word >> 1)), 0x1p-31f, 0x1p-32f));
}

// sqrt(-2 log u). u <= 1 after rounding, where the polynomial may return +0: the max guards the root.
FBC_INLINE float box_muller_radius(SplitFloat u) {
  const float s = -2.0f * log_of_split(u);
  return square_root(s > 0.0f ? s : 0.0f);
}

FBC_INLINE float box_muller_radius(uint32_t word) { return box_muller_radius(split_uniform(word)); }

struct NormalPair {
  float cosine;
  float sine;
};

// radius * cos and sin of (pi/2) s, s in [-1, 1), by minimax polynomials in s^2: no range reduction is needed.
FBC_INLINE NormalPair box_muller_turn(float radius, uint32_t angle_word) {
  const float s = static_cast<float>(static_cast<int32_t>(angle_word << 1)) * 0x1p-31f;
  const float t = s * s;
  float sine = 0.000151485132f;
  sine = fused_multiply_add(sine, t, -0.00467376644f);
  sine = fused_multiply_add(sine, t, 0.0796896815f);
  sine = fused_multiply_add(sine, t, -0.645963728f);
  sine = fused_multiply_add(sine, t, 1.57079637f);
  float cosine = 0.000858190586f;
  cosine = fused_multiply_add(cosine, t, -0.0208106283f);
  cosine = fused_multiply_add(cosine, t, 0.253650755f);
  cosine = fused_multiply_add(cosine, t, -1.23369825f);
  cosine = fused_multiply_add(cosine, t, 0.99999994f);
  const uint32_t sign = angle_word & 0x80000000u;
  return {bits_to_float(float_to_bits(radius * cosine) ^ sign), radius * (s * sine)};
}

FBC_INLINE NormalPair box_muller(uint32_t radius_word, uint32_t angle_word) {
  return box_muller_turn(box_muller_radius(radius_word), angle_word);
}

// The standard-normal draw of one element: the definition that every fast path must equal.
FBC_INLINE float standard_normal(NoiseKey noise, Stream stream, uint64_t element) {
  const PhiloxWords w = noise_words(noise, stream, element / kElementsPerCounter);
  const int pair = static_cast<int>(element & 2u);
  const NormalPair z = box_muller(pair ? w.word[2] : w.word[0], pair ? w.word[3] : w.word[1]);
  return (element & 1u) ? z.sine : z.cosine;
}

// +1 or -1: the draw of one element of a sign stream.
FBC_INLINE float sign_of_word(uint32_t word) { return bits_to_float(0x3f800000u | (word << 31)); }
FBC_INLINE float random_sign(NoiseKey noise, Stream stream, uint64_t element) {
  const PhiloxWords w = noise_words(noise, stream, element / kElementsPerCounter);
  return sign_of_word(w.word[element % kElementsPerCounter]);
}

// An independent child: the four words of block `index` in the derive stream.
FBC_INLINE NoiseKey derive_seed(NoiseKey parent, uint64_t index) {
  const PhiloxWords w = noise_words(parent, Stream::kDerive, index);
  return {w.word[0] | (static_cast<uint64_t>(w.word[1]) << 32), w.word[2] | (static_cast<uint64_t>(w.word[3]) << 32)};
}

}  // namespace fbc
