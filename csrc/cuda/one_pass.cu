// What the one-pass kernels can compute, and which source of weights suits a shape.
#include <initializer_list>

#include "fprop_args.cuh"

namespace fbc::cuda {
namespace {

// Indices inside a launch are int32: every extent that one counts stays below these.
constexpr int64_t kMaxPixels = int64_t{1} << 30;   // of a draw; tiles of a launch
constexpr int64_t kMaxColumns = int64_t{1} << 26;  // of the matrix product; its bytes fit too
constexpr int64_t kMaxReach = int64_t{1} << 29;    // of a coordinate, padding included

int64_t tiles_of(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

// a * b * ... <= limit, without overflow.
bool within(int64_t limit, std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (factor == 0) return true;
    if (product > limit / factor) return false;
    product *= factor;
  }
  return true;
}

// What an H100 or H200 does, counted from machine code and data sheets, not measured: 132
// multiprocessors, each sampling about 2.5 weights a nanosecond (84 instructions each); 3 us from
// the start of a cooperative launch to the first complete slab. Constants, because the choice must
// not depend on the device.
constexpr int64_t kMultiprocessors = 132;
constexpr int64_t kStartUpWeights = 7400;   // sampled by one multiprocessor in 3 us
constexpr int64_t kCachedBytes = 32 << 20;  // of slabs that stay in L2

}  // namespace

const char* one_pass_cannot(const ConvShape& s, Dtype dtype) {
  if (dtype == Dtype::kFloat64) return "float64 has no tensor-core product";
  const int64_t C = s.channels_per_group(), K = s.filters_per_group();
  if (C < 1 || K < 1 || s.R < 1 || s.S < 1) return "the weight is empty";
  if (s.num_samples < 1) return "there is no draw";
  if (!within(kMaxColumns, {s.R, s.S, C}) || !within(kMaxColumns, {s.R, s.S, K})) {
    return "a filter has more than 2^26 elements";
  }
  const int64_t rows = s.rows_per_sample();
  if (!within(kMaxPixels, {rows, s.P, s.Q}) || !within(kMaxPixels, {rows, s.H, s.W})) {
    return "a draw has more than 2^30 pixels";
  }
  const auto reaches = [](int64_t outputs, int64_t stride, int64_t filter, int64_t dilation, int64_t padding,
                          int64_t extent) {
    return !within(kMaxReach, {outputs, stride}) || !within(kMaxReach, {filter, dilation}) || padding > kMaxReach ||
           extent > kMaxReach;
  };
  if (reaches(s.P, s.stride_h, s.R, s.dilation_h, s.pad_top, s.H) ||
      reaches(s.Q, s.stride_w, s.S, s.dilation_w, s.pad_left, s.W)) {
    return "a coordinate, padding included, exceeds 2^29";
  }
  const int64_t pixels = rows * (s.P * s.Q > s.H * s.W ? s.P * s.Q : s.H * s.W);
  const int64_t channels = C > K ? C : K, longest = s.R * s.S * channels;
  if (!within(kMaxPixels, {s.num_samples, s.groups, tiles_of(pixels, 64) + 1, tiles_of(channels, 64)}) ||
      !within(kMaxPixels, {s.num_samples, tiles_of(longest, 16), s.groups * channels})) {
    return "the launch has more than 2^30 tiles";
  }
  return nullptr;
}

// Weights that one multiprocessor samples, one after another, decides:
//
//   private      a tile's (64 or 32 filters, fewer if there are fewer; those of one split where
//                the steps of a tile are split) once for each block it gets
//   cooperative  its share of all, and a start-up; a third more where the slabs do not stay in L2
//
// So a split makes private sampling as good as the cooperative one where one tile has all pixels.
// A draw per row is private whatever the sum: no memory that grows with rows times weights.
WeightSource best_source(const ConvShape& s) {
  if (s.num_samples > 1 && s.rows_per_sample() == 1) return WeightSource::kPrivate;
  const int64_t columns = s.R * s.S * s.channels_per_group(), filters = s.filters_per_group();
  const int64_t pixels = s.rows_per_sample() * s.P * s.Q;
  const int64_t splits = fprop_splits(s, kDepth<BFloat16>);
  const bool flat = splits > 1 && pixels > SmallTile::kPixels;
  const int64_t tile_channels = flat ? FlatTile::kChannels : TallTile::kChannels;
  const int64_t tile_pixels = splits > 1 ? FlatTile::kPixels : TallTile::kPixels;
  const int64_t blocks =
      splits * s.num_samples * s.groups * tiles_of(filters, tile_channels) * tiles_of(pixels, tile_pixels);
  const int64_t of_block = tiles_of(columns, splits) * (filters < tile_channels ? filters : tile_channels);
  const int64_t private_cost = tiles_of(blocks, kMultiprocessors) * of_block;
  const int64_t weights = s.num_samples * s.K * columns;
  int64_t cooperative_cost = weights / kMultiprocessors;
  if (2 * weights > kCachedBytes) cooperative_cost += cooperative_cost / 3;
  return private_cost <= cooperative_cost + kStartUpWeights ? WeightSource::kPrivate : WeightSource::kCooperative;
}

}  // namespace fbc::cuda
