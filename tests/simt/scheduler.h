// A GPU's thread blocks on a CPU: one fiber per thread, switched by hand.
//
// A fiber runs until it waits (barrier, warp-wide operation, flag); the last one to arrive carries the
// operation out for all. Asynchronous copies happen as late as they are allowed to: at the wait. Shared
// memory starts as NaN. Reports of deadlock, divergence, bad addresses and early exits name block,
// thread and primitive, and end the process with status 66.
//
// settings().seed != 0 schedules adversarially: random order of fibers, random pre-emption before
// signals, one starved block. A kernel has to give the same result under every seed.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace fbc::simt {

struct Settings {
  uint32_t seed = 0;
  int resident_blocks = 6;  // what resident_blocks() answers
  int workers = 0;          // host threads of a launch; 0: as many as the machine has
};
inline Settings& settings() {
  static Settings s;
  return s;
}

// ---- context switch: saves the callee-saved registers on the old stack, loads them from the new ----
extern "C" void fbc_simt_switch(void** save, void* load);
#if defined(__x86_64__)
asm(".text\n.weak fbc_simt_switch\n.type fbc_simt_switch,@function\nfbc_simt_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
#else
#error "the interpreter has a context switch for x86-64 only"
#endif

constexpr size_t kStackBytes = 64 << 10;

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};
enum class State : uint8_t { kRunnable, kInWarp, kAtBarrier, kDone };

struct Warp {
  int arrived = 0, live = 0, first = 0;
  const char* operation = nullptr;
  void* slot[32];
};
struct Thread {
  dim3 index;
  int lane;
  State state;
  Warp* warp;
  void* stack;
  const char* waits_at;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};
struct Block {
  dim3 index, threads_extent, grid_extent;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> queue;
  size_t head = 0;
  int live = 0, at_barrier = 0;
  std::vector<unsigned char> shared_memory, stacks;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::function<void()> body;
  void* scheduler_stack = nullptr;
  Thread* current = nullptr;
  std::mt19937 random{1};
};
inline thread_local Block* block = nullptr;

[[noreturn]] inline void fail(const char* what, const char* a = "", const char* b = "") {
  const Thread* t = block->current;
  std::fprintf(stderr, "simt: %s %s %s, block (%u,%u,%u) thread %u\n", what, a, b, block->index.x,
               block->index.y, block->index.z, t != nullptr ? t->index.x : 0);
  std::_Exit(66);
}

#if defined(__SANITIZE_ADDRESS__)
inline thread_local const void* scheduler_bottom;
inline thread_local size_t scheduler_size;
inline void switch_to(void** save, void* load, const void* bottom, size_t size) {
  void* fake;
  __sanitizer_start_switch_fiber(&fake, bottom, size);
  fbc_simt_switch(save, load);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
inline void yield() {
  switch_to(&block->current->stack, block->scheduler_stack, scheduler_bottom, scheduler_size);
}
#else
inline void switch_to(void** save, void* load, const void*, size_t) { fbc_simt_switch(save, load); }
inline void yield() { fbc_simt_switch(&block->current->stack, block->scheduler_stack); }
#endif

inline void wake(Thread& t) {
  t.state = State::kRunnable;
  block->queue.push_back(static_cast<int>(&t - block->threads.data()));
}
inline void let_others_run() {
  wake(*block->current);
  yield();
}
inline void maybe_preempt(unsigned one_in) {
  if (settings().seed != 0 && block->random() % one_in == 0) let_others_run();
}
inline void release_barrier() {
  block->at_barrier = 0;
  for (Thread& t : block->threads)
    if (t.state == State::kAtBarrier) wake(t);
}

inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  block->body();
  Thread* t = block->current;
  t->state = State::kDone;
  t->warp->live--;
  if (!t->open.empty() || !t->groups.empty()) fail("thread exits with asynchronous copies in flight");
  if (t->warp->arrived) fail("lane exits while its warp waits in", t->warp->operation);
  if (--block->live && block->at_barrier == block->live) release_barrier();
  yield();
  std::abort();
}

// All 32 lanes must arrive at the same operation; the last one executes it for everybody.
template <typename F>
inline void collective(const char* operation, void* argument, F execute) {
  Thread* t = block->current;
  Warp* w = t->warp;
  if (!w->arrived) {
    w->operation = operation;
  } else if (w->operation != operation) {
    fail("divergent warp operations:", w->operation, operation);
  }
  w->slot[t->lane] = argument;
  if (++w->arrived == w->live) {
    if (w->live != 32) fail("warp operation with exited lanes:", operation);
    execute(w->slot);
    w->arrived = 0;
    for (int i = 0; i < 32; ++i) {
      Thread& other = block->threads[static_cast<size_t>(w->first + i)];
      if (&other != t) wake(other);
    }
  } else {
    t->state = State::kInWarp;
    t->waits_at = operation;
    yield();
  }
}

