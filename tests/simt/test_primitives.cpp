// The primitives of csrc/cuda/gpu.cuh against their definitions: threads, copies, blocks.
#include <algorithm>
#include <string>

#include "check.h"

using namespace fbc;
using test::Buffer;
using test::Suite;

namespace {

constexpr int kThreads = 96;

// ---- threads and blocks -----------------------------------------------------------------------
FBC_KERNEL(kThreads, 1) void indices_kernel(int32_t* out, int32_t base) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x + threadIdx.x] = base + static_cast<int32_t>(threadIdx.x);
}
void test_indices(Suite& suite) {
  suite.group("indices and grids");
  for (const dim3 grid : {dim3(1), dim3(7), dim3(3, 2), dim3(2, 3, 4)}) {
    for (const int threads : {1, 31, 32, 96}) {
      const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
      Buffer<int32_t> got = test::poisoned<int32_t>(blocks * threads), want = got;
      for (int64_t i = 0; i < blocks * threads; ++i) {
        want[static_cast<size_t>(i)] = 5 + static_cast<int32_t>(i % threads);
      }
      suite.launched("indices", gpu::launch(indices_kernel, grid, threads, 0, nullptr, got.data(), 5));
      suite.exact("indices " + std::to_string(blocks) + " x " + std::to_string(threads), got, want);
    }
  }
  int32_t* none = nullptr;
  suite.expect(gpu::launch(indices_kernel, dim3(1, 0), 32, 0, nullptr, none, 0) == 9,
               "a grid without blocks is an invalid configuration");
}

// ---- shuffles, barriers -----------------------------------------------------------------------
template <typename T>
FBC_KERNEL(kThreads, 1)
void shuffle_kernel(const T* in, T* out) {
  const T mine = in[threadIdx.x];
  for (int mask = 0; mask < 32; ++mask) {
    out[mask * kThreads + static_cast<int>(threadIdx.x)] = gpu::shuffle_xor(mine, mask);
  }
}
template <typename T>
void test_shuffle(Suite& suite, const char* type) {
  const auto in = test::integers<T>(kThreads, 0, 1 << 20, suite.random);
  auto got = test::poisoned<T>(32 * kThreads);
  auto want = got;
  for (int mask = 0; mask < 32; ++mask) {
    for (int i = 0; i < kThreads; ++i) {
      want[static_cast<size_t>(mask * kThreads + i)] = in[static_cast<size_t>(i ^ mask)];
    }
  }
  suite.launched(type, gpu::launch(shuffle_kernel<T>, 1, kThreads, 0, nullptr, in.data(), got.data()));
  suite.exact(type, got, want);
}

// Sum of all threads' values by a tree in shared memory; the exchange within a warp needs
// sync_warp().
FBC_KERNEL(256, 1) void tree_kernel(const int32_t* in, int32_t* out) {
  auto* memory = reinterpret_cast<int32_t*>(gpu::shared());
  const int i = static_cast<int>(threadIdx.x);
  memory[i] = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int half = static_cast<int>(blockDim.x) / 2; half >= 32; half /= 2) {
    gpu::sync();
    if (i < half) memory[i] += memory[i + half];
  }
  if (i < 32) {
    for (int half = 16; half > 0; half /= 2) {
      gpu::sync_warp();
      const int32_t other = i < half ? memory[i + half] : 0;
      gpu::sync_warp();
      if (i < half) memory[i] += other;
    }
  }
  if (i == 0) out[blockIdx.x] = memory[0];
}
// Threads that return early no longer count at a barrier.
FBC_KERNEL(256, 1) void leave_kernel(int32_t* out) {
  auto* memory = reinterpret_cast<int32_t*>(gpu::shared());
  const int i = static_cast<int>(threadIdx.x);
  if (i >= 64) return;
  memory[i] = i;
  gpu::sync();
  out[i] = memory[63 - i];
}
void test_barriers(Suite& suite) {
  suite.group("barriers");
  constexpr int kBlocks = 9;
  const auto in = test::integers<int32_t>(kBlocks * 256, -1000, 1000, suite.random);
  auto got = test::poisoned<int32_t>(kBlocks);
  Buffer<int32_t> want(kBlocks, 0);
  for (size_t i = 0; i < in.size(); ++i) want[i / 256] += in[i];
  suite.launched("tree", gpu::launch(tree_kernel, kBlocks, 256, 1024, nullptr, in.data(), got.data()));
  suite.exact("tree", got, want);
  auto reversed = test::poisoned<int32_t>(64);
  Buffer<int32_t> expected(64);
  for (int i = 0; i < 64; ++i) expected[static_cast<size_t>(i)] = 63 - i;
  suite.launched("leave", gpu::launch(leave_kernel, 1, 256, 1024, nullptr, reversed.data()));
  suite.exact("leave", reversed, expected);
}

