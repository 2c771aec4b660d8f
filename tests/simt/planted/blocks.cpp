// As tiles.cpp, for what blocks do together: program [seed [bug]].
//
//   item[i][j] = 3 * in[i][j]                 made once per launch, by the block i % grid
//   out[i][j]  = sum over i' <= i item[i'][j] by whichever block comes to row i, so blocks wait
//   sum[j]     = sum over i out[i][j]         by the last block to finish
#include "../check.h"

using namespace fbc;
using test::Buffer;
using test::Suite;

namespace {

enum Bug {
  kNone,
  kNeverReleased,   // the last row's flag
  kNotAwaited,      // a row is read without asking for its flag
  kReleasedEarly,   // before the other threads of the block have written: a missing sync
  kReadEarly,       // by the threads that did not wait: a missing sync after the wait
  kTicketEarly,     // taken before the rows are written: a missing sync
  kTicketNotReset,  // the next launch finds no last block
  kPlainLaunch,     // blocks that wait for one another need not run at once
  kTooManyBlocks,   // more than the device holds
  kOverlap,         // two blocks write one row
  kByBlocks,        // the result depends on the number of blocks
  kBugs
};
const char* const kNames[kBugs] = {"none",         "never_released",   "not_awaited",  "released_early",  "read_early",
                                   "ticket_early", "ticket_not_reset", "plain_launch", "too_many_blocks", "overlap",
                                   "by_blocks"};
constexpr int kThreads = 64;

struct Rows {
  const int32_t* in;
  int32_t *item, *out, *sum;
  uint32_t *flag, *ticket;
  int32_t count;
};

template <Bug kBug>
FBC_DEVICE void make_items(const Rows& p, int block, int blocks, int j) {
  for (int i = block; i < p.count; i += blocks) {
    const bool early = kBug == kReleasedEarly && j == 0;
    if (early) gpu::add_release(p.flag + i, 1);
    p.item[i * kThreads + j] = 3 * p.in[i * kThreads + j];
    if (kBug != kReleasedEarly) gpu::sync();
    if (kBug == kNeverReleased && i == p.count - 1) continue;
    if (j == 0 && !early) gpu::add_release(p.flag + i, 1);
  }
}

template <Bug kBug>
FBC_KERNEL(kThreads, 1)
void rows_kernel(FBC_PARAM Rows p) {
  const int j = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  make_items<kBug>(p, block, blocks, j);
  for (int i = block; i < p.count + (kBug == kOverlap ? 1 : 0); i += blocks) {
    int32_t sum = 0;
    for (int k = 0; k <= i && k < p.count; ++k) {
      if (j == 0 && kBug != kNotAwaited) gpu::wait_at_least(p.flag + k, 1);
      if (kBug != kReadEarly) gpu::sync();
      sum += p.item[k * kThreads + j];
    }
    p.out[i % p.count * kThreads + j] = sum + (kBug == kByBlocks ? blocks : 0);
  }
  auto* last = reinterpret_cast<int32_t*>(gpu::shared());
  if (kBug != kTicketEarly) gpu::sync();
  if (j == 0) *last = gpu::take_ticket(p.ticket) + 1 == gridDim.x;
  gpu::sync();
  if (*last != 0) {
    int32_t sum = 0;
    for (int i = 0; i < p.count; ++i) sum += p.out[i * kThreads + j];
    p.sum[j] = sum;
    if (j == 0 && kBug != kTicketNotReset) *p.ticket = 0;
  }
}

template <Bug kBug>
int launch_rows(const Rows& p) {
  int blocks = 0;
  if (const int status = gpu::resident_blocks(rows_kernel<kBug>, kThreads, 16, &blocks)) return status;
  if (blocks > p.count) blocks = p.count;
  if (kBug == kTooManyBlocks) blocks = 1000;
  const auto grid = static_cast<unsigned>(blocks);
  if (kBug == kPlainLaunch) {
    return gpu::launch(rows_kernel<kBug>, static_cast<unsigned>(p.count), kThreads, 16, nullptr, p);
  }
  return gpu::launch_cooperative(rows_kernel<kBug>, grid, kThreads, 16, nullptr, p);
}
template <int... kIndex>
int launch_any(int bug, const Rows& p, std::integer_sequence<int, kIndex...>) {
  using Launcher = int (*)(const Rows&);
  constexpr Launcher kLaunchers[] = {launch_rows<static_cast<Bug>(kIndex)>...};
  return kLaunchers[bug](p);
}

void check(Suite& suite, int bug, int count, Buffer<uint32_t>& ticket) {
  const int64_t size = int64_t{count} * kThreads;
  const auto in = test::integers<int32_t>(size, -99, 99, suite.random);
  auto item = test::poisoned<int32_t>(size), out = item, sum = test::poisoned<int32_t>(kThreads);
  Buffer<uint32_t> flag(static_cast<size_t>(count), 0);
  Buffer<int32_t> want(in.size()), want_sum(kThreads, 0);
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] = 3 * in[i] + (i >= kThreads ? want[i - kThreads] : 0);
    want_sum[i % kThreads] += want[i];
  }
  const Rows p = {in.data(), item.data(), out.data(), sum.data(), flag.data(), ticket.data(), count};
  suite.launched("rows", launch_any(bug, p, std::make_integer_sequence<int, kBugs>()));
  suite.exact("out", out, want);
  suite.exact("sum", sum, want_sum);
}

}  // namespace

int main(int argc, char** argv) {
  int bug = kNone;
  for (int i = 0; i < kBugs; ++i) {
    if (argc > 1 && std::strcmp(argv[1], "list") == 0) std::printf("%s\n", kNames[i]);
    if (argc > 2 && std::strcmp(argv[2], kNames[i]) == 0) bug = i;
  }
  if (argc > 1 && std::strcmp(argv[1], "list") == 0) return 0;
  Suite suite(argc, argv);
  suite.group(kNames[bug]);
  Buffer<uint32_t> ticket(1, 0);
  check(suite, bug, 17, ticket);
  check(suite, bug, 6, ticket);
  return suite.finish();
}
