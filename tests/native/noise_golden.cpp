// Prints noise from its one-element definition, for tests/noise_golden.py. One request per line,
//
//   normals KEY OFFSET STREAM FIRST COUNT     COUNT draws as the bits of their float
//   words KEY OFFSET STREAM BLOCK COUNT       the four words of each of COUNT blocks
//
// in unsigned decimal; one line of unsigned decimal words per answer.
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "../../csrc/core/noise.h"

int main() {
  char kind[16];
  uint64_t key, offset, stream, first, count;
  while (std::scanf("%15s %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64, kind, &key, &offset, &stream,
                    &first, &count) == 6) {
    const fbc::NoiseKey noise = {key, offset};
    const fbc::Stream which = static_cast<fbc::Stream>(stream);
    for (uint64_t i = 0; i < count; ++i) {
      if (std::strcmp(kind, "normals") == 0) {
        const float z = fbc::standard_normal(noise, which, first + i);
        std::printf("%" PRIu32 " ", fbc::float_to_bits(z));
      } else {
        const fbc::PhiloxWords words = fbc::noise_words(noise, which, first + i);
        for (const uint32_t word : words.word) std::printf("%" PRIu32 " ", word);
      }
    }
    std::printf("\n");
  }
  return 0;
}
