// A GPU's thread blocks on a CPU: one fiber per thread, many blocks in turn.
//
// A thread runs until it waits (barrier, warp-wide operation, flag); the last one to arrive carries
// the operation out for all. Shared memory is NaN when a block starts, and so is the destination of
// an asynchronous copy from its issue to its completion. A broken rule ends the process with status
// 66 and a report: deadlock, divergence, bad addresses, lanes that leave early.
//
// settings().seed != 0 schedules adversarially: blocks start in another order and interleave, one
// of them starves; threads run in random order, depth first, or with one warp starved; any
// primitive may be pre-empted; asynchronous copies happen at once or as late as allowed; another
// number of blocks fits the device. A kernel gives the same result under every seed. A launch with
// a seed runs on one host thread and is repeatable.
//
// Under ThreadSanitizer every thread is a thread, and only sync(), sync_warp() and the operations
// "between blocks" order them: conflicting accesses are reported whatever the schedule was, in
// shared and in global memory.
//
// What cannot be seen here: the order of plain accesses that hardware may choose beyond such races
// (stores become visible at once), the generic and asynchronous proxies' fences, host code that
// does not wait for its stream, bank conflicts, uncoalesced access, registers, occupancy, speed.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <thread>

#include "wait.h"

namespace fbc::simt {

// ---- the life of a block ----------------------------------------------------------------------
inline void thread_exits(Thread& t) {
  Block& b = *block;
  t.at = {"end of the kernel", t.at.file, t.at.line};
  if (!t.copies.empty()) {
    fail("%zu asynchronous copies are in flight: copy_wait<0>() first", t.copies.size());
  }
  if (t.warp->arrived > 0) {
    fail("lanes of this warp wait in %s, %s:%d", t.warp->at.operation, t.warp->at.file, t.warp->at.line);
  }
  t.state = State::kDone;
  --t.warp->live;
  if (--b.live > 0 && b.at_barrier == b.live) release_barrier();
}

inline void fiber_entry() {
  begin_fiber(block->host);
  after_there(&block->launch->begin);
  block->launch->body(block->launch->argument);
  {
    const Quiet quiet;
    thread_exits(*block->current);
  }
  before_here(&block->launch->end);
  end_fiber(block->current->fiber, block->host);
}

inline dim3 block_index(dim3 grid, unsigned i) { return {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}; }

inline void prepare_shared(Block& b) {
  const size_t bytes = b.launch->shared_bytes;
  b.shared_pages.renew((bytes + kGuardBytes + 4095) & ~size_t{4095});
  b.shared = b.shared_pages.data();
  std::memset(b.shared, 0xff, bytes);  // NaN, in every type
  std::memset(b.shared + bytes, kGuard, kGuardBytes);
#if defined(FBC_SIMT_ASAN)
  __asan_poison_memory_region(b.shared + bytes, kGuardBytes);
#endif
}

inline void start_block(Block& b, Launch& launch, unsigned number) {
  const int count = launch.threads;
  b.launch = &launch;
  b.index = block_index(launch.grid, number);
  b.extent = dim3(static_cast<unsigned>(count));
  b.random = Random((uint64_t{launch.seed} << 32) + number);
  b.mood = launch.seed == 0 ? 0 : b.random();
  b.queue.clear();
  b.at_flag.clear();
  b.head = 0;
  b.live = count;
  b.at_barrier = 0;
  // New memory: the race detector must not take these tokens for those of the block before.
  b.warps = std::vector<Warp>(static_cast<size_t>((count + 31) / 32));
  b.token = std::vector<char>(2);
  b.threads.resize(static_cast<size_t>(count));
  b.stacks.renew(static_cast<size_t>(count) * kStackBytes);
  prepare_shared(b);
  host_fiber(b.host);
  block = &b;
  for (int i = 0; i < count; ++i) {
    Thread& t = b.threads[static_cast<size_t>(i)];
    t.index = dim3(static_cast<unsigned>(i));
    t.lane = i % 32;
    t.warp = &b.warps[static_cast<size_t>(i / 32)];
    t.warp->first = i - i % 32;
    ++t.warp->live;
    t.at = {"start of the kernel", "", 0};
    t.copies.clear();
    t.open_group = 0;
    reset_fiber(t.fiber, b.stacks.data() + static_cast<size_t>(i) * kStackBytes, kStackBytes, fiber_entry);
    name_fiber(t.fiber, number, i);
    wake(t);
  }
}

inline void finish_block(Block& b) {
#if defined(FBC_SIMT_ASAN)
  __asan_unpoison_memory_region(b.shared + b.launch->shared_bytes, kGuardBytes);
#endif
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (b.shared[b.launch->shared_bytes + i] == kGuard) continue;
    char text[256];
    std::snprintf(text, sizeof text, "simt: block (%u,%u,%u) wrote %zu bytes past its %zu bytes of shared memory\n",
                  b.index.x, b.index.y, b.index.z, i, b.launch->shared_bytes);
    finish_report(text);
    b.launch->failed = true;
    break;
  }
  for (Thread& t : b.threads) discard_fiber(t.fiber);
}

// ---- the life of a launch ---------------------------------------------------------------------
// A host thread's share
// of a launch: it holds some blocks at once.
class Residents {
 public:
  Residents(Launch& launch, unsigned slots) : launch_(launch), random_(launch.seed) {
    if (launch.seed != 0) {
      stride_ = 1 + random_.below(launch.blocks);
      while (std::gcd(stride_, launch.blocks) != 1) ++stride_;
      starved_ = random_.below(slots);
    }
    for (unsigned i = 0; i < slots; ++i) {
      blocks_.push_back(std::make_unique<Block>());
      refill(i);
    }
  }

