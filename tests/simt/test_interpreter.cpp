// The interpreter itself: what a kernel can see of it, its settings, its failures as a status, and
// launches from several host threads at once. (Bugs that it must catch: planted/.)
#include <string>
#include <thread>

#include "check.h"

using namespace fbc;
using test::Buffer;
using test::Suite;

namespace {

// Counts bytes of shared memory that are not poison, then spoils it for the next block.
FBC_KERNEL(64, 1) void poison_kernel(int32_t* out, int32_t bytes) {
  int32_t seen = 0;
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 64) seen += gpu::shared()[i] != 0xff;
  out[blockIdx.x * 64 + threadIdx.x] = seen;
  gpu::sync();
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 64) gpu::shared()[i] = 1;
}
void test_poison(Suite& suite) {
  suite.group("shared memory is poisoned");
  for (const int bytes : {1, 1000, 4096, 99 << 10}) {
    auto got = test::poisoned<int32_t>(5 * 64);
    suite.launched("poison", gpu::launch(poison_kernel, 5, 64, static_cast<size_t>(bytes), nullptr, got.data(), bytes));
    suite.exact(std::to_string(bytes) + " bytes", got, Buffer<int32_t>(5 * 64, 0));
  }
}

FBC_KERNEL(32, 1) void early_kernel(const float* in, float* out) {
  auto* memory = reinterpret_cast<float*>(gpu::shared());
  const unsigned i = threadIdx.x;
  memory[i] = 7.0f;
  gpu::copy_async<4>(memory + i, in + i, true);
  gpu::copy_commit();
  out[i] = memory[i];  // too early
  gpu::copy_wait<0>();
  out[32 + i] = memory[i];
}
void test_copies_are_late(Suite& suite) {
  suite.group("copies in flight");
  const auto in = test::integers<float>(32, -9, 9, suite.random);
  auto got = test::poisoned<float>(64);
  suite.launched("early", gpu::launch(early_kernel, 1, 32, 128, nullptr, in.data(), got.data()));
  int poisoned = 0;
  for (size_t i = 0; i < 32; ++i) {
    poisoned += std::isnan(got[i]);
    suite.expect(std::isnan(got[i]) || got[i] == in[i], "neither poison nor the copy: %g", got[i]);
    suite.expect(got[32 + i] == in[i], "not the copy: %g", got[32 + i]);
  }
  const bool late = suite.seed == 0 ? poisoned == 32 : poisoned > 0 && poisoned < 32;
  suite.expect(late, "%d of 32 copies were late", poisoned);
}

// Writes who ran in which order.
FBC_KERNEL(64, 1) void order_kernel(uint32_t* counter, int32_t* out) {
  gpu::sync();
  out[blockIdx.x * 64 + threadIdx.x] = static_cast<int32_t>(gpu::take_ticket(counter));
}
void test_schedules(Suite& suite) {
  suite.group("schedules");
  const auto order = [&](uint32_t seed) {
    simt::settings().seed = seed;
    Buffer<uint32_t> counter(1, 0);
    auto out = test::poisoned<int32_t>(6 * 64);
    suite.launched("order", gpu::launch(order_kernel, 6, 64, 0, nullptr, counter.data(), out.data()));
    return out;
  };
  suite.expect(order(0) == order(0), "seed 0 is not repeatable");
  for (uint32_t seed = 1; seed < 6; ++seed) {
    const auto first = order(seed);
    suite.expect(first == order(seed), "seed %u is not repeatable", seed);
    suite.expect(first != order(seed - 1), "seeds %u and %u agree", seed - 1, seed);
  }
  simt::settings().seed = suite.seed;
}

FBC_KERNEL(64, 1) void sum_kernel(const int32_t* in, int32_t* out, int32_t bad_block) {
  auto* memory = reinterpret_cast<int32_t*>(gpu::shared());
  const int i = static_cast<int>(threadIdx.x);
  memory[i] = in[blockIdx.x * 64 + threadIdx.x];
  if (static_cast<int>(blockIdx.x) == bad_block && i == 5) {
    gpu::copy_async<16>(memory + 1, in, true);
  }
  gpu::sync();
  int32_t sum = 0;
  for (int k = 0; k < 64; ++k) sum += memory[k];
  out[blockIdx.x * 64 + threadIdx.x] = gpu::shuffle_xor(sum, 1);
}
bool sums_are_right(int blocks, uint64_t data_seed) {
  test::Random random(data_seed);
  const auto in = test::integers<int32_t>(blocks * 64, -99, 99, random);
  auto got = test::poisoned<int32_t>(blocks * 64);
  Buffer<int32_t> want(got.size(), 0);
  for (size_t i = 0; i < want.size(); ++i) {
    for (size_t k = 0; k < 64; ++k) want[i] += in[i / 64 * 64 + k];
  }
  const auto grid = static_cast<unsigned>(blocks);
  return gpu::launch(sum_kernel, grid, 64, 256, nullptr, in.data(), got.data(), -1) == 0 && got == want;
}
void test_threads(Suite& suite) {
  suite.group("launches at once");
  bool right[4] = {};
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&right, t] {
      bool all = true;
      for (uint64_t i = 0; i < 10; ++i) all = sums_are_right(1 + static_cast<int>(i), 100 * t + i) && all;
      right[t] = all;
    });
  }
  for (std::thread& t : threads) t.join();
  for (int t = 0; t < 4; ++t) suite.expect(right[t], "host thread %d", t);
  simt::settings().workers = 3;
  suite.expect(sums_are_right(20, 1), "a launch on three host threads");
  simt::settings().workers = 1;
}

void test_failures(Suite& suite) {
  suite.group("failures as a status");
  simt::settings().exit_on_failure = false;
  const auto in = test::integers<int32_t>(3 * 64, 0, 9, suite.random);
  auto out = test::poisoned<int32_t>(3 * 64);
  const auto sum = [&](dim3 grid, int threads, size_t shared, int bad) {
    return gpu::launch(sum_kernel, grid, threads, shared, nullptr, in.data(), out.data(), bad);
  };
  std::fprintf(stderr, "five reports are expected here:\n");
  suite.expect(sum(3, 64, 256, 1) == 719, "a misaligned copy");
  suite.expect(sum(3, 64, 256, -1) == 0, "the launch after it");
  suite.expect(sum(3, 1025, 256, -1) == 9, "too many threads");
  suite.expect(sum(dim3(1, 65536), 64, 256, -1) == 9, "too many blocks in y");
  suite.expect(sum(3, 64, (99 << 10) + 1, -1) == 1, "too much shared memory");
  suite.expect(gpu::launch_cooperative(sum_kernel, 1000, 64, 256, nullptr, in.data(), out.data(), -1) == 720,
               "more blocks than fit at once");
  simt::settings().exit_on_failure = true;
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  test_poison(suite);
  test_copies_are_late(suite);
  test_schedules(suite);
  test_threads(suite);
  test_failures(suite);
  return suite.finish();
}
