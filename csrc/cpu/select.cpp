#include "select.h"

#include "kernels.h"

namespace fbc {

namespace {

const char* never(const ConvProblem&, Direction) { return nullptr; }

const char* winograd_cannot(const ConvProblem& problem, Direction) {
  if (!winograd_fits(problem.shape)) {
    return "it computes 3x3 filters without stride, dilation and groups; use 'direct' or 'auto'";
  }
  return nullptr;
}

bool is_16_bit(const ConvProblem& problem) {
  return problem.dtype == Dtype::kBFloat16 || problem.dtype == Dtype::kFloat16;
}

// The direct kernels multiply in bfloat16 instead of float32.
bool has_pairs(const ConvProblem& problem) {
  return problem.bf16 && problem.dtype == Dtype::kBFloat16 && pairs_fit(problem.shape);
}

int64_t winograd_tiles(const ConvShape& s) { return s.output_rows() * ((s.P + 1) / 2) * ((s.Q + 1) / 2); }

bool has_avx512(const ConvProblem& problem) { return problem.isa == Isa::kAvx512; }

// PyTorch computes them fast: bfloat16 without AVX-512 takes it ten times as long as float32.
bool has_16_bit_library(const ConvProblem& problem) { return is_16_bit(problem) && has_avx512(problem); }

// What follows was measured over the grid of benchmarks/selection.py, with AVX-512 and with AVX2.

// Fewer channels, and the transforms cost more than they save.
bool has_few_channels(const ConvProblem& problem, Direction direction) {
  const ConvShape& s = problem.shape;
  const int64_t fewer = s.C < s.K ? s.C : s.K, more = s.C < s.K ? s.K : s.C;
  const bool forward = direction == Direction::kFprop;
  if (fewer < 8) return !forward || s.C < 64;
  if (has_avx512(problem)) return fewer < 16 && more < 64;
  if (fewer < 16) return !forward || more < 64;
  return direction != Direction::kWgrad && more < 32;
}

// The transforms of the weight must be shared by enough tiles. Of many weights fewer will do: the direct
// kernels, too, read them from memory, and more often.
int64_t least_tiles(const ConvProblem& problem, Direction direction) {
  const int64_t matrix = problem.shape.C * problem.shape.K;
  const bool large = matrix >= 512 * 512;
  if (matrix < 256 * 256) return 64;
  if (has_avx512(problem)) {
    if (direction == Direction::kFprop) return 16;
    return direction == Direction::kWgrad ? (large ? 32 : 16) : large ? 32 : 48;
  }
  return direction == Direction::kDgrad && large ? 64 : 16;
}

// float64 is for checking gradients, where the plainest sum is the best.
const char* winograd2_not_chosen(const ConvProblem& problem, Direction direction) {
  const ConvShape& s = problem.shape;
  const bool weights = direction == Direction::kWgrad;
  if (problem.dtype == Dtype::kFloat64) return "float64 is computed by the direct kernels";
  if (has_pairs(problem)) return "it multiplies in float32, the others in bfloat16";
  // The library's weight gradient is its slowest, and it does not like small images.
  if (has_16_bit_library(problem) && s.P * s.Q > 16 && (!weights || s.C * s.K >= 512 * 512)) {
    return "PyTorch's 16-bit convolution is faster";
  }
  if (has_few_channels(problem, direction)) return "there are too few channels for the transforms to pay";
  if (winograd_tiles(s) / s.num_samples < least_tiles(problem, direction)) {
    return "there are too few pixels for the transforms to pay";
  }
  return nullptr;
}

ConvProblem in_float32(ConvProblem problem) {
  problem.dtype = Dtype::kFloat32;
  return problem;
}

int64_t pixels_of_a_draw(const ConvShape& s) { return s.output_rows() / s.num_samples * s.P * s.Q; }

// Null where its errors stay within those of PyTorch's convolution in the same memory format: output (root mean
// square) and twice the largest of a gradient (benchmarks/accuracy.py).
const char* winograd2x4_rounds(const ConvProblem& problem, Direction direction) {
  const ConvShape& s = problem.shape;
  if (direction == Direction::kWgrad) {
    if (pixels_of_a_draw(s) >= 384) return nullptr;
    return "its errors would be larger than those of a direct sum over few pixels";
  }
  if (is_16_bit(problem)) return nullptr;  // what is rounded to 16 bits does not show them
  if (!problem.channels_last) return "PyTorch sums planes in shorter chains: its errors would be larger than those";
  if (direction == Direction::kDgrad || s.C >= 64) return nullptr;
  return "its errors would be larger than those of a direct sum over few channels";
}

const char* winograd2x4_not_chosen(const ConvProblem& problem, Direction direction) {
  const ConvShape& s = problem.shape;
  const bool forward = direction == Direction::kFprop;
  if (problem.dtype != Dtype::kFloat64) {
    if (const char* reason = winograd2x4_rounds(problem, direction)) return reason;
  }
  // A third of the products in float32 are faster than all of them in bfloat16, until the weights are large; in
  // backward the gradient would be made in float32 for it.
  const bool beats_pairs = forward && has_pairs(problem) && s.C >= 64 && s.K >= 64 && s.C * s.K <= 128 * 128;
  const char* reason = winograd2_not_chosen(beats_pairs ? in_float32(problem) : problem, direction);
  if (reason != nullptr) return reason;
  const bool large = s.C * s.K >= 512 * 512;
  // malloc gives a workspace of over 32 MiB back to the system: cleared pages cost more than a quarter of the products.
  if (direction == Direction::kDgrad && large) return "its packed weights would be fresh memory in every call";
  const int64_t least_pixels = !forward ? 384 : large ? 0 : 128;
  if (pixels_of_a_draw(s) < least_pixels) return "there are too few pixels for tiles of 2 x 4 to pay";
  return nullptr;
}

// Where the kernels for pairs beat the library's, or come within 10 %: not with few vectors in a tile, and not
// for gradients by the input of 1 x 1 filters, which wait for memory.
bool pairs_are_as_fast(const ConvProblem& problem, Direction direction) {
  const ConvShape& s = problem.shape;
  const int64_t channels = s.channels_per_group(), filters = s.filters_per_group();
  switch (direction) {
    case Direction::kFprop: return filters >= 16 || channels <= 8;
    case Direction::kDgrad:
      if (s.R * s.S == 1 && s.stride_h * s.stride_w == 1) return channels >= 256;
      return channels >= 48 || (channels <= 4 && filters >= 32);
    case Direction::kWgrad: return channels > 16 || filters > 32 || filters < 16;
  }
  return false;
}

bool is_pointwise(const ConvShape& s) { return s.R * s.S == 1 && s.stride_h * s.stride_w == 1; }

// Results of this size are fresh memory: the library's pages of 4 KiB, ours of 2 MiB.
bool is_large(int64_t elements, int64_t millions) { return elements >= millions << 20; }

bool direct_fprop_is_as_fast(const ConvProblem& problem) {
  const ConvShape& s = problem.shape;
  const int64_t filters = s.filters_per_group();
  if (is_pointwise(s) && !has_avx512(problem)) return filters < 128 || is_large(s.N * s.P * s.Q * s.K, 8);
  return filters >= 8 || s.R * s.S == 1;
}

bool direct_dgrad_is_as_fast(const ConvProblem& problem) {
  const ConvShape& s = problem.shape;
  const int64_t channels = s.channels_per_group(), filters = s.filters_per_group();
  const bool small_filter = s.R * s.S <= 9 && s.stride_h * s.stride_w == 1;
  if (has_avx512(problem) && s.groups == 1 && filters < 4 && small_filter) return true;
  if (s.R * s.S == 1) return is_pointwise(s) && is_large(s.N * s.H * s.W * s.C, 2);
  if (s.groups == 1 && channels <= 4) return true;
  if (filters < 16) return false;
  if (s.groups == 1 && channels <= 8) return true;
  if (s.stride_h * s.stride_w > 1) return channels >= 256 || !problem.channels_last;
  return channels >= 64 || !has_avx512(problem);
}

bool direct_wgrad_is_as_fast(const ConvProblem& problem) {
  const ConvShape& s = problem.shape;
  const int64_t channels = s.channels_per_group(), filters = s.filters_per_group();
  if (!has_avx512(problem)) {
    // Of images in planes the library reads a gradient of its own, beside that of the data gradient.
    return !is_pointwise(s) || filters < 128 || (!problem.channels_last && is_large(s.N * s.P * s.Q * s.K, 8));
  }
  if (s.R * s.S >= 25 && channels >= 64) return false;
  return filters >= 16 || channels >= 8;
}

// Groups of a few channels, which the direct kernels compute with vectors over the channels of all groups
// (depthwise_taps.inc).
bool are_groups_narrow(const ConvProblem& problem) {
  const ConvShape& s = problem.shape;
  const int64_t most = has_avx512(problem) ? 4 : 2;
  return s.groups > 1 && s.channels_per_group() <= most && s.filters_per_group() <= most;
}

bool direct_is_as_fast_in_narrow_groups(const ConvProblem& problem, Direction direction) {
  const ConvShape& s = problem.shape;
  const bool depthwise = s.groups == s.C && s.groups == s.K, forward = direction == Direction::kFprop;
  if (s.C < 16 && s.K < 16) return false;  // less than a vector of channels in all
  if (has_16_bit_library(problem)) {
    const bool strided = s.stride_h * s.stride_w > 1;
    return problem.channels_last && (direction != Direction::kDgrad || strided);
  }
  if (!depthwise) return true;
  if (!forward && s.C < 24) return false;
  if (!has_avx512(problem) && (direction == Direction::kDgrad || (forward && s.R * s.S <= 9))) return false;
  if (problem.channels_last) return true;
  // Planes are copied to pixels and back; but the library's weight gradient of a large filter is slow.
  if (has_avx512(problem) && s.R * s.S <= 9) return direction != Direction::kDgrad && s.stride_h * s.stride_w == 1;
  return direction == Direction::kWgrad && s.R * s.S > 9;
}

// Where the direct kernels beat the library, or come within 10 %.
bool direct_is_as_fast(const ConvProblem& problem, Direction direction) {
  const ConvShape& s = problem.shape;
  if (problem.dtype == Dtype::kBFloat16 && !has_avx512(problem)) return true;
  if (problem.isa == Isa::kBaseline) return false;
  if (are_groups_narrow(problem)) return direct_is_as_fast_in_narrow_groups(problem, direction);
  if (has_pairs(problem)) return pairs_are_as_fast(problem, direction);
  if (has_16_bit_library(problem)) return false;
  if (s.groups > 1 && (s.channels_per_group() < 16 || s.filters_per_group() < 16)) return false;
  if (s.P * s.Q == 1 && s.H * s.W == 1) return true;  // a linear layer
  switch (direction) {
    case Direction::kFprop: return direct_fprop_is_as_fast(problem);
    case Direction::kDgrad: return direct_dgrad_is_as_fast(problem);
    case Direction::kWgrad: return direct_wgrad_is_as_fast(problem);
  }
  return false;
}

const char* only_on_request(const ConvProblem&, Direction) {
  return "its rounding error is larger, so it is taken on request only";
}

// Whether each window along one side of the image, first to last, has a tap on a pixel.
bool every_window_sees_a_pixel(int64_t extent, int64_t pad_before, int64_t pad_after, int64_t filter,
                               int64_t dilation) {
  const int64_t window = (filter - 1) * dilation + 1;
  return pad_before < window && pad_after < window && extent >= dilation;
}

// pytorch/pytorch issues 163347 and 169688: wrong numbers, or a crash. Inside these bounds some 330
// random problems of either 16-bit type were right in every direction.
const char* library_cannot(const ConvProblem& problem, Direction) {
  const ConvShape& s = problem.shape;
  if (problem.deterministic) {
    return "deterministic algorithms were asked for, and its bits depend on the number of threads; use "
           "'direct' or 'auto'";
  }
  if (!is_16_bit(problem)) return nullptr;
  if (s.stride_h > 2 || s.stride_w > 2 || s.P < 4 || s.Q < 4) {
    return "PyTorch's 16-bit convolution is wrong for strides above 2 and outputs below 4 pixels; "
           "use 'direct' or 'auto'";
  }
  if (!every_window_sees_a_pixel(s.H, s.pad_top, s.pad_bottom, s.R, s.dilation_h) ||
      !every_window_sees_a_pixel(s.W, s.pad_left, s.pad_right, s.S, s.dilation_w)) {
    return "PyTorch's 16-bit convolution crashes where the filter can lie in the padding; use "
           "'direct' or 'auto'";
  }
  return nullptr;
}

const char* library_not_chosen(const ConvProblem& problem, Direction direction) {
  if (problem.dtype == Dtype::kFloat64) return "float64 is computed by the direct kernels";
  if (direct_is_as_fast(problem, direction)) return "the direct kernels are at least as fast";
  return nullptr;
}

constexpr Candidate kCandidates[kNumCandidates] = {
    {Algorithm::kWinograd2x4, "winograd2x4", winograd_cannot, winograd2x4_not_chosen},
    {Algorithm::kWinograd2, "winograd2", winograd_cannot, winograd2_not_chosen},
    {Algorithm::kWinograd4, "winograd4", winograd_cannot, only_on_request},
    {Algorithm::kLibrary, "library", library_cannot, library_not_chosen},
    {Algorithm::kDirect, "direct", never, never},
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

}  // namespace fbc