// ---- asynchronous copies ----------------------------------------------------------------------
// A ring of kStages:
// group s carries chunk s of each thread to the stage s % kStages; valid[] says which chunks are
// zeros. Reads its neighbour's chunk, so a barrier is needed after the wait.
constexpr int kStages = 3, kSteps = 8;
template <int kBytes>
FBC_KERNEL(kThreads, 1)
void copy_kernel(const unsigned char* in, const int32_t* valid, unsigned char* out) {
  const int i = static_cast<int>(threadIdx.x);
  unsigned char* memory = gpu::shared();
  const auto issue = [&](int step) {
    if (step < kSteps) {
      const int chunk = step * kThreads + i;
      gpu::copy_async<kBytes>(memory + (step % kStages * kThreads + i) * kBytes, in + chunk * kBytes,
                              valid[chunk] != 0);
    }
    gpu::copy_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) issue(step);
  for (int step = 0; step < kSteps; ++step) {
    gpu::copy_wait<kStages - 2>();
    gpu::sync();
    issue(step + kStages - 1);
    const int neighbour = (i + 1) % kThreads;
    for (int b = 0; b < kBytes; ++b) {
      out[(step * kThreads + i) * kBytes + b] = memory[(step % kStages * kThreads + neighbour) * kBytes + b];
    }
  }
  gpu::copy_wait<0>();
}
template <int kBytes>
void test_copy(Suite& suite) {
  const int64_t chunks = kSteps * kThreads;
  const auto valid = test::integers<int32_t>(chunks, 0, 1, suite.random);
  const auto in = test::integers<unsigned char>(chunks * kBytes, 1, 255, suite.random);
  auto got = test::poisoned<unsigned char>(chunks * kBytes);
  auto want = got;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t from = c / kThreads * kThreads + (c % kThreads + 1) % kThreads;
    for (int b = 0; b < kBytes; ++b) {
      want[static_cast<size_t>(c * kBytes + b)] =
          valid[static_cast<size_t>(from)] ? in[static_cast<size_t>(from * kBytes + b)] : 0;
    }
  }
  const std::string name = "copies of " + std::to_string(kBytes);
  suite.launched(name.c_str(), gpu::launch(copy_kernel<kBytes>, 1, kThreads, kStages * kThreads * kBytes, nullptr,
                                           in.data(), valid.data(), got.data()));
  suite.exact(name, got, want);
}

