// The tables that the isa_*.cpp files fill; kernels.cpp picks one. Internal to this folder.
#pragma once

#include "kernels.h"

#define FBC_DECLARE_ISA(name)         \
  namespace name {                    \
  KernelTable<float> table_float();   \
  KernelTable<double> table_double(); \
  NoiseKernels table_noise();         \
  ProbeKernels table_probes();        \
  }

namespace fbc {
FBC_DECLARE_ISA(isa_baseline)
#if defined(__x86_64__)
FBC_DECLARE_ISA(isa_avx2)
FBC_DECLARE_ISA(isa_avx512)
namespace isa_avx512bf16 {
ConvKernels<float> table_pairs();
}
#endif
}  // namespace fbc

#undef FBC_DECLARE_ISA
