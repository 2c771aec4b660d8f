// Storage types against the definition of IEEE 754, for every pattern and every rounding boundary;
// the index maps of conv_shape.h by brute force.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../../csrc/core/conv_shape.h"
#include "../../csrc/core/types.h"
#include "harness.h"

using namespace fbc;
using harness::Random;

namespace {

// ---- storage
// --------------------------------------------------------------------------------------

struct Format {
  int exponent_bits, fraction_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t exponent_mask() const { return (1u << exponent_bits) - 1; }
};

// IEEE 754: the value of a 16-bit pattern.
double value_of(uint32_t pattern, Format format) {
  const int exponent = static_cast<int>((pattern >> format.fraction_bits) & format.exponent_mask());
  const double fraction = pattern & ((1u << format.fraction_bits) - 1);
  const double sign = pattern >> 15 ? -1.0 : 1.0;
  if (exponent == static_cast<int>(format.exponent_mask())) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  const double significand = exponent == 0 ? fraction : fraction + (1 << format.fraction_bits);
  return sign * std::ldexp(significand, std::max(exponent, 1) - format.bias() - format.fraction_bits);
}

// The nearest representable value, ties to even (the rounding mode of nearbyint), overflow to
// infinity.
double rounded(double x, Format format) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), 1 - format.bias());
  const double unit = std::ldexp(1.0, exponent - format.fraction_bits);
  const double y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) < std::ldexp(1.0, format.bias() + 1) ? y : std::copysign(HUGE_VAL, x);
}

template <typename T>
double stored(float x) {
  T cell;
  store_from_acc(&cell, x);
  return load_as_acc(&cell);
}

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

template <typename T>
void test_storage(Format format, Random& random) {
  bool loads = true, round_trips = true, ties = true, any = true;
  const uint32_t infinity = format.exponent_mask() << format.fraction_bits;
  for (uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const T cell = {static_cast<uint16_t>(pattern)};
    const double value = value_of(pattern, format);
    loads = loads && same(load_as_acc(&cell), value);
    T back;
    store_from_acc(&back, load_as_acc(&cell));
    const bool is_nan = std::isnan(value);
    round_trips = round_trips && (is_nan ? std::isnan(load_as_acc(&back)) : back.bits == pattern);
    if ((pattern & 0x7fffu) >= infinity) continue;
    // Halfway to the next pattern (in magnitude), and the floats on both sides of it.
    const double next = (pattern & 0x7fffu) + 1 == infinity ? std::copysign(std::ldexp(1.0, format.bias() + 1), value)
                                                            : value_of(pattern + 1, format);
    const float tie = static_cast<float>(0.5 * (value + next));
    for (const float x : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 2 * tie)}) {
      ties = ties && same(stored<T>(x), rounded(x, format));
    }
  }
  for (int i = 0; i < 400000; ++i) {
    const float x = bits_to_float(static_cast<uint32_t>(random.next()));
    any = any && same(stored<T>(x), rounded(x, format));
  }
  CHECK(loads), CHECK(round_trips), CHECK(ties), CHECK(any);
  CHECK(std::isnan(stored<T>(bits_to_float(0x7f800001u))) && "a NaN with low bits only");
  CHECK(std::isnan(stored<T>(bits_to_float(0xffffffffu))) && "a NaN that rounding would carry over");
  CHECK(stored<T>(std::numeric_limits<float>::max()) == HUGE_VAL);
  CHECK(same(stored<T>(-0.0f), -0.0));
}

// ---- index maps
// -----------------------------------------------------------------------------------

void test_output_extent() {
  bool right = true;
  for (int64_t extent = 0; extent <= 12; ++extent)
    for (int64_t before = 0; before <= 2; ++before)
      for (int64_t after = 0; after <= 2; ++after)
        for (int64_t filter = 1; filter <= 5; ++filter)
          for (int64_t stride = 1; stride <= 4; ++stride)
            for (int64_t dilation = 1; dilation <= 3; ++dilation) {
              // Outputs are at 0, stride, 2 stride, ... as far as the filter ends inside.
              const int64_t room = extent + before + after - ((filter - 1) * dilation + 1);
              int64_t outputs = -100;
              while (outputs * stride <= room) ++outputs;
              right = right && output_extent(extent, before, after, filter, stride, dilation) == outputs;
            }
  CHECK(right);
}

void test_same_padding() {
  struct Row {
    int64_t n, k, s, d, out, before, after;
  };
  const Row table[] = {{7, 3, 2, 1, 4, 1, 1}, {8, 3, 2, 1, 4, 0, 1},  {7, 2, 1, 1, 7, 0, 1},   {8, 3, 3, 1, 3, 0, 1},
                       {7, 2, 3, 1, 3, 0, 1}, {10, 1, 3, 1, 4, 0, 0}, {10, 2, 1, 3, 10, 1, 2}, {1, 5, 2, 1, 1, 2, 2}};
  for (const Row& r : table) {
    const SamePadding p = same_padding(r.n, r.k, r.s, r.d);
    CHECK(p.before == r.before && p.after == r.after);
    CHECK(output_extent(r.n, p.before, p.after, r.k, r.s, r.d) == r.out);
  }
  bool right = true;
  for (int64_t n = 1; n <= 20; ++n)
    for (int64_t k = 1; k <= 6; ++k)
      for (int64_t s = 1; s <= 5; ++s)
        for (int64_t d = 1; d <= 3; ++d) {
          const SamePadding p = same_padding(n, k, s, d);
          const int64_t outputs = output_extent(n, p.before, p.after, k, s, d);
          right = right && outputs == (n + s - 1) / s && p.before >= 0;
          right = right && (p.after == p.before || p.after == p.before + 1);
          // No zero more than is needed.
          right = right && (p.after == 0 || output_extent(n, p.before, p.after - 1, k, s, d) < outputs);
        }
  CHECK(right);
}

void test_valid_range() {
  bool right = true;
  for (int64_t count = 0; count <= 7; ++count)
    for (int64_t step = 1; step <= 4; ++step)
      for (int64_t start = -15; start <= 15; ++start)
        for (int64_t extent = 0; extent <= 9; ++extent) {
          const IndexRange range = valid_range(count, step, start, extent);
          right = right && 0 <= range.begin && range.begin <= range.end && range.end <= count;
          for (int64_t i = 0; i < count; ++i) {
            const bool inside = i * step + start >= 0 && i * step + start < extent;
            right = right && inside == (i >= range.begin && i < range.end);
          }
        }
  CHECK(right);
}

}  // namespace

int main() {
  Random random(3);
  test_storage<BFloat16>({8, 7}, random);
  test_storage<Half>({5, 10}, random);
  test_output_extent();
  test_same_padding();
  test_valid_range();
  return harness::report("storage");
}
