// A kernel like those of csrc/cuda in small, with bugs to choose from: what the interpreter must
// catch inside a block. program [seed [bug]]; without a bug it has to pass, "list" prints the
// names.
//
//   c[m][n] = sum over k a[m][k] * b[n][k]       bfloat16, small integers: every sum is exact
//   total[tile] = sum of the tile's elements
//
// A block of four warps owns a 32 x 32 tile, a warp 16 x 16 of it; three stages of 32 in k arrive
// by asynchronous copies into swizzled rows of 64 bytes. The tile leaves through shared memory,
// rows of float4. K % 8 == 0, N % 4 == 0.
#include "../check.h"
#include "cuda/mma.cuh"

using namespace fbc;
using test::Buffer;
using test::Suite;

namespace {

enum Bug {
  kNone,
  kMissingBarrier,        // between a copy's arrival and its use by others
  kMissingWait,           // for the copies
  kStageReusedEarly,      // the next copies overwrite the stage that is being read
  kNoBarrierAtEnd,        // shared memory is used again while slow warps still read
  kDivergentBarrier,      // the threads meet in two different places
  kSkippedBarrier,        // one warp leaves out a barrier
  kDivergentCollective,   // half a warp does not take part
  kDifferentCollectives,  // the two halves of a warp do different things
  kMissingSyncWarp,       // before a row is read that other lanes have written
  kWrongSwizzle,          // rows are written as if they were not swizzled
  kReadPastEnd,           // a copy reads the row after the last
  kSharedPastEnd,         // an ordinary store after the end of shared memory
  kCopyPastShared,        // a copy to there
  kMisalignedCopy,
  kCopiesInFlight,  // the kernel ends without a wait
  kLanesLeave,      // threads outside the matrix return before a shuffle
  kUnwritten,       // the last column of a tile is left out
  kBugs
};
const char* const kNames[kBugs] = {"none",
                                   "missing_barrier",
                                   "missing_wait",
                                   "stage_reused_early",
                                   "no_barrier_at_end",
                                   "divergent_barrier",
                                   "skipped_barrier",
                                   "divergent_collective",
                                   "different_collectives",
                                   "missing_sync_warp",
                                   "wrong_swizzle",
                                   "read_past_end",
                                   "shared_past_end",
                                   "copy_past_shared",
                                   "misaligned_copy",
                                   "copies_in_flight",
                                   "lanes_leave",
                                   "unwritten"};

constexpr int kThreads = 128, kTile = 32, kDepth = 32, kChunks = 4, kStages = 3;
constexpr int kOperandBytes = kTile * kDepth * 2, kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes;

struct Product {
  const BFloat16 *a, *b;
  float *c, *total;
  int32_t M, N, K;
};

template <Bug kBug>
FBC_DEVICE void load_operand(const BFloat16* from, int rows, int first, int k, int K, unsigned char* tile) {
  const int row = static_cast<int>(threadIdx.x) / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int column = k + chunk * 8;
  const bool valid = (first + row < rows || (kBug == kReadPastEnd && first + row == rows)) && column < K;
  const int offset = kBug == kWrongSwizzle ? (row * kChunks + chunk) * 16 : chunk_offset<kChunks>(row, chunk);
  const BFloat16* source = from + (first + row) * int64_t{K} + column + (kBug == kMisalignedCopy);
  gpu::copy_async<16>(tile + offset + (kBug == kCopyPastShared ? kSharedBytes : 0), source, valid);
}

template <Bug kBug>
FBC_DEVICE void barrier_of_step(int step, int warp) {
  if (kBug == kMissingBarrier) return;
  if (kBug == kSkippedBarrier && step == 1 && warp == 2) return;
  if (kBug == kDivergentBarrier && warp == 1) {
    gpu::sync();
  } else {
    gpu::sync();
  }
}

// Sum over the warp, by exchanges of all lanes.
template <Bug kBug>
FBC_DEVICE float warp_sum(float value, int lane) {
  for (int mask = 16; mask > 0; mask /= 2) {
    if (kBug == kDivergentCollective && lane >= 16) continue;
    if (kBug == kDifferentCollectives && lane >= 16) {
      gpu::sync_warp();
    } else {
      value += gpu::shuffle_xor(value, mask);
    }
  }
  return value;
}

// acc -> the warp's 16 x 16 patch of shared memory -> c, a lane per half row.
template <Bug kBug>
FBC_DEVICE void store_tile(const Product& p, const float (&acc)[1][2][4], int m, int n, int warp, int lane) {
  auto* patch = reinterpret_cast<float*>(gpu::shared()) + warp * 256;
  for (int j = 0; j < 2; ++j) {
    for (int e = 0; e < 4; ++e) {
      patch[(lane / 4 + e / 2 * 8) * 16 + j * 8 + lane % 4 * 2 + e % 2] = acc[0][j][e];
    }
  }
  if (kBug != kMissingSyncWarp) gpu::sync_warp();
  const int row = lane / 2;
  for (int i = lane % 2 * 8; i < lane % 2 * 8 + 8; i += 4) {
    if (kBug == kUnwritten && n + i + 4 == p.N) continue;
    if (m + row >= p.M || n + i >= p.N) continue;
    *reinterpret_cast<float4*>(p.c + (m + row) * int64_t{p.N} + n + i) =
        *reinterpret_cast<const float4*>(patch + row * 16 + i);
  }
}

template <Bug kBug>
FBC_KERNEL(kThreads, 2)
void product_kernel(FBC_PARAM Product p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int m = static_cast<int>(blockIdx.y) * kTile, n = static_cast<int>(blockIdx.x) * kTile;
  const int steps = (p.K + kDepth - 1) / kDepth;
  const auto load = [&](int step) {
    unsigned char* stage = gpu::shared() + step % kStages * kStageBytes;
    if (step < steps) {
      load_operand<kBug>(p.a, p.M, m, step * kDepth, p.K, stage);
      load_operand<kBug>(p.b, p.N, n, step * kDepth, p.K, stage + kOperandBytes);
    }
    gpu::copy_commit();
  };
  constexpr int kAhead = kBug == kStageReusedEarly ? kStages : kStages - 1;
  float acc[1][2][4] = {};
  for (int step = 0; step < kAhead; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    if (kBug != kMissingWait) gpu::copy_wait<kAhead - 1>();
    barrier_of_step<kBug>(step, warp);
    load(step + kAhead);
    const unsigned char* stage = gpu::shared() + step % kStages * kStageBytes;
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t a[1][4], b[1][4];
      load_a<BFloat16, kChunks>(a[0], stage, warp / 2 * 16, chunk, lane);
      load_b<BFloat16, kChunks>(b[0], stage + kOperandBytes, warp % 2 * 16, chunk, lane);
      multiply<BFloat16>(acc, a, b);
    }
  }
  if (kBug == kCopiesInFlight) {
    gpu::copy_async<16>(gpu::shared() + threadIdx.x * 16, p.a, true);
  } else {
    gpu::copy_wait<0>();
  }
  if (kBug != kNoBarrierAtEnd) gpu::sync();
  store_tile<kBug>(p, acc, m + warp / 2 * 16, n + warp % 2 * 16, warp, lane);
  if (kBug == kLanesLeave && m + warp / 2 * 16 + lane / 4 >= p.M) return;

