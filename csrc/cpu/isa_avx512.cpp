// The kernels of this folder for avx512.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define FBC_ISA 2

namespace fbc {
namespace isa_avx512 {
#include "isa_body.inc"

KernelTable<float> table_float() { return make_table<float>(); }
KernelTable<double> table_double() { return make_table<double>(); }
NoiseKernels table_noise() { return {normals, signs}; }
ProbeKernels table_probes() { return probes(); }
}  // namespace isa_avx512
}  // namespace fbc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
