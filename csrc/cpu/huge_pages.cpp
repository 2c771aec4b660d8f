#include "huge_pages.h"

#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fbc {

namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr int64_t kLeastBytes = int64_t{4} << 20;

std::atomic<bool> enabled{true};

}  // namespace

void use_huge_pages(bool use) { enabled.store(use, std::memory_order_relaxed); }

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLeastBytes || !enabled.load(std::memory_order_relaxed)) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace fbc