inline void barrier() {
  Thread* t = block->current;
  if (++block->at_barrier == block->live) {
    release_barrier();
  } else {
    t->state = State::kAtBarrier;
    t->waits_at = "sync";
    yield();
  }
}

inline void start_block(Block& b, unsigned number) {
  const int count = static_cast<int>(b.threads_extent.x);
  block = &b;
  b.threads.resize(static_cast<size_t>(count));
  b.warps.assign(static_cast<size_t>((count + 31) / 32), Warp{});
  b.queue.clear();
  b.head = 0;
  b.live = count;
  b.at_barrier = 0;
  b.stacks.resize(static_cast<size_t>(count) * kStackBytes + 64);
  std::memset(b.shared_memory.data(), 0xff, b.shared_memory.size());
  for (int i = 0; i < count; ++i) {
    Thread& t = b.threads[static_cast<size_t>(i)];
    t.index = dim3(static_cast<unsigned>(i));
    t.lane = i & 31;
    t.warp = &b.warps[static_cast<size_t>(i >> 5)];
    t.waits_at = "start";
    t.warp->live++;
    t.warp->first = i & ~31;
    t.open.clear();
    t.groups.clear();
    const auto top = reinterpret_cast<uintptr_t>(b.stacks.data() + (i + 1) * kStackBytes) & ~uintptr_t{15};
    void** stack = reinterpret_cast<void**>(top);
    *--stack = nullptr;
    *--stack = reinterpret_cast<void*>(&fiber_entry);
    for (int k = 0; k < 6; ++k) *--stack = nullptr;
    t.stack = stack;
    wake(t);
  }
  b.random.seed(settings().seed + number);
}

// Runs one fiber of the block up to its next wait.
inline void step(Block& b) {
  block = &b;
  if (b.head == b.queue.size()) {
    for (Thread& t : b.threads) {
      b.current = &t;
      if (t.state != State::kDone) fail("deadlock, waiting at", t.waits_at);
    }
  }
  if (settings().seed != 0) {
    std::swap(b.queue[b.head], b.queue[b.head + b.random() % (b.queue.size() - b.head)]);
  }
  const int i = b.queue[b.head++];
  b.current = &b.threads[static_cast<size_t>(i)];
  switch_to(&b.scheduler_stack, b.current->stack, b.stacks.data() + i * kStackBytes, kStackBytes);
  if (b.head > 4096) {
    b.queue.erase(b.queue.begin(), b.queue.begin() + static_cast<std::ptrdiff_t>(b.head));
    b.head = 0;
  }
}

inline void prepare_block(Block& b, dim3 grid, int threads, size_t shared_bytes,
                          const std::function<void()>& body) {
  b.threads_extent = dim3(static_cast<unsigned>(threads));
  b.grid_extent = grid;
  b.shared_memory.resize(shared_bytes + 1024);
  b.shared = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(b.shared_memory.data()) + 1023) & ~uintptr_t{1023});
  b.shared_bytes = shared_bytes;
  b.body = body;
}
inline dim3 block_index(dim3 grid, unsigned i) {
  return dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
}

// Blocks one after another, on several host threads.
inline void run_grid(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  const unsigned blocks = grid.x * grid.y * grid.z;
  std::atomic<unsigned> next{0};
  const auto work = [&] {
    Block b;
    prepare_block(b, grid, threads, shared_bytes, body);
    for (unsigned i; (i = next++) < blocks;) {
      b.index = block_index(grid, i);
      start_block(b, i);
      while (b.live) step(b);
    }
  };
  const int wanted = settings().workers > 0 ? settings().workers
                                            : static_cast<int>(std::thread::hardware_concurrency());
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < std::min<unsigned>(blocks, static_cast<unsigned>(std::max(1, wanted))); ++i)
    helpers.emplace_back(work);
  work();
  for (std::thread& t : helpers) t.join();
}

// All blocks resident and interleaved on one host thread.
inline void run_cooperative(dim3 grid, int threads, size_t shared_bytes,
                            const std::function<void()>& body) {
  const unsigned blocks = grid.x * grid.y * grid.z;
  const uint32_t seed = settings().seed;
  std::vector<Block> all(blocks);
  std::mt19937 random(seed + 12345);
  for (unsigned i = 0; i < blocks; ++i) {
    prepare_block(all[i], grid, threads, shared_bytes, body);
    all[i].index = block_index(grid, i);
    start_block(all[i], i);
  }
  unsigned live = blocks;
  for (unsigned long round = 0; live > 0; ++round) {
    for (unsigned j = 0; j < blocks; ++j) {
      const unsigned i = seed ? random() % blocks : j;
      if (seed && i == seed % blocks && round % 5000) continue;  // one starved block
      for (int n = 0; n < 64 && all[i].live; ++n) {
        step(all[i]);
        if (!all[i].live) live--;
      }
    }
  }
}

}  // namespace fbc::simt