  float sum = 0.0f;
  for (int j = 0; j < 2; ++j) {
    for (int e = 0; e < 4; ++e) sum += acc[0][j][e];
  }
  sum = warp_sum<kBug>(sum, lane);
  gpu::sync();
  auto* sums = reinterpret_cast<float*>(gpu::shared());
  if (lane == 0) sums[warp] = sum;
  if (kBug == kSharedPastEnd && warp == 3) sums[kSharedBytes / 4 + lane] = sum;
  gpu::sync();
  if (threadIdx.x == 0) {
    p.total[blockIdx.y * gridDim.x + blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
  }
}

template <Bug kBug>
int launch_product(const Product& p) {
  const dim3 grid((p.N + kTile - 1) / kTile, (p.M + kTile - 1) / kTile);
  return gpu::launch(product_kernel<kBug>, grid, kThreads, kSharedBytes, nullptr, p);
}
template <int... kIndex>
int launch_any(int bug, const Product& p, std::integer_sequence<int, kIndex...>) {
  using Launcher = int (*)(const Product&);
  constexpr Launcher kLaunchers[] = {launch_product<static_cast<Bug>(kIndex)>...};
  return kLaunchers[bug](p);
}

void check(Suite& suite, int bug, int M, int N, int K) {
  const auto a = test::integers<BFloat16>(M * K, -4, 4, suite.random);
  const auto b = test::integers<BFloat16>(N * K, -4, 4, suite.random);
  const int tiles_n = (N + kTile - 1) / kTile, tiles_m = (M + kTile - 1) / kTile;
  auto c = test::poisoned<float>(M * N);
  auto total = test::poisoned<float>(tiles_m * tiles_n);
  Buffer<double> want(c.size(), 0.0), want_total(total.size(), 0.0);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      double& sum = want[static_cast<size_t>(m * N + n)];
      for (int k = 0; k < K; ++k) {
        sum += test::as_double(a[static_cast<size_t>(m * K + k)]) * test::as_double(b[static_cast<size_t>(n * K + k)]);
      }
      want_total[static_cast<size_t>(m / kTile * tiles_n + n / kTile)] += sum;
    }
  }
  const Product p = {a.data(), b.data(), c.data(), total.data(), M, N, K};
  suite.launched("product", launch_any(bug, p, std::make_integer_sequence<int, kBugs>()));
  suite.exact("c", c, want);
  suite.exact("total", total, want_total);
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
  check(suite, bug, 50, 40, 104);
  check(suite, bug, 70, 96, 232);
  return suite.finish();
}
