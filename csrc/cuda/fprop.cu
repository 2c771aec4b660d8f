// fprop(): plans a forward launch and hands it to the kernels of its storage type.
#include "fprop_args.cuh"

namespace fbc::cuda {
namespace {

// Enough blocks for every multiprocessor of a large GPU. A constant: what is computed must not
// depend on the device that is present.
constexpr int64_t kFill = 120;

int32_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct TileExtents {
  int32_t pixels, channels, threads;
};
template <typename Tile>
constexpr TileExtents kExtentsOf = {Tile::kPixels, Tile::kChannels, Tile::kThreads};
TileExtents extents_of(TileKind tile) {
  return tile == TileKind::kLarge  ? kExtentsOf<LargeTile>
         : tile == TileKind::kTall ? kExtentsOf<TallTile>
         : tile == TileKind::kFlat ? kExtentsOf<FlatTile>
                                   : kExtentsOf<SmallTile>;
}

// The largest tile that still fills a GPU; of the two large ones the one that wastes fewer
// channels. With private sampling one tile's weights should serve as many pixels as there are.
// Where steps are split there are few tiles, so it is one of those that can.
TileKind choose_tile(const ConvGeometry& g, WeightSource source, bool wide, int32_t splits) {
  const auto blocks = [&](TileKind tile) {
    const TileExtents e = extents_of(tile);
    return int64_t{1} * g.num_samples * g.groups * covers(g.pixels, e.pixels) * covers(g.K, e.channels);
  };
  if (splits > 1) {
    const bool flat = source == WeightSource::kPrivate && wide && g.pixels > SmallTile::kPixels;
    return flat ? TileKind::kFlat : TileKind::kSmall;
  }
  if (source == WeightSource::kPrivate) {
    constexpr int32_t kCostlyColumns = 128;
    const bool fills = blocks(TileKind::kTall) >= kFill || g.columns > kCostlyColumns;
    return wide && fills && g.pixels > SmallTile::kPixels ? TileKind::kTall : TileKind::kSmall;
  }
  const bool even = wide && 2 * covers(g.K, LargeTile::kChannels) == covers(g.K, TallTile::kChannels);
  const TileKind tile = even ? TileKind::kLarge : TileKind::kTall;
  return blocks(tile) >= kFill ? tile : TileKind::kSmall;
}

FpropPlan plan_fprop(const FpropParams& params, const ConvWeight& weight) {
  const ConvGeometry g = conv_geometry(params.shape);
  const int32_t bytes = element_bytes(params.dtype);
  FpropPlan plan = {};
  plan.source = weight.source;
  const int32_t unit = gather_unit(params.input, params.input_stride, params.shape, bytes);
  plan.splits = fprop_splits(params.shape, kRowBytes / bytes);
  plan.tile = choose_tile(g, weight.source, wide_gather(unit), plan.splits);
  const TileExtents tile = extents_of(plan.tile);
  const bool samples = weight.source != WeightSource::kGiven;
  const bool cooperates = weight.source == WeightSource::kCooperative;
  plan.steps = covers(g.columns, kRowBytes / bytes);
  plan.channel_tiles = covers(g.K, tile.channels);
  plan.pixel_tiles = covers(g.pixels, tile.pixels);
  if (weight.source == WeightSource::kPrivate && plan.pixel_tiles == 0) {
    plan.pixel_tiles = 1;  // the weight is sampled all the same
  }
  const int32_t images = g.num_samples * g.groups;
  plan.tiles = plan.splits * images * plan.pixel_tiles * plan.channel_tiles;
  plan.strips = covers(g.groups * g.K, tile.threads / kRowChunks);
  const int32_t draw_groups = covers(g.num_samples, kTaskDraws);
  plan.tasks = cooperates ? draw_groups * plan.steps * plan.strips : 0;
  plan.slots = cooperates ? plan.steps * plan.strips : samples ? g.groups * plan.channel_tiles * plan.splits : 0;
  plan.counters = cooperates ? draw_groups * plan.steps : 0;
  const int64_t tickets = split_tickets(plan.splits, images, g.pixels, g.K);
  plan.counters_bytes = samples || tickets > 0 ? round_up((plan.counters + 1 + tickets) * 4, 256) : 0;
  // Room for the shortest strips and the narrowest tiles: the size is a function of the shape, not
  // of the pointers' alignment, which has a say in the choice of the tile.
  constexpr int32_t kShortest = SmallTile::kThreads / kRowChunks;
  const int64_t slots = cooperates ? int64_t{plan.steps} * covers(g.groups * g.K, kShortest)
                        : samples  ? int64_t{g.groups} * covers(g.K, FlatTile::kChannels) * plan.splits
                                   : 0;
  plan.slots_bytes = round_up(slots * 8, 256);
  plan.slabs_bytes = cooperates ? int64_t{g.num_samples} * plan.steps * g.groups * g.K * kRowBytes : 0;
  plan.sums_bytes = split_slab_bytes(plan.splits, images, g.pixels, g.K);
  return plan;
}

OutputView output_view(const FpropParams& params) {
  const int32_t bytes = element_bytes(params.dtype);
  const int64_t K = params.shape.filters_per_group();
  const bool grouped = params.shape.groups > 1;
  OutputView view;
  view.data = params.output;
  view.pre_activation = params.pre_activation;
  view.stride = params.output_stride;
  view.bias = params.bias;
  view.activation = params.activation;
  view.activation_param = params.activation_param;
  view.pack = output_pack(params.output, params.output_stride, K, grouped, bytes);
  if (params.pre_activation != nullptr) {
    const int32_t pack = output_pack(params.pre_activation, params.output_stride, K, grouped, bytes);
    view.pack = pack < view.pack ? pack : view.pack;
  }
  return view;
}

FpropArgs make_args(const FpropParams& params, const ConvWeight& weight, const FpropPlan& plan,
                    unsigned char* workspace) {
  const int32_t bytes = element_bytes(params.dtype);
  FpropArgs args = {};
  args.conv = conv_geometry(params.shape);
  args.input = params.input;
  args.input_stride = params.input_stride;
  args.gather_unit = gather_unit(params.input, params.input_stride, params.shape, bytes);
  args.step = tap_of(kRowBytes / bytes, args.conv);
  args.output = output_view(params);
  args.steps = plan.steps;
  args.pixel_tiles = plan.pixel_tiles;
  args.channel_tiles = plan.channel_tiles;
  args.tiles = plan.tiles;
  unsigned char* slots = workspace + plan.counters_bytes;
  unsigned char* slabs = slots + plan.slots_bytes;
  uint32_t* counters = reinterpret_cast<uint32_t*>(workspace);
  args.sum = {reinterpret_cast<float*>(slabs + plan.slabs_bytes), counters + 1 + plan.counters, plan.splits};
  const int32_t filters = args.conv.groups * args.conv.K;
  if (weight.source == WeightSource::kGiven) {
    args.weights = given_weights(weight.given, filters, args.conv.columns, bytes);
    return args;
  }
  args.weights = slab_weights(slabs, filters, plan.steps);
  args.sampler = weight_sampler(weight, params.shape);
  args.slabs = {slabs, counters + 1, plan.steps, plan.strips, plan.tasks};
  args.kl = {params.kl, reinterpret_cast<double*>(slots), counters, plan.slots};
  args.kept = params.kept_weight;
  return args;
}

}  // namespace

size_t fprop_workspace(const FpropParams& params, const ConvWeight& weight) {
  const FpropPlan plan = plan_fprop(params, weight);
  return static_cast<size_t>(plan.counters_bytes + plan.slots_bytes + plan.slabs_bytes + plan.sums_bytes);
}

int fprop(const FpropParams& params, const ConvWeight& weight, void* workspace, StreamHandle stream) {
  const FpropPlan plan = plan_fprop(params, weight);
  const FpropArgs args = make_args(params, weight, plan, static_cast<unsigned char*>(workspace));
  if (plan.counters_bytes > 0) {
    const size_t bytes = static_cast<size_t>(plan.counters_bytes);
    if (const int status = gpu::fill_zero(workspace, bytes, stream)) return status;
  }
  switch (params.dtype) {
    case Dtype::kBFloat16: return launch_fprop<BFloat16>(args, plan, stream);
    case Dtype::kFloat16: return launch_fprop<Half>(args, plan, stream);
    default: return launch_fprop<float>(args, plan, stream);
  }
}

}  // namespace fbc::cuda
