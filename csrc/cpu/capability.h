// What this processor can do, asked once. FASTBCONV_ISA (read by the Python side and handed over by
// limit_isa) can lower the choice for tests, never raise it.
#pragma once

#include <cstdint>

namespace fbc {

enum class Isa : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

Isa detected_isa();             // the best of this processor that this build contains
Isa current_isa();              // detected_isa(), or the lower limit that was set
bool detected_bf16();           // avx512 with products of bfloat16
bool current_bf16();            // likewise, in use
void limit_isa(Isa isa);        // for tests: use at most this one
const char* isa_name(Isa isa);  // "baseline", "avx2", "avx512"

}  // namespace fbc
