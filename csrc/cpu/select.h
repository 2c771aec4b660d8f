// Which kernel computes one direction of one convolution: candidates, best first, each with a
// predicate that can say why not. The answer depends on shape, dtype, layout and instruction set,
// and never on threads, so that results do not either.
#pragma once

#include <cstdint>

#include "../core/algorithm.h"
#include "../core/conv_shape.h"
#include "../core/types.h"
#include "capability.h"

namespace fbc {

struct ConvProblem {
  ConvShape shape;
  Dtype dtype;         // of the input: what products are computed in
  bool channels_last;  // memory of the input
  Isa isa;
  bool bf16;           // the processor multiplies pairs of bfloat16
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

constexpr int kNumCandidates = 5;
const Candidate* candidates();  // kNumCandidates of them, best first

// The requested algorithm, or for kAuto the first candidate with no objection.
Choice select_algorithm(const ConvProblem& problem, Direction direction, Algorithm requested);

}  // namespace fbc
