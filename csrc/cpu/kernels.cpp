#include "kernels.h"

#include "tables.h"

namespace fbc {

namespace {

struct AllTables {
  KernelTable<float> of_float[3];
  KernelTable<double> of_double[3];
  NoiseKernels noise[3];
  ProbeKernels probes[3];
};

AllTables make_all() {
  AllTables all = {};
  all.of_float[0] = isa_baseline::table_float();
  all.of_double[0] = isa_baseline::table_double();
  all.noise[0] = isa_baseline::table_noise();
  all.probes[0] = isa_baseline::table_probes();
#if defined(__x86_64__)
  // The functions that fill a table are themselves compiled for its instruction set.
  if (detected_isa() >= Isa::kAvx2) {
    all.of_float[1] = isa_avx2::table_float();
    all.of_double[1] = isa_avx2::table_double();
    all.noise[1] = isa_avx2::table_noise();
    all.probes[1] = isa_avx2::table_probes();
  }
  if (detected_isa() >= Isa::kAvx512) {
    all.of_float[2] = isa_avx512::table_float();
    all.of_double[2] = isa_avx512::table_double();
    all.noise[2] = isa_avx512::table_noise();
    all.probes[2] = isa_avx512::table_probes();
    if (detected_bf16()) all.of_float[2].pairs = isa_avx512bf16::table_pairs();
  }
#endif
  return all;
}

const AllTables& all_tables() {
  static const AllTables all = make_all();
  return all;
}

}  // namespace

template <>
const KernelTable<float>& kernels<float>() {
  return all_tables().of_float[static_cast<int>(current_isa())];
}
template <>
const KernelTable<double>& kernels<double>() {
  return all_tables().of_double[static_cast<int>(current_isa())];
}
const NoiseKernels& noise_kernels() { return all_tables().noise[static_cast<int>(current_isa())]; }
const ProbeKernels& probe_kernels(Isa isa) { return all_tables().probes[static_cast<int>(isa)]; }

double sum_kl_partials(const double* partials, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += partials[i];
  return sum;
}

}  // namespace fbc
