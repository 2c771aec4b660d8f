// Normals of four consecutive elements, as the tensor-core kernels use them: see
// Note [Noise addressing] in core/noise.h. The bits are those of standard_normal().
#pragma once

#include "../core/noise.h"
#include "gpu.cuh"

namespace fbc::cuda {

// One Philox call where `element` is a multiple of four, two elsewhere.
FBC_DEVICE void normal_quad(NoiseKey noise, Stream stream, uint64_t element, float (&z)[4]) {
  const int skew = static_cast<int>(element & 3u);
  const PhiloxWords a = noise_words(noise, stream, element / kElementsPerCounter);
  if (skew == 0) {
    const NormalPair first = box_muller(a.word[0], a.word[1]);
    const NormalPair second = box_muller(a.word[2], a.word[3]);
    z[0] = first.cosine, z[1] = first.sine, z[2] = second.cosine, z[3] = second.sine;
    return;
  }
  const PhiloxWords b = noise_words(noise, stream, element / kElementsPerCounter + 1);
  const bool late = skew >= 2, odd = (skew & 1) != 0;
  const NormalPair p0 = box_muller(late ? a.word[2] : a.word[0], late ? a.word[3] : a.word[1]);
  const NormalPair p1 = box_muller(late ? b.word[0] : a.word[2], late ? b.word[1] : a.word[3]);
  const NormalPair p2 = box_muller(late ? b.word[2] : b.word[0], late ? b.word[3] : b.word[1]);
  z[0] = odd ? p0.sine : p0.cosine;
  z[1] = odd ? p1.cosine : p0.sine;
  z[2] = odd ? p1.sine : p1.cosine;
  z[3] = odd ? p2.cosine : p1.sine;
}

}  // namespace fbc::cuda