  void run() {
    while (live_ > 0 && !launch_.failed) {
      if (!choose()) {
        if (settings().workers > 1 && ++patience_ < 20000000) {
          std::this_thread::yield();  // a block of another host thread may set the flag
          continue;
        }
        report_deadlock();
        break;
      }
      patience_ = 0;
      Block& b = *blocks_[at_];
      block = &b;
      const uint32_t turns = launch_.seed == 0 ? 64 : 1 + random_.below(64);
      for (uint32_t i = 0; i < turns && b.live > 0 && !launch_.failed && b.head < b.queue.size(); ++i) {
        step(b);
      }
      if (b.live == 0) {
        finish_block(b);
        --live_;
        refill(at_);
      }
    }
    for (const auto& b : blocks_) {
      if (b->live == 0) continue;  // the others of a launch that failed
      for (Thread& t : b->threads) {
        if (t.state != State::kDone) abandon_fiber(t.fiber, b->host, &launch_.end);
      }
    }
    block = nullptr;
  }

 private:
  void refill(unsigned slot) {
    const unsigned i = launch_.next++;
    if (i >= launch_.blocks) return;
    const auto number = static_cast<unsigned>(uint64_t{i} * stride_ % launch_.blocks);
    start_block(*blocks_[slot], launch_, number);
    ++live_;
  }
  // The next block that can go on; the starved one seldom, unless it is the only one.
  bool choose() {
    const auto count = static_cast<unsigned>(blocks_.size());
    const bool adversarial = launch_.seed != 0 && count > 1;
    const unsigned first = adversarial ? random_.below(count) : at_ + 1;
    const bool spare = adversarial && random_.below(4096) != 0;
    for (unsigned i = 0; i < count; ++i) {
      at_ = (first + i) % count;
      if (spare && at_ == starved_) continue;
      if (blocks_[at_]->live > 0 && ready(*blocks_[at_])) return true;
    }
    at_ = starved_;
    return spare && blocks_[at_]->live > 0 && ready(*blocks_[at_]);
  }
  void report_deadlock() {
    std::string text = "simt: deadlock: no thread can go on, schedule ";
    text += std::to_string(launch_.seed) + "\n";
    if (!launch_.cooperative) text += "  blocks of a plain launch need not run at the same time\n";
    int shown = 0;
    for (const auto& b : blocks_) {
      if (b->live == 0 || shown++ == 4) continue;
      char waits[2048];
      describe_waits(*b, waits, sizeof waits);
      text += waits;
    }
    finish_report(text.c_str());
    launch_.failed = true;
  }

  Launch& launch_;
  Random random_;
  std::vector<std::unique_ptr<Block>> blocks_;
  unsigned live_ = 0, at_ = 0, stride_ = 1, starved_ = 0;
  long patience_ = 0;
};

inline int resident_blocks(uint32_t seed) {
#if defined(FBC_SIMT_TSAN)
  constexpr int kBySeed[] = {3, 2, 4, 1};  // its threads take much memory
#else
  constexpr int kBySeed[] = {6, 4, 11, 1, 2, 8, 5, 16};
#endif
  constexpr auto kCount = static_cast<uint32_t>(sizeof kBySeed / sizeof kBySeed[0]);
  return settings().resident_blocks > 0 ? settings().resident_blocks : kBySeed[seed % kCount];
}

inline int refuse(int status, const char* why) {
  std::fprintf(stderr, "simt: launch refused, status %d: %s\n", status, why);
  return status;
}

// 0, or what the CUDA runtime would return.
inline int run(Launch& launch) {
  const Quiet quiet;
  const Settings& s = settings();
  const dim3 g = launch.grid;
  launch.seed = s.seed;
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    return refuse(kErrorInvalidConfiguration, "grid extents of 1 to 2^31 - 1, 65535, 65535");
  }
  if (launch.threads < 1 || launch.threads > 1024) {
    return refuse(kErrorInvalidConfiguration, "1 to 1024 threads per block");
  }
  if (launch.shared_bytes > s.shared_limit) {
    return refuse(kErrorInvalidValue, "more shared memory than settings().shared_limit");
  }
  launch.blocks = g.x * g.y * g.z;
  const auto resident = static_cast<unsigned>(resident_blocks(s.seed));
  if (launch.cooperative && launch.blocks > resident) {
    return refuse(kErrorCooperativeTooLarge, "more blocks than resident_blocks() of a cooperative launch");
  }
  before_here(&launch.begin);
  const bool together = launch.cooperative || s.seed != 0;
  const auto work = [&launch](unsigned slots) {
    const Quiet quiet_too;
    Residents(launch, slots).run();
  };
  std::vector<std::thread> helpers;
  if (!together) {
    for (unsigned i = 1; i < std::min(launch.blocks, static_cast<unsigned>(s.workers)); ++i) {
      helpers.emplace_back(work, 1u);
    }
  }
  work(together ? std::min(launch.blocks, resident) : 1u);
  for (std::thread& t : helpers) t.join();
  after_there(&launch.end);
  return launch.failed ? kErrorLaunchFailure : 0;
}

}  // namespace fbc::simt
