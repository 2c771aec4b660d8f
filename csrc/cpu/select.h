// Which kernel computes one direction of one convolution: candidates, best first, each with a
// predicate that can say why not. The answer depends on shape, dtype, layout and instruction set,
// and never on threads, so that results do not either.
#pragma once

#include <cstdint>

#include "../core/conv_shape.h"
#include "../core/types.h"
#include "capability.h"

namespace fbc {

enum class Algorithm : int32_t {
  kAuto = 0,
  kDirect = 1,     // one-pass kernels of csrc/cpu
  kWinograd2 = 2,  // F(2x2, 3x3)
  kWinograd4 = 3,  // F(4x4, 3x3), on request only
  kLibrary = 4,    // fused sampling pass, then the framework's convolution
};
constexpr int32_t kNumAlgorithms = 5;

enum class Direction : int32_t { kFprop = 0, kDgrad = 1, kWgrad = 2 };

struct ConvProblem {
  ConvShape shape;
  Dtype dtype;         // of the input: what products are computed in
  bool channels_last;  // memory of the input
  Isa isa;
  bool deterministic;  // the user asked for bits that do not depend on threads
};

struct Candidate {
  Algorithm algorithm;
  const char* name;
  // Null: it can compute this. Else the reason why it cannot, whoever asks.
  const char* (*cannot)(const ConvProblem&, Direction);
  // Null: auto may take it. Else the reason why auto passes it over.
  const char* (*not_chosen)(const ConvProblem&, Direction);
};

constexpr int kNumCandidates = 4;
const Candidate* candidates();  // kNumCandidates of them, best first

struct Choice {
  Algorithm algorithm;
  const char* reason;  // null, or why the requested algorithm cannot do it
  const char* name;
};

// The requested algorithm, or for kAuto the first candidate with no objection.
Choice select_algorithm(const ConvProblem& problem, Direction direction, Algorithm requested);

const char* direction_name(Direction direction);

}  // namespace fbc
