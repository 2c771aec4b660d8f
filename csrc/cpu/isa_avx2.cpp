// The kernels of this folder for avx2.
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
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FBC_ISA 1

namespace fbc {
namespace isa_avx2 {
#include "isa_body.inc"

KernelTable<float> table_float() { return make_table<float>(); }
KernelTable<double> table_double() { return make_table<double>(); }
NoiseKernels table_noise() { return {normals, signs}; }
ProbeKernels table_probes() { return probes(); }
}  // namespace isa_avx2
}  // namespace fbc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
