// How the threads of a block wait, and which of them goes on.
#pragma once

#include "report.h"

namespace fbc::simt {

inline void wake(Thread& t) {
  t.state = State::kRunnable;
  block->queue.push_back(static_cast<int>(&t - block->threads.data()));
}

// Every primitive begins here. An adversarial schedule may run other threads first.
inline Thread& enter(Site at, uint32_t preempt_one_in = 16) {
  Thread& t = *block->current;
  t.at = at;
  if (block->launch->seed != 0 && block->random.below(preempt_one_in) == 0) {
    wake(t);
    yield();
  }
  return t;
}

inline void release_barrier() {
  block->at_barrier = 0;
  for (Warp& w : block->warps) w.at_barrier = 0;
  for (Thread& t : block->threads) {
    if (t.state == State::kAtBarrier) wake(t);
  }
  ++block->phase;
}

inline void barrier(Site at) {
  char* token;
  {
    const Quiet quiet;
    Thread& t = enter(at);
    Block& b = *block;
    if (t.warp->arrived > 0) {
      fail("lanes of this warp wait in %s, %s:%d", t.warp->at.operation, t.warp->at.file, t.warp->at.line);
    }
    if (b.at_barrier == 0) {
      b.barrier = at;
    } else if (!(b.barrier == at)) {
      fail("divergent: other threads wait in %s, %s:%d", b.barrier.operation, b.barrier.file, b.barrier.line);
    }
    token = &b.token[b.phase & 1];
    before_here(token);
    ++t.warp->at_barrier;
    if (++b.at_barrier == b.live) {
      release_barrier();
    } else {
      t.state = State::kAtBarrier;
      yield();
    }
  }
  after_there(token);
}

// All 32 lanes have to arrive at the same operation; the last one executes it for everybody.
template <typename Execute>
inline void collective(Site at, void* argument, Execute execute) {
  const Quiet quiet;
  Thread& t = enter(at);
  Warp& w = *t.warp;
  if (w.live != 32) fail("%d lanes of the warp have returned or do not exist", 32 - w.live);
  if (w.at_barrier > 0)
    fail("%d lanes of this warp wait in %s, %s:%d", w.at_barrier, block->barrier.operation, block->barrier.file,
         block->barrier.line);
  if (w.arrived == 0) {
    w.at = at;
  } else if (!(w.at == at)) {
    fail("divergent: lanes of this warp wait in %s, %s:%d", w.at.operation, w.at.file, w.at.line);
  }
  w.argument[t.lane] = argument;
  if (++w.arrived < 32) {
    t.state = State::kInWarp;
    yield();
    return;
  }
  execute(w.argument);
  w.arrived = 0;
  ++w.phase;
  for (int i = 0; i < 32; ++i) {
    Thread& other = block->threads[static_cast<size_t>(w.first + i)];
    if (&other != &t) wake(other);
  }
}

inline void wait_for_flag(const uint32_t* flag, uint32_t value) {
  Thread& t = *block->current;
  t.state = State::kAtFlag;
  t.flag = flag;
  t.flag_value = value;
  block->at_flag.push_back(static_cast<int>(&t - block->threads.data()));
  yield();
}

// ---- going on -----------------------------------------------------------------------------------
// Moves the thread to run next to the head of the queue.
inline void choose_thread(Block& b) {
  const auto count = static_cast<uint32_t>(b.queue.size() - b.head);
  uint32_t chosen = b.random.below(count);
  switch (b.mood % 3) {
    case 0: break;  // any
    case 1:         // the last one woken: some warps run far ahead
      if (b.random.below(8) != 0) chosen = count - 1;
      break;
    default:  // one warp falls behind
      const uint32_t starved = (b.mood >> 8) % static_cast<uint32_t>(b.warps.size());
      for (int tries = 0; tries < 6; ++tries) {
        if (static_cast<uint32_t>(b.queue[b.head + chosen]) / 32 != starved) break;
        chosen = b.random.below(count);
      }
  }
  std::swap(b.queue[b.head], b.queue[b.head + chosen]);
}

// Runs one thread of the block up to its next wait.
inline void step(Block& b) {
  if (b.launch->seed != 0) choose_thread(b);
  b.current = &b.threads[static_cast<size_t>(b.queue[b.head++])];
  if (b.head == b.queue.size() || b.head > 8192) {
    b.queue.erase(b.queue.begin(), b.queue.begin() + static_cast<std::ptrdiff_t>(b.head));
    b.head = 0;
  }
  switch_fiber(b.host, b.current->fiber);
}

// Whether some thread can go on; flags are looked at when nothing else can.
inline bool ready(Block& b) {
  if (b.head < b.queue.size()) return true;
  block = &b;
  for (size_t i = b.at_flag.size(); i-- > 0;) {
    Thread& t = b.threads[static_cast<size_t>(b.at_flag[i])];
    if (__atomic_load_n(t.flag, __ATOMIC_RELAXED) < t.flag_value) continue;
    b.at_flag.erase(b.at_flag.begin() + static_cast<std::ptrdiff_t>(i));
    wake(t);
  }
  return b.head < b.queue.size();
}

}  // namespace fbc::simt