// Zeros are written where !valid, and the global address is not read: null is allowed.
FBC_KERNEL(32, 1) void zero_fill_kernel(int32_t* out) {
  auto* memory = reinterpret_cast<int32_t*>(gpu::shared());
  const void* nowhere = nullptr;
  gpu::copy_async<16>(memory + threadIdx.x * 4, nowhere, false);
  gpu::copy_commit();
  gpu::copy_wait<0>();
  for (unsigned i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = memory[threadIdx.x * 4 + i];
}
void test_copies(Suite& suite) {
  suite.group("asynchronous copies");
  for (int round = 0; round < (suite.quick ? 2 : 8); ++round) {
    test_copy<4>(suite);
    test_copy<8>(suite);
    test_copy<16>(suite);
  }
  auto got = test::poisoned<int32_t>(128);
  suite.launched("zero fill", gpu::launch(zero_fill_kernel, 1, 32, 512, nullptr, got.data()));
  suite.exact("zero fill", got, Buffer<int32_t>(128, 0));
}

// ---- between blocks ---------------------------------------------------------------------------
// The last
// block to take a ticket adds what all blocks have written.
FBC_KERNEL(64, 1)
void ticket_kernel(const int32_t* in, int32_t* partial, uint32_t* ticket, int32_t* out) {
  auto* last = reinterpret_cast<int32_t*>(gpu::shared());
  const unsigned i = threadIdx.x;
  partial[blockIdx.x * 64 + i] = in[blockIdx.x * 64 + i] * 3;
  gpu::sync();
  if (i == 0) *last = gpu::take_ticket(ticket) + 1 == gridDim.x;
  gpu::sync();
  if (*last) {
    int32_t sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b * 64 + i];
    out[i] = sum;
    if (i == 0) *ticket = 0;
  }
}
void test_tickets(Suite& suite) {
  suite.group("tickets");
  auto ticket = test::poisoned<uint32_t>(1);
  suite.expect(gpu::fill_zero(ticket.data(), 4, nullptr) == 0, "fill_zero");
  for (const int blocks : {1, 2, 7, 40}) {
    const auto in = test::integers<int32_t>(blocks * 64, -50, 50, suite.random);
    auto partial = test::poisoned<int32_t>(blocks * 64), got = test::poisoned<int32_t>(64);
    Buffer<int32_t> want(64, 0);
    for (size_t i = 0; i < in.size(); ++i) want[i % 64] += 3 * in[i];
    suite.launched("ticket", gpu::launch(ticket_kernel, static_cast<unsigned>(blocks), 64, 16, nullptr, in.data(),
                                         partial.data(), ticket.data(), got.data()));
    suite.exact("sum of " + std::to_string(blocks) + " blocks", got, want);
    suite.expect(ticket[0] == 0, "the ticket is %u after the launch", ticket[0]);
  }
}

// Block b produces item b, b + grid, ...; every block then needs all items.
FBC_KERNEL(64, 1)
void flags_kernel(const int32_t* in, int32_t* items, uint32_t* flag, int32_t* out, int32_t count) {
  const int i = static_cast<int>(threadIdx.x);
  for (int item = static_cast<int>(blockIdx.x); item < count; item += static_cast<int>(gridDim.x)) {
    items[item * 64 + i] = in[item * 64 + i] + 1;
    gpu::sync();
    if (i == 0) gpu::add_release(flag + item, 2);
  }
  int32_t sum = 0;
  for (int item = 0; item < count; ++item) {
    if (i == 0) gpu::wait_at_least(flag + item, 2);
    gpu::sync();
    sum += items[item * 64 + (i ^ 1)];
  }
  out[static_cast<int>(blockIdx.x) * 64 + i] = sum;
}
void test_flags(Suite& suite) {
  suite.group("flags and cooperative launches");
  int resident = 0;
  suite.expect(gpu::resident_blocks(flags_kernel, 64, 0, &resident) == 0 && resident > 0, "resident_blocks: %d",
               resident);
  resident = std::min(resident, 16);
  for (int blocks = 1; blocks <= resident; blocks += 2) {
    constexpr int kItems = 13;
    const auto in = test::integers<int32_t>(kItems * 64, -50, 50, suite.random);
    auto items = test::poisoned<int32_t>(kItems * 64), got = test::poisoned<int32_t>(blocks * 64);
    Buffer<uint32_t> flag(kItems, 0);
    Buffer<int32_t> want(static_cast<size_t>(blocks) * 64, 0);
    for (size_t j = 0; j < want.size(); ++j) {
      for (size_t item = 0; item < kItems; ++item) want[j] += in[item * 64 + (j % 64 ^ 1)] + 1;
    }
    suite.launched("flags", gpu::launch_cooperative(flags_kernel, static_cast<unsigned>(blocks), 64, 0, nullptr,
                                                    in.data(), items.data(), flag.data(), got.data(), kItems));
    suite.exact(std::to_string(blocks) + " blocks", got, want);
  }
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  test_indices(suite);
  suite.group("shuffles");
  test_shuffle<float>(suite, "float");
  test_shuffle<double>(suite, "double");
  test_shuffle<int32_t>(suite, "int32_t");
  test_shuffle<uint32_t>(suite, "uint32_t");
  test_barriers(suite);
  test_copies(suite);
  test_tickets(suite);
  test_flags(suite);
  return suite.finish();
}
