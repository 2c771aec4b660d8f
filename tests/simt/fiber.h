// Call stacks that take turns on one host thread, known to AddressSanitizer and ThreadSanitizer.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__has_feature)
#define FBC_SIMT_FEATURE(name) __has_feature(name)
#else
#define FBC_SIMT_FEATURE(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || FBC_SIMT_FEATURE(address_sanitizer)
#define FBC_SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__) || FBC_SIMT_FEATURE(thread_sanitizer)
#define FBC_SIMT_TSAN 1
#include <sanitizer/tsan_interface.h>

#include <deque>
extern "C" void __tsan_func_exit();
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif
#if !defined(__x86_64__) || defined(FBC_SIMT_UCONTEXT)
#define FBC_SIMT_PORTABLE 1
#include <ucontext.h>
#endif

namespace fbc::simt {

// ---- memory of the interpreter: pages that cost nothing before they are touched ---------------
class Pages {
 public:
  Pages() = default;
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { release(); }
  // Memory that a sanitizer has not seen before; its content is whatever it was, or zero.
  void renew(size_t bytes) {
#if !defined(FBC_SIMT_TSAN)  // to the race detector, old accesses belong to unordered threads
    if (bytes == bytes_ && data_ != nullptr) {
      unpoison();
      return;
    }
#endif
    release();
    void* fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) {
      std::perror("simt: memory for stacks");
      std::abort();
    }
    data_ = static_cast<unsigned char*>(fresh);
    bytes_ = bytes;
  }
  unsigned char* data() const { return data_; }

 private:
  void unpoison() {
#if defined(FBC_SIMT_ASAN)
    __asan_unpoison_memory_region(data_, bytes_);
#endif
  }
  void release() {
    if (data_ == nullptr) return;
    unpoison();
    munmap(data_, bytes_);
    data_ = nullptr;
  }
  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
};

// ---- the switch -------------------------------------------------------------------------------
#if defined(FBC_SIMT_PORTABLE)
struct Context {
  ucontext_t state;
};
inline void make_context(Context& context, unsigned char* bottom, size_t size, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = bottom;
  context.state.uc_stack.ss_size = size;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#else
struct Context {
  void* stack_pointer = nullptr;
};
// Saves the registers that a callee has to keep on the old stack, and takes those of the new one.
extern "C" void fbc_simt_switch(void** save, void* load);
asm(".text\n.weak fbc_simt_switch\n.hidden fbc_simt_switch\n"
    ".type fbc_simt_switch,@function\nfbc_simt_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
inline void make_context(Context& context, unsigned char* bottom, size_t size, void (*entry)()) {
  void** stack = reinterpret_cast<void**>(bottom + size);  // 16-byte aligned, as pages are
  *--stack = nullptr;                                      // where entry() would return to
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  context.stack_pointer = stack;
}
inline void switch_context(Context& from, Context& to) { fbc_simt_switch(&from.stack_pointer, to.stack_pointer); }
#endif

#if defined(FBC_SIMT_TSAN)
// The race detector's threads take 0.7 MB each, so they are used again, the oldest first. In a
// later launch that is exact; within one, a race between blocks that share them goes unnoticed.
class Identities {
 public:
  void* take() {
    if (made_ < kMade || free_.empty()) {
      ++made_;
      return __tsan_create_fiber(0);
    }
    void* oldest = free_.front();
    free_.pop_front();
    return oldest;
  }
  void give_back(void* identity) { free_.push_back(identity); }

 private:
  static constexpr int kMade = 512;
  int made_ = 0;
  std::deque<void*> free_;
};
inline Identities& identities() {
  static thread_local Identities* of_this_thread = new Identities;  // outlives every launch
  return *of_this_thread;
}
#endif

struct Fiber {
  Context context;
  const void* bottom = nullptr;  // of the stack
  size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* identity = nullptr;    // ThreadSanitizer's
};

// A fiber that is not reset() is the host thread itself.
inline void reset_fiber(Fiber& fiber, unsigned char* bottom, size_t size, void (*entry)()) {
  fiber.bottom = bottom;
  fiber.size = size;
  fiber.fake_stack = nullptr;
  make_context(fiber.context, bottom, size, entry);
#if defined(FBC_SIMT_TSAN)
  fiber.identity = identities().take();
#endif
}
inline void host_fiber(Fiber& fiber) {
#if defined(FBC_SIMT_TSAN)
  fiber.identity = __tsan_get_current_fiber();
#endif
  (void)fiber;
}
inline void name_fiber(Fiber& fiber, unsigned block, int thread) {
#if defined(FBC_SIMT_TSAN)
  char name[64];
  std::snprintf(name, sizeof name, "block %u thread %d", block, thread);
  __tsan_set_fiber_name(fiber.identity, name);
#endif
  (void)fiber, (void)block, (void)thread;
}
inline void discard_fiber(Fiber& fiber) {
#if defined(FBC_SIMT_TSAN)
  identities().give_back(fiber.identity);
#endif
  (void)fiber;
}

// A fiber that will never run again: what it did happened before what follows after_there(token).
inline void abandon_fiber(Fiber& fiber, Fiber& host, void* token) {
#if defined(FBC_SIMT_TSAN)
  __tsan_switch_to_fiber(fiber.identity, __tsan_switch_to_fiber_no_sync);
  __tsan_release(token);
  __tsan_switch_to_fiber(host.identity, __tsan_switch_to_fiber_no_sync);
#endif
  (void)fiber, (void)host, (void)token;
}

// To ThreadSanitizer a switch is no barrier.
__attribute__((always_inline)) inline void switch_fiber(Fiber& from, Fiber& to, bool last = false) {
#if defined(FBC_SIMT_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#if defined(FBC_SIMT_TSAN)
  __tsan_switch_to_fiber(to.identity, __tsan_switch_to_fiber_no_sync);
#endif
  (void)last;
  switch_context(from.context, to.context);
#if defined(FBC_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}
// The last thing that a fiber does.
__attribute__((always_inline)) inline void end_fiber(Fiber& from, Fiber& to) {
#if defined(FBC_SIMT_TSAN)
  __tsan_func_exit();  // of the caller, which does not return
#endif
  switch_fiber(from, to, true);
  std::abort();  // nobody comes back
}
// The first thing that a new fiber does; `host` is who switched to it.
inline void begin_fiber(Fiber& host) {
#if defined(FBC_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &host.bottom, &host.size);
#endif
  (void)host;
}

// ---- what the race detector is told -----------------------------------------------------------
// The interpreter's own
// bookkeeping is not the kernel's: accesses inside a Quiet do not count.
struct Quiet {
#if defined(FBC_SIMT_TSAN)
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Quiet() {}
  ~Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};
// All that happened before before_here(p) happens before what follows a later after_there(p).
inline void before_here(void* token) {
#if defined(FBC_SIMT_TSAN)
  __tsan_release(token);
#endif
  (void)token;
}
inline void after_there(void* token) {
#if defined(FBC_SIMT_TSAN)
  __tsan_acquire(token);
#endif
  (void)token;
}

}  // namespace fbc::simt
