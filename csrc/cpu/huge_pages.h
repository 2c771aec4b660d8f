// Huge-page advice for large fresh memory. The C library hands out large blocks unmapped; the first
// touch of every 4 KB page then costs about as much as convolving into it with few channels. Where the
// system leaves the choice to the program (transparent huge pages "madvise"), one call makes the pages
// 2 MB. Advice only: elsewhere, and where it fails, nothing happens.
#pragma once

#include <cstdint>

namespace fbc {

void advise_huge_pages(void* data, int64_t bytes);
void use_huge_pages(bool use);  // on from the start

}  // namespace fbc
