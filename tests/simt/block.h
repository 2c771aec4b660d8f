// The settings of the interpreter, and the state of a launch, its blocks and their threads.
#pragma once

#include <atomic>
#include <cstring>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace fbc::simt {

constexpr int kFailureStatus = 66;  // exit status of a process whose kernel broke a rule
constexpr int kErrorInvalidValue = 1, kErrorInvalidConfiguration = 9;  // of cudaError_t
constexpr int kErrorLaunchFailure = 719, kErrorCooperativeTooLarge = 720;

// What may be changed before a launch; read during one, from any thread.
struct Settings {
  uint32_t seed = 0;               // of the schedule; the default is FASTBCONV_SIMT_SEED, or 0
  int resident_blocks = 0;         // blocks that the "device" holds at once; 0: a choice by the seed
  int workers = 1;                 // host threads of a launch; more than one with seed 0 only
  size_t shared_limit = 99 << 10;  // bytes of shared memory per block: the least of sm_80 and later
  bool exit_on_failure = true;     // false: the launch gives up and returns kErrorLaunchFailure
};
inline Settings& settings() {
  static Settings shared = [] {
    Settings s;
    if (const char* seed = std::getenv("FASTBCONV_SIMT_SEED")) {
      s.seed = static_cast<uint32_t>(std::strtoul(seed, nullptr, 10));
    }
    return s;
  }();
  return shared;
}

// Where a primitive is called: the default argument of each, so it names the kernel's line.
struct Site {
  const char* operation;
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && same(operation, other.operation) && same(file, other.file);
  }
  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
};
constexpr Site here(const char* operation, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {operation, file, line};
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint32_t operator()() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545F4914F6CDD1Dull) >> 32);
  }
  uint32_t below(uint32_t n) { return (*this)() % n; }

 private:
  uint64_t state_;
};

constexpr size_t kStackBytes = 256 << 10;  // of address space; pages are taken as they are touched
constexpr size_t kStackReserve = 16 << 10;
constexpr size_t kGuardBytes = 1024;  // after shared memory
constexpr unsigned char kGuard = 0xa5;

struct Copy {  // asynchronous, in flight
  void* to;
  const void* from;
  int bytes;
  bool valid, done;
  unsigned group;
};

enum class State : uint8_t { kRunnable, kInWarp, kAtBarrier, kAtFlag, kDone };

struct Warp {
  int arrived = 0, live = 0, at_barrier = 0, first = 0;
  Site at{};  // of those that arrived
  unsigned phase = 0;
  char token[2] = {};  // of the race detector
  void* argument[32] = {};
};
struct Thread {
  Fiber fiber;
  dim3 index;
  int lane = 0;
  State state = State::kRunnable;
  Warp* warp = nullptr;
  Site at{};  // the last primitive
  const uint32_t* flag = nullptr;
  uint32_t flag_value = 0;
  std::vector<Copy> copies;
  unsigned open_group = 0;
};

struct Launch {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  bool cooperative;
  void (*body)(const void*);
  const void* argument;
  uint32_t seed;
  unsigned blocks;
  std::atomic<unsigned> next{0};
  std::atomic<bool> failed{false};
  char begin = 0, end = 0;  // tokens of the race detector
};

struct Block {
  Launch* launch = nullptr;
  dim3 index, extent;
  Fiber host;
  Thread* current = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> queue;  // runnable threads, from `head`
  size_t head = 0;
  std::vector<int> at_flag;
  int live = 0, at_barrier = 0;
  Site barrier{};
  unsigned phase = 0;
  std::vector<char> token;  // of the race detector
  Pages shared_pages, stacks;
  unsigned char* shared = nullptr;
  Random random{0};
  uint32_t mood = 0;  // how an adversarial schedule picks threads
};
// Fibers stay on their host thread, so this is the block of whatever runs.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((tls_model("initial-exec")))
#endif
inline thread_local Block* block = nullptr;

}  // namespace fbc::simt
