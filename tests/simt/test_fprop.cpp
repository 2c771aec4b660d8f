// fprop() on the interpreter: whole numbers compared for equality, sampled weights replayed, and
// the three sources of weights against one another, bit by bit.
#include "cuda/fprop.cu"
#include "cuda/fprop_bfloat16.cu"
#include "cuda/fprop_float16.cu"
#include "cuda/fprop_float32.cu"

#include "conv_reference.h"

namespace {

using fbc::cuda::WeightSource;
using fbc::test::Forward;
using fbc::test::ForwardLayout;
using fbc::test::GradientCase;
using fbc::test::Suite;
using std::string;

constexpr WeightSource kSources[] = {WeightSource::kGiven, WeightSource::kCooperative, WeightSource::kPrivate};
const char* name_of(WeightSource source) {
  return source == WeightSource::kGiven ? "given" : source == WeightSource::kCooperative ? "cooperative" : "private";
}

// Beside the shapes of the gradients: sizes around this kernel's tiles and steps.
std::vector<GradientCase> forward_cases() {
  std::vector<GradientCase> cases = fbc::test::gradient_cases();
  const std::vector<GradientCase> more = {
      {"63 pixels, 63 filters", 7, 8, 3, 3, 63, 1, 1},
      {"65 pixels, 65 filters", 5, 8, 13, 1, 65, 1, 1},
      {"columns 31", 1, 31, 4, 4, 8, 1, 1},
      {"columns 32", 1, 32, 4, 4, 8, 1, 1},
      {"columns 33", 1, 33, 4, 4, 8, 1, 1},
      {"columns 108, 4 channels", 2, 12, 5, 4, 9, 3, 3, 1, 1, 1, 1, 1, 1},
      {"2 channels", 2, 2, 5, 4, 9, 3, 3, 1, 1, 1, 1, 1, 1},
      {"4 channels, stride 2", 2, 4, 7, 6, 12, 3, 3, 2, 2, 1, 1, 1, 1},
      {"257 pixels", 1, 16, 257, 1, 20, 3, 3, 1, 1, 1, 1, 1, 1},
      {"5 draws of 70 pixels", 5, 16, 7, 10, 70, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5},
      {"9 draws share", 1, 8, 4, 4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 9, true},
      {"no pixels", 1, 8, 2, 2, 8, 3, 3},
      {"no rows", 0, 8, 4, 4, 8, 3, 3},
  };
  cases.insert(cases.end(), more.begin(), more.end());
  return cases;
}
// These fill a GPU, or have a tile's worth of pixels for each private sample: the tile is checked.
using fbc::cuda::TileKind;
struct TileCase {
  GradientCase shape;
  TileKind stored, sampled;
};
std::vector<TileCase> tile_cases() {
  const TileKind large = TileKind::kLarge, tall = TileKind::kTall, small = TileKind::kSmall;
  return {
      {{"128 x 128 tiles", 1, 8, 13, 10, 100, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 60, true}, large, tall},
      {{"256 x 64 tiles", 1, 8, 13, 20, 33, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 60, true}, tall, tall},
      {{"narrow c3", 1, 3, 13, 10, 70, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 60, true}, tall, small},
      {{"narrow c5", 1, 5, 13, 20, 33, 3, 2, 1, 1, 1, 1, 0, 1, 1, 1, 1, 60, true}, tall, small},
      {{"5 steps", 120, 32, 4, 4, 128, 5, 1, 1, 1, 2, 2, 0, 0, 1, 1, 1, 120}, large, small},
  };
}

// Few tiles of many steps: 32 columns of a 16-bit type each, 16 of float.
struct SplitCase {
  GradientCase shape;
  int32_t splits, of_float;
  TileKind sampled;
};
std::vector<SplitCase> split_cases() {
  const TileKind flat = TileKind::kFlat, small = TileKind::kSmall;
  return {
      {{"18 steps, 32 pixels", 2, 64, 4, 4, 40, 3, 3, 1, 1, 1, 1, 1, 1}, 2, 4, small},
      {{"27 steps, 80 pixels", 5, 96, 4, 4, 72, 3, 3, 1, 1, 1, 1, 1, 1}, 3, 6, flat},
      {{"19 steps, narrow", 3, 67, 5, 5, 33, 3, 3, 1, 1, 1, 1, 1, 1}, 2, 4, small},
      {{"33 steps, 4 pixels", 1, 1032, 2, 2, 17, 1, 1}, 4, 8, small},
      {{"128 steps, 2 pixels", 2, 4096, 1, 1, 5, 1, 1}, 16, 22, small},
      {{"129 pixels", 43, 512, 3, 1, 33, 1, 1}, 2, 4, flat},
      {{"2 groups, 2 draws", 4, 128, 3, 3, 66, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2}, 2, 4, small},
      {{"6 draws share", 1, 72, 3, 3, 20, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 6, true}, 2, 5, small},
      {{"a draw per example", 3, 64, 9, 9, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3}, 2, 4, flat},
      {{"15 steps: one split", 2, 480, 3, 3, 16, 1, 1}, 1, 3, small},
  };
}

template <typename T>
void check_exact(Suite& suite, const GradientCase& c) {
  ForwardLayout layout;
  layout.kept = true;
  Forward<T> forward(c, layout, true, suite.random);
  for (const WeightSource source : kSources) {
    const string what = string(c.name) + ", " + name_of(source);
    if (!suite.launched(what.c_str(), forward.run(source))) continue;
    // Whole numbers above 256 are not all bfloat16: the exact sum is rounded once.
    std::vector<T> want;
    for (const double z : forward.want) want.push_back(fbc::test::from_double<T>(z));
    suite.exact(what, forward.output.values(), want);
    if (source == WeightSource::kGiven) continue;
    suite.same_bits(what + ", kept", forward.kept, forward.given);
    suite.expect(forward.kl[0] == 0.0f, "%s: KL of a point mass %g", what.c_str(), double{forward.kl[0]});
  }
}

// Absolute error allowed: of the float32 sums, and of one rounding to T.
template <typename T>
std::vector<double> tolerance(const Forward<T>& forward) {
  const double columns = static_cast<double>(forward.shape.R * forward.shape.S * forward.shape.channels_per_group());
  std::vector<double> allowed;
  for (size_t i = 0; i < forward.want.size(); ++i) {
    allowed.push_back(forward.bound[i] * (columns + 2) * 0x1p-24 + std::fabs(forward.want[i]) * fbc::test::kUlp<T> +
                      0x1p-24);
  }
  return allowed;
}

template <typename T>
void check_replayed(Suite& suite, const GradientCase& c, const ForwardLayout& layout) {
  Forward<T> forward(c, layout, false, suite.random);
  const std::vector<double> allowed = tolerance(forward);
  fbc::test::Buffer<T> first;
  for (const WeightSource source : kSources) {
    const string what = string(c.name) + ", " + name_of(source);
    if (!suite.launched(what.c_str(), forward.run(source))) continue;
    suite.bounded(what, forward.output.values(), forward.want, allowed, 1.0);
    if (source == WeightSource::kGiven) {
      first = forward.output.memory;
      continue;
    }
    suite.same_bits(what + ", against given", forward.output.memory, first);
    suite.same_bits(what + ", kept", forward.kept, forward.given);
    const double got = double{forward.kl[0]}, want = forward.want_kl();
    suite.expect(std::fabs(got - want) <= 4e-6 * std::fabs(want), "%s: KL %.9g, want %.9g", what.c_str(), got, want);
  }
}

template <typename T>
void check_all(Suite& suite, const char* type) {
  const std::vector<GradientCase> cases = forward_cases();
  const size_t step = suite.quick ? 5 : 1;
  suite.group(string("whole numbers, ") + type);
  for (size_t i = 0; i < cases.size(); i += step) check_exact<T>(suite, cases[i]);
  suite.group(string("replayed, ") + type);
  ForwardLayout layout;
  layout.kept = true;
  for (size_t i = 0; i < cases.size(); i += step) check_replayed<T>(suite, cases[i], layout);
}

template <typename T>
void check_tile(Suite& suite, const TileCase& c) {
  ForwardLayout layout;
  layout.kept = true;
  check_replayed<T>(suite, c.shape, layout);
  Forward<T> forward(c.shape, layout, true, suite.random);
  for (const WeightSource source : kSources) {
    forward.weight.source = source;
    const TileKind got = fbc::cuda::plan_fprop(forward.params, forward.weight).tile;
    const TileKind want = source == WeightSource::kPrivate ? c.sampled : c.stored;
    suite.expect(got == want, "%s, %s: tile %d, want %d", c.shape.name, name_of(source), static_cast<int>(got),
                 static_cast<int>(want));
  }
}

template <typename T>
void check_split(Suite& suite, const SplitCase& c) {
  check_exact<T>(suite, c.shape);
  ForwardLayout layout;
  layout.kept = true;
  check_replayed<T>(suite, c.shape, layout);
  Forward<T> forward(c.shape, layout, true, suite.random);
  const int32_t want = sizeof(T) == 4 ? c.of_float : c.splits;
  for (const WeightSource source : kSources) {
    forward.weight.source = source;
    const fbc::cuda::FpropPlan plan = fbc::cuda::plan_fprop(forward.params, forward.weight);
    suite.expect(plan.splits == want, "%s, %s: %d splits, want %d", c.shape.name, name_of(source), plan.splits, want);
    const bool tile_matters = source == WeightSource::kPrivate && want > 1;
    suite.expect(!tile_matters || plan.tile == c.sampled, "%s: tile %d, want %d", c.shape.name,
                 static_cast<int>(plan.tile), static_cast<int>(c.sampled));
    const size_t bytes = fbc::cuda::fprop_workspace(forward.params, forward.weight);
    suite.expect(want > 1 || source != WeightSource::kGiven || bytes == 0, "%s: %zu bytes of workspace", c.shape.name,
                 bytes);
    fbc::cuda::FpropParams off = forward.params;
    off.input = static_cast<const T*>(off.input) + 1;
    suite.expect(fbc::cuda::fprop_workspace(off, forward.weight) == bytes, "%s: the workspace depends on the alignment",
                 c.shape.name);
  }
}

// A workspace serves again as the launch before has left it: a captured graph does that.
template <typename T>
void check_again(Suite& suite, const GradientCase& c) {
  Forward<T> forward(c, {}, false, suite.random);
  for (const WeightSource source : kSources) {
    if (!suite.launched(c.name, forward.run(source))) continue;
    const fbc::test::Buffer<T> first = forward.output.memory;
    const auto bytes = fbc::cuda::fprop_workspace(forward.params, forward.weight);
    auto workspace = fbc::test::poisoned<unsigned char>(static_cast<int64_t>(bytes));
    for (int i = 0; i < 2; ++i) {
      fbc::test::poison(forward.output.memory);
      suite.launched(c.name, fbc::cuda::fprop(forward.params, forward.weight, workspace.data(), nullptr));
      suite.same_bits(string(c.name) + ", again, " + name_of(source), forward.output.memory, first);
    }
  }
}

// Every step belongs to one split, in order, and none is much longer than another.
void check_ranges(Suite& suite) {
  suite.group("ranges of steps");
  for (int32_t steps = 1; steps < 200; steps += 7) {
    for (int32_t splits = 1; splits <= 20; ++splits) {
      int32_t end = 0;
      for (int32_t i = 0; i < splits; ++i) {
        const fbc::cuda::StepRange range = fbc::cuda::split_range(steps, splits, i);
        const int32_t count = range.end - range.begin;
        suite.expect(range.begin == end && count >= steps / splits && count <= steps / splits + 1,
                     "%d steps, split %d of %d: [%d, %d)", steps, i, splits, range.begin, range.end);
        end = range.end;
      }
      suite.expect(end == steps, "%d steps, %d splits end at %d", steps, splits, end);
    }
  }
  for (const int64_t tiles : {0, 1, 8, 66, 67, 200}) {
    for (const int64_t steps : {1, 15, 16, 144, 784}) {
      const int64_t splits = fbc::cuda::split_count(tiles, steps);
      suite.expect(splits >= 1 && (splits == 1 || (splits * tiles <= 132 && splits * 8 <= steps)),
                   "%d tiles of %d steps: %d splits", static_cast<int>(tiles), static_cast<int>(steps),
                   static_cast<int>(splits));
    }
  }
}

// However many blocks are resident, the result has the same bits.
template <typename T>
void check_residency(Suite& suite, const GradientCase& c) {
  ForwardLayout layout;
  layout.kept = true;
  Forward<T> forward(c, layout, false, suite.random);
  fbc::test::Buffer<T> output, kept;
  fbc::test::Buffer<float> kl;
  for (const int blocks : {6, 1, 2, 7}) {
#if !defined(__CUDACC__)
    fbc::simt::settings().resident_blocks = blocks;
#endif
    const string what = string(c.name) + ", " + std::to_string(blocks) + " blocks";
    if (!suite.launched(what.c_str(), forward.run(WeightSource::kCooperative))) continue;
    if (output.empty()) output = forward.output.memory, kept = forward.kept, kl = forward.kl;
    suite.same_bits(what, forward.output.memory, output);
    suite.same_bits(what + ", kept", forward.kept, kept);
    suite.same_bits(what + ", KL", forward.kl, kl);
  }
#if !defined(__CUDACC__)
  fbc::simt::settings().resident_blocks = 6;
#endif
}

// A block may come to earlier weights after later ones, of the next draw: it waits for them too. So
// few tasks that only a slow block's delay shows it, hence many schedules.
template <typename T>
void check_schedules(Suite& suite, const GradientCase& c) {
#if !defined(__CUDACC__)
  auto& settings = fbc::simt::settings();
  const uint32_t seed = settings.seed;
  Forward<T> forward(c, {}, false, suite.random);
  fbc::test::Buffer<T> first;
  settings.resident_blocks = 10;
  for (uint32_t i = 0; i < 16; ++i) {
    settings.seed = 16 * seed + i;
    if (!suite.launched(c.name, forward.run(WeightSource::kCooperative))) continue;
    if (first.empty()) first = forward.output.memory;
    suite.same_bits(string(c.name) + ", schedule " + std::to_string(settings.seed), forward.output.memory, first);
  }
  settings.seed = seed;
  settings.resident_blocks = 6;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_all<fbc::BFloat16>(suite, "bfloat16");
  check_all<fbc::Half>(suite, "float16");
  check_all<float>(suite, "tf32");
  suite.group("large tiles");
  const std::vector<TileCase> tiles = tile_cases();
  for (size_t i = 0; i < tiles.size(); ++i) {
    if (!suite.quick || i == 0) check_tile<fbc::BFloat16>(suite, tiles[i]);
    if (!suite.quick && i < 2) check_tile<float>(suite, tiles[i]);
  }
  suite.group("steps split among blocks");
  const std::vector<SplitCase> splits = split_cases();
  for (size_t i = 0; i < splits.size(); i += suite.quick ? 3 : 1) {
    check_split<fbc::BFloat16>(suite, splits[i]);
    if (!suite.quick) check_split<fbc::Half>(suite, splits[i]);
    // Another order of a sum shows itself in float only.
    if (!suite.quick || i == 3) check_split<float>(suite, splits[i]);
  }
  check_again<fbc::BFloat16>(suite, splits[0].shape);
  check_ranges(suite);
  suite.group("number of resident blocks");
  check_residency<fbc::BFloat16>(suite, splits[6].shape);
  if (!suite.quick) {
    check_residency<float>(suite, splits[7].shape);
    const int64_t draws = 4;
    check_schedules<float>(suite, {"70 pixels", 1, 64, 7, 10, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, draws, true});
  }
  check_residency<fbc::BFloat16>(suite, {"72 filters", 2, 24, 7, 6, 72, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2});
  check_residency<float>(suite, {"5 draws", 1, 8, 9, 8, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5, true});
  return suite.finish();
}
