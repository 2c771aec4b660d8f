// The report of a kernel that breaks a rule: what, which primitive, its line, block and thread.
#pragma once

#include <cstdarg>

#include "block.h"

namespace fbc::simt {

inline void finish_report(const char* text) {
  std::fflush(stdout);
  std::fputs(text, stderr);
  std::fflush(stderr);
  if (settings().exit_on_failure) std::_Exit(kFailureStatus);
}

inline void yield() {
  Thread* t = block->current;
#if !defined(FBC_SIMT_ASAN) && !defined(FBC_SIMT_TSAN)
  const auto* frame = static_cast<const unsigned char*>(__builtin_frame_address(0));
  if (frame < static_cast<const unsigned char*>(t->fiber.bottom) + kStackReserve) {
    finish_report("simt: a thread's stack is full: local arrays or recursion of a kernel\n");
    std::abort();
  }
#endif
  switch_fiber(t->fiber, block->host);
}

// Says what rule was broken, where and by whom; never returns to the kernel.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  char what[512], text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  const Block& b = *block;
  const Thread& t = *b.current;
  std::snprintf(text, sizeof text,
                "simt: %s: %s\n  at %s:%d, block (%u,%u,%u), thread %u (warp %u, lane %d), "
                "schedule %u\n",
                t.at.operation, what, t.at.file, t.at.line, b.index.x, b.index.y, b.index.z, t.index.x, t.index.x / 32,
                t.lane, b.launch->seed);
  finish_report(text);
  b.launch->failed = true;
  for (;;) yield();  // the scheduler drops the launch
}

// Which threads of a block wait where: runs of equal waits, a line each.
inline void describe_waits(const Block& b, char* text, size_t size) {
  size_t used = 0;
  const auto add = [&](const char* format, auto... values) {
    if (used >= size) return;
    const int n = std::snprintf(text + used, size - used, format, values...);
    used += n > 0 ? static_cast<size_t>(n) : 0;
  };
  const int count = static_cast<int>(b.threads.size());
  add("  block (%u,%u,%u): %d of %d threads have returned\n", b.index.x, b.index.y, b.index.z, count - b.live, count);
  for (int i = 0, lines = 0; i < count && lines < 12;) {
    const Thread& t = b.threads[static_cast<size_t>(i)];
    int end = i + 1;
    while (end < count && b.threads[static_cast<size_t>(end)].state == t.state &&
           b.threads[static_cast<size_t>(end)].at == t.at) {
      ++end;
    }
    if (t.state != State::kDone) {
      add("    threads %d to %d wait in %s, %s:%d", i, end - 1, t.at.operation, t.at.file, t.at.line);
      if (t.state == State::kAtFlag) {
        add(": %u, want %u", __atomic_load_n(t.flag, __ATOMIC_RELAXED), t.flag_value);
      }
      add("%s", "\n");
      ++lines;
    }
    i = end;
  }
}

}  // namespace fbc::simt
