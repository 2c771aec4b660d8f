// Which provider computes one direction of a convolution on a GPU: candidates, best first, each
// with a predicate that can say why not. The answer depends on shape, dtype and the framework's
// precision setting, never on the device at hand.
#pragma once

#include "../core/algorithm.h"
#include "../core/conv_shape.h"
#include "../core/types.h"

namespace fbc::cuda {

struct ConvProblem {
  ConvShape shape;
  Dtype dtype;  // of the input: what products are computed in
  bool tf32;    // whether float32 products may be rounded to tf32
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

}  // namespace fbc::cuda
