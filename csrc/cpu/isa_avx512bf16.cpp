// The direct kernels for pairs of bfloat16, for processors with avx512bf16 beside avx512.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../core/dispatch.h"
#include "../core/noise.h"
#include "../core/params.h"
#include "../core/posterior.h"
#include "kernels.h"
#include "tables.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define FBC_ISA 2

namespace fbc {
namespace isa_avx512bf16 {
#include "simd.inc"
#include "pairs.inc"
#include "transpose.inc"
#include "noise.inc"
#include "posterior_chunks.inc"
#include "kl_sum.inc"
#include "posterior.inc"
#include "posterior_backward.inc"
#include "activation.inc"
#include "tile.inc"
#include "weight_pack.inc"
#include "pairs_pack.inc"
#include "row_weights.inc"
#include "strip.inc"
#include "pairs_strip.inc"
#include "depthwise_taps.inc"
#include "tap_conv.inc"
#include "direct.inc"
#include "fprop.inc"
#include "dgrad_narrow.inc"
#include "dgrad.inc"
#include "wgrad_tile.inc"
#include "wgrad.inc"
#include "pairs_wgrad.inc"
#include "wgrad_epilogue.inc"
#include "by_sample.inc"

ConvKernels<float> table_pairs() {
  using T = BFloat16Pair;
  ConvKernels<float> table = {};
  set_by_sample<float, fprop_workspace<T>, fprop<T>, dgrad_workspace<T>, dgrad<T>>(&table);
  table.wgrad_workspace = wgrad_workspace<T>;
  table.wgrad = wgrad<T>;
  return table;
}
}  // namespace isa_avx512bf16
}  // namespace fbc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
