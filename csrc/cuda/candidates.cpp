#include "candidates.h"

#include "kernels.h"

namespace fbc::cuda {

namespace {

const char* never(const ConvProblem&, Direction) { return nullptr; }

const char* no_kernel(const ConvProblem&, Direction) {
  return "it has no CUDA kernel; use 'library', 'direct' or 'auto'";
}

const char* direct_cannot(const ConvProblem& problem, Direction) {
  if (problem.dtype == Dtype::kFloat64) {
    return "tensor cores do not multiply float64 as it needs; use 'library' or 'auto'";
  }
  if (problem.dtype == Dtype::kFloat32 && !problem.tf32) {
    return "its float32 products are rounded to tf32, which torch.backends.cudnn.allow_tf32 "
           "forbids; "
           "allow it, or use 'library' or 'auto'";
  }
  return one_pass_cannot(problem.shape, problem.dtype);
}

// The one-pass kernels wait for blocks of their own launch to release what they have sampled. Until
// that protocol has been checked on the hardware they run on request only.
const char* direct_not_chosen(const ConvProblem&, Direction) {
  return "the one-pass kernels are taken on request only";
}

constexpr Candidate kCandidates[kNumCandidates] = {
    {Algorithm::kLibrary, "library", never, never},
    {Algorithm::kDirect, "direct", direct_cannot, direct_not_chosen},
    {Algorithm::kWinograd2x4, "winograd2x4", no_kernel, never},
    {Algorithm::kWinograd2, "winograd2", no_kernel, never},
    {Algorithm::kWinograd4, "winograd4", no_kernel, never},
};

}  // namespace

const Candidate* candidates() { return kCandidates; }

Choice select_algorithm(const ConvProblem& problem, Direction direction, Algorithm requested) {
  for (const Candidate& candidate : kCandidates) {
    if (requested == Algorithm::kAuto) {
      if (candidate.cannot(problem, direction) == nullptr && candidate.not_chosen(problem, direction) == nullptr) {
        return {candidate.algorithm, nullptr, candidate.name};
      }
    } else if (candidate.algorithm == requested) {
      return {requested, candidate.cannot(problem, direction), candidate.name};
    }
  }
  return {requested, "no kernel computes this", "auto"};
}

}  // namespace fbc::cuda
