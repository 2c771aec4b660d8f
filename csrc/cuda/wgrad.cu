// wgrad() of kernels.h: extents and instantiations for wgrad_kernel.cuh.
#include "kernels.h"
#include "wgrad_kernel.cuh"

#include <algorithm>

namespace fbc::cuda {
namespace {

// Slabs give every multiprocessor of a large GPU (132) two blocks where the pixels allow it. They
// come from the shape alone, so results do not depend on the device.
constexpr int64_t kMaxSlabs = 64;
constexpr int64_t kBlocksWanted = 264;
constexpr int64_t kMaxSlabBytes = int64_t{64} << 20;  // of all slabs together; one is always taken
constexpr int64_t kPixelsPerSlab = 256;               // at least: below, writing costs more than it gains
constexpr int64_t kExtentLimit = int64_t{1} << 30;
constexpr int kInvalid = 1;  // cudaErrorInvalidValue

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the products of draws are weighed one by one; otherwise all pixels go into one sum.
bool has_draws(const WgradParams& p) { return p.shape.num_samples > 1 && p.slabs_eps != nullptr; }

template <typename T, bool kDraws, bool kAligned>
int launch_tiles(WgradArgs a, StreamHandle stream) {
  using Tile = WgradTile<T, kDraws, kAligned>;
  a.filter_tiles = static_cast<int32_t>(ceil_divide(a.shape.K, Tile::kFilters));
  a.column_tiles = static_cast<int32_t>(ceil_divide(a.shape.columns, Tile::kColumns));
  const int64_t steps_per_draw = ceil_divide(int64_t{a.shape.rows} * a.by_pixels.value, Tile::kDepth);
  const int64_t blocks = int64_t{a.slab_count} * a.shape.groups * a.filter_tiles * int64_t{a.column_tiles};
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX || a.steps * steps_per_draw / a.slab_count > kExtentLimit) return kInvalid;
  a.steps *= steps_per_draw;
  a.steps_per_draw = static_cast<int32_t>(std::max<int64_t>(steps_per_draw, 1));
  return gpu::launch(wgrad_kernel<T, kDraws, kAligned>, dim3(static_cast<unsigned>(blocks)), Tile::kThreads,
                     sizeof(WgradShared<Tile>), stream, a);
}

template <typename T>
int launch_type(const WgradParams& p, WgradArgs& a, StreamHandle stream) {
  const ImageStrides& x = p.input_stride;
  const ImageStrides& g = p.grad_stride;
  a.input_aligned = chunks_aligned<T>(p.input, x.n, x.h, x.w, a.shape.C);
  a.grad_aligned = chunks_aligned<T>(p.grad, g.n, g.h, g.w, a.shape.K);
  const bool aligned = a.input_aligned && a.grad_aligned;
  if (has_draws(p)) {
    return aligned ? launch_tiles<T, true, true>(a, stream) : launch_tiles<T, true, false>(a, stream);
  }
  return aligned ? launch_tiles<T, false, true>(a, stream) : launch_tiles<T, false, false>(a, stream);
}

WgradArgs arguments(const WgradParams& p, int64_t slabs) {
  const ConvShape& s = p.shape;
  WgradArgs a{};
  a.input = p.input;
  a.grad = p.grad;
  a.slabs = p.slabs;
  a.slabs_eps = p.slabs_eps;
  a.seed = p.seed;
  a.input_stride = p.input_stride;
  a.grad_stride = p.grad_stride;
  a.shape = conv_geometry(s);
  a.steps = s.P > 0 && s.Q > 0 ? s.num_samples : 0;  // times steps_per_draw, by launch_tiles()
  a.slab_count = static_cast<int32_t>(slabs);
  a.by_pixels = divisor(s.P * s.Q);
  a.by_q = divisor(s.Q);
  a.noise = p.posterior.noise;
  a.stream = p.posterior.stream;
  a.element_offset = p.posterior.element_offset;
  return a;
}

int launch_slabs(const WgradParams& p, int64_t slabs, StreamHandle stream) {
  const ConvShape& s = p.shape;
  // What the int32 arithmetic of a block relies on.
  const int64_t rows = s.rows_per_sample();
  const int64_t extents[] = {rows * s.P * s.Q,
                             s.R * s.S * s.channels_per_group(),
                             s.K,
                             s.P * s.stride_h,
                             s.Q * s.stride_w,
                             s.R * s.dilation_h,
                             s.S * s.dilation_w,
                             s.H + s.pad_top,
                             s.W + s.pad_left};
  for (const int64_t extent : extents) {
    if (extent > kExtentLimit) return kInvalid;
  }
  WgradArgs a = arguments(p, slabs);
  switch (p.dtype) {
    case Dtype::kBFloat16: return launch_type<BFloat16>(p, a, stream);
    case Dtype::kFloat16: return launch_type<Half>(p, a, stream);
    case Dtype::kFloat32: return launch_type<float>(p, a, stream);
    default: return kInvalid;
  }
}

}  // namespace

int64_t wgrad_slabs(const WgradParams& params) {
  const ConvShape& s = params.shape;
  const int64_t columns = s.R * s.S * s.channels_per_group();
  const int64_t tiles = s.groups * ceil_divide(s.filters_per_group(), 64) * ceil_divide(columns, 64);
  const int64_t pixels = s.output_rows() * s.P * s.Q;
  int64_t slabs = std::min(kMaxSlabs, ceil_divide(kBlocksWanted, std::max<int64_t>(tiles, 1)));
  slabs = std::min(slabs, pixels / kPixelsPerSlab);
  const int64_t slab_bytes = std::max<int64_t>(s.K * columns, 1) * static_cast<int64_t>(sizeof(float));
  return std::max<int64_t>(std::min(slabs, kMaxSlabBytes / slab_bytes), 1);
}

int wgrad(const WgradParams& params, StreamHandle stream) { return launch_slabs(params, wgrad_slabs(params), stream); }

}  // namespace fbc::cuda
