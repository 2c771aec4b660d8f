// dgrad() of kernels.h: extents and instantiations for dgrad_kernel.cuh.
#include "dgrad_kernel.cuh"
#include "kernels.h"

#include <algorithm>
#include <numeric>

namespace fbc::cuda {
namespace {

constexpr int64_t kExtentLimit = int64_t{1} << 30;
constexpr int64_t kWorkspaceAlignment = 256;
constexpr int kInvalid = 1;  // cudaErrorInvalidValue

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, bool kPrivate, bool kAligned>
int launch_tiles(const DgradArgs& a, StreamHandle stream) {
  return gpu::launch(dgrad_kernel<T, kPrivate, kAligned>,
                     dim3(static_cast<unsigned>(a.tiles) * static_cast<unsigned>(a.sum.splits)), DgradTile::kThreads,
                     sizeof(DgradShared), stream, a);
}

template <typename T>
int launch_type(const DgradParams& p, DgradArgs a, StreamHandle stream) {
  const ImageStrides& g = p.grad_stride;
  const int32_t size = static_cast<int32_t>(sizeof(T));
  a.grad_aligned = chunks_aligned<T>(p.grad, g.n, g.h, g.w, a.shape.K);
  a.weight_aligned = chunks_aligned<T>(a.weight, 0, 0, 0, a.shape.C);
  a.pack = output_pack(p.grad_input, p.grad_input_stride, a.shape.C, a.shape.groups > 1, size);
  if (a.weight == nullptr) {
    return a.grad_aligned ? launch_tiles<T, true, true>(a, stream) : launch_tiles<T, true, false>(a, stream);
  }
  return a.grad_aligned && a.weight_aligned ? launch_tiles<T, false, true>(a, stream)
                                            : launch_tiles<T, false, false>(a, stream);
}

int64_t round_up(int64_t bytes) { return ceil_divide(bytes, kWorkspaceAlignment) * kWorkspaceAlignment; }

// How a launch is cut, from its shape alone. The workspace, in bytes from its begin:
// [tickets, zeroed][slabs of sums][what sampling needs].
struct DgradPlan {
  int64_t phases, pixel_tiles, channel_tiles, tile_draws, tiles;
  int32_t splits;
  int64_t tickets_bytes, sums_bytes;
};
DgradPlan plan_dgrad(const DgradParams& p) {
  const ConvShape& s = p.shape;
  const int64_t pixels = s.rows_per_sample() * ceil_divide(s.H, s.stride_h) * ceil_divide(s.W, s.stride_w);
  const int64_t taps = ceil_divide(s.R * std::gcd(s.stride_h, s.dilation_h), s.stride_h) *
                       ceil_divide(s.S * std::gcd(s.stride_w, s.dilation_w), s.stride_w);
  const int64_t depth = p.dtype == Dtype::kFloat32 ? kDepth<float> : kDepth<Half>;
  const int64_t draws = s.share_input ? s.num_samples : 1;
  DgradPlan plan;
  plan.phases = std::min(s.stride_h, s.H) * std::min(s.stride_w, s.W);
  plan.pixel_tiles = ceil_divide(pixels, DgradTile::kPixels);
  plan.channel_tiles = ceil_divide(s.channels_per_group(), DgradTile::kChannels);
  plan.tile_draws = s.share_input ? 1 : s.num_samples;
  plan.tiles = s.groups * plan.tile_draws * plan.phases * plan.pixel_tiles * plan.channel_tiles;
  plan.splits = split_count(plan.tiles, draws * ceil_divide(taps * s.filters_per_group(), depth));
  const bool split = plan.splits > 1;
  plan.tickets_bytes = split ? round_up(plan.tiles * 4) : 0;
  plan.sums_bytes = split ? plan.splits * plan.tiles * DgradTile::kPixels * DgradTile::kChannels * 4 : 0;
  return plan;
}

DgradArgs arguments(const DgradParams& p, const ConvWeight& weight, const DgradPlan& plan, unsigned char* workspace) {
  const ConvShape& s = p.shape;
  DgradArgs a{};
  a.grad = p.grad;
  a.weight = weight.source == WeightSource::kPrivate ? nullptr : weight.given;
  a.grad_input = p.grad_input;
  a.grad_stride = p.grad_stride;
  a.input_stride = p.grad_input_stride;
  a.shape = conv_geometry(s);
  a.sampler = weight_sampler(weight, s);
  a.tap_step_h = static_cast<int32_t>(s.stride_h / std::gcd(s.stride_h, s.dilation_h));
  a.tap_step_w = static_cast<int32_t>(s.stride_w / std::gcd(s.stride_w, s.dilation_w));
  a.phases_w = static_cast<int32_t>(std::min(s.stride_w, s.W));
  a.phases = static_cast<int32_t>(plan.phases);
  a.channel_tiles = static_cast<int32_t>(plan.channel_tiles);
  a.pixel_tiles = static_cast<int32_t>(plan.pixel_tiles);
  a.tile_draws = static_cast<int32_t>(plan.tile_draws);
  a.tiles = static_cast<int32_t>(plan.tiles);
  a.sum = {reinterpret_cast<float*>(workspace + plan.tickets_bytes), reinterpret_cast<uint32_t*>(workspace),
           plan.splits};
  return a;
}

int launch(const DgradParams& p, const ConvWeight& weight, unsigned char* workspace, StreamHandle stream) {
  const ConvShape& s = p.shape;
  // What the int32 arithmetic of a block relies on.
  const int64_t C = s.channels_per_group(), K = s.filters_per_group(), taps = s.R * s.S;
  const int64_t extents[] = {s.rows_per_sample() * s.H * s.W,
                             s.C,
                             s.K,
                             taps * C,
                             taps * K,
                             s.num_samples * ceil_divide(taps * K, 16),
                             s.P * s.stride_h,
                             s.Q * s.stride_w,
                             s.R * s.dilation_h,
                             s.S * s.dilation_w,
                             s.H + s.pad_top,
                             s.W + s.pad_left,
                             s.stride_h,
                             s.stride_w};
  for (const int64_t extent : extents) {
    if (extent > kExtentLimit) return kInvalid;
  }
  const DgradPlan plan = plan_dgrad(p);
  if (plan.tiles == 0) return 0;
  if (plan.tiles > INT32_MAX) return kInvalid;
  if (plan.tickets_bytes > 0) {
    const size_t bytes = static_cast<size_t>(plan.tickets_bytes);
    if (const int status = gpu::fill_zero(workspace, bytes, stream)) return status;
  }
  const DgradArgs a = arguments(p, weight, plan, workspace);
  switch (p.dtype) {
    case Dtype::kBFloat16: return launch_type<BFloat16>(p, a, stream);
    case Dtype::kFloat16: return launch_type<Half>(p, a, stream);
    case Dtype::kFloat32: return launch_type<float>(p, a, stream);
    default: return kInvalid;
  }
}

// kCooperative: one launch samples all draws into the workspace, the next reads them.
SampleEntry<float> sample_entry(const DgradParams& p, const ConvWeight& weight, void* sample) {
  const ConvShape& s = p.shape;
  const int64_t C = s.channels_per_group();
  SampleEntry<float> entry{};
  entry.posterior = weight.posterior;
  entry.seed = weight.seed;
  entry.sample = sample;
  entry.sample_dtype = p.dtype;
  entry.sample_stride = {s.R * s.S * C, s.S * C, C, 1};
  entry.sample_sample_stride = s.K * s.R * s.S * C;
  entry.num_samples = s.num_samples;
  return entry;
}
int64_t sample_bytes(const DgradParams& p) {
  const ConvShape& s = p.shape;
  const int64_t size = p.dtype == Dtype::kFloat32 ? 4 : 2;
  return round_up(s.num_samples * s.K * s.R * s.S * s.channels_per_group() * size);
}
int64_t split_bytes(const DgradParams& p) {
  const DgradPlan plan = plan_dgrad(p);
  return plan.tickets_bytes + plan.sums_bytes;
}

}  // namespace

size_t dgrad_workspace(const DgradParams& params, const ConvWeight& weight) {
  const size_t bytes = static_cast<size_t>(split_bytes(params));
  if (weight.source != WeightSource::kCooperative) return bytes;
  const SampleEntry<float> entry = sample_entry(params, weight, nullptr);
  return bytes + static_cast<size_t>(sample_bytes(params)) + sample_workspace(&entry, 1);
}

int dgrad(const DgradParams& params, const ConvWeight& weight, void* workspace, StreamHandle stream) {
  unsigned char* memory = static_cast<unsigned char*>(workspace);
  if (weight.source != WeightSource::kCooperative) return launch(params, weight, memory, stream);
  unsigned char* drawn = memory + split_bytes(params);
  const SampleEntry<float> entry = sample_entry(params, weight, drawn);
  unsigned char* rest = drawn + sample_bytes(params);
  if (const int status = sample(&entry, 1, rest, stream)) return status;
  ConvWeight given = weight;
  given.source = WeightSource::kGiven;
  given.given = drawn;
  return launch(params, given, memory, stream);
}

}  // namespace fbc::cuda
