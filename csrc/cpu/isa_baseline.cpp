// The kernels of this folder for baseline.
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

#define FBC_ISA 0

namespace fbc {
namespace isa_baseline {
#include "isa_body.inc"

KernelTable<float> table_float() { return make_table<float>(); }
KernelTable<double> table_double() { return make_table<double>(); }
NoiseKernels table_noise() { return {normals, signs}; }
ProbeKernels table_probes() { return probes(); }
}  // namespace isa_baseline
}  // namespace fbc
