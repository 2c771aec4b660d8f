// The matrix primitives and conversions of csrc/cuda/gpu.cuh against the tables of the PTX ISA:
// ldmatrix, and mma with fragments that are built here element by element.
#include "check.h"

using namespace fbc;
using test::Buffer;
using test::Suite;

namespace {

// Each lane
// stores what it got: out[lane][m] are the two elements of matrix m. Rows lie in any order.
template <bool kTransposed>
FBC_KERNEL(32, 1)
void load_matrices_kernel(const uint16_t* in, const int32_t* place, uint32_t* out) {
  unsigned char* memory = gpu::shared();
  const unsigned lane = threadIdx.x;
  unsigned char* row = memory + place[lane] * 16;
  for (unsigned j = 0; j < 8; ++j) reinterpret_cast<uint16_t*>(row)[j] = in[lane * 8 + j];
  gpu::sync_warp();
  uint32_t r[4];
  if (kTransposed) {
    gpu::load_matrices_transposed(r, row);
  } else {
    gpu::load_matrices(r, row);
  }
  for (unsigned m = 0; m < 4; ++m) out[lane * 4 + m] = r[m];
}
void test_load_matrices(Suite& suite) {
  suite.group("load_matrices");
  for (const bool transposed : {false, true}) {
    Buffer<uint16_t> in(256);
    for (auto& x : in) x = static_cast<uint16_t>(suite.random.next());
    Buffer<int32_t> place(32);
    for (int i = 0; i < 32; ++i) place[static_cast<size_t>(i)] = i * 7 % 32;
    auto got = test::poisoned<uint32_t>(128);
    auto want = got;
    for (size_t lane = 0; lane < 32; ++lane) {
      for (size_t m = 0; m < 4; ++m) {
        const size_t g = lane / 4, t = lane % 4;
        const auto element = [&](size_t i, size_t j) {
          return uint32_t{transposed ? in[(m * 8 + j) * 8 + i] : in[(m * 8 + i) * 8 + j]};
        };
        want[lane * 4 + m] = element(g, 2 * t) | element(g, 2 * t + 1) << 16;
      }
    }
    const auto kernel = transposed ? load_matrices_kernel<true> : load_matrices_kernel<false>;
    suite.launched("load_matrices", gpu::launch(kernel, 1, 32, 512, nullptr, in.data(), place.data(), got.data()));
    suite.exact(transposed ? "transposed" : "plain", got, want);
  }
}

// One product c += a * b with row-major a (16 x k), b (k x 8), c (16 x 8) in global memory; the
// fragments are built here element by element from the tables of the PTX ISA.
template <typename T>
FBC_DEVICE uint32_t pair_of(const T* p, int stride) {
  return p[0].bits | static_cast<uint32_t>(p[stride].bits) << 16;
}
template <typename T>
FBC_KERNEL(32, 1)
void mma_kernel(const T* a, const T* b, float* c) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  float acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8;
    if constexpr (sizeof(T) == 4) {
      fa[i] = gpu::to_tf32(a[row * 8 + t + i / 2 * 4]);
    } else {
      fa[i] = pair_of(a + row * 16 + 2 * t + i / 2 * 8, 1);
    }
  }
  for (int i = 0; i < 2; ++i) {
    if constexpr (sizeof(T) == 4) {
      fb[i] = gpu::to_tf32(b[(t + 4 * i) * 8 + g]);
    } else {
      fb[i] = pair_of(b + (2 * t + 8 * i) * 8 + g, 8);
    }
  }
  if constexpr (sizeof(T) == 4) {
    gpu::mma_tf32(acc, fa, fb[0], fb[1]);
  } else if constexpr (test::kUlp<T> == test::kUlp<BFloat16>) {
    gpu::mma_bfloat16(acc, fa, fb[0], fb[1]);
  } else {
    gpu::mma_float16(acc, fa, fb[0], fb[1]);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[i];
}
// tf32 as PTX defines cvt.rna: 10 bits of mantissa, to nearest, ties away from zero.
double tf32_of(double value) {
  int exponent;
  const double mantissa = std::frexp(value, &exponent);
  return std::ldexp(std::round(mantissa * 2048.0) / 2048.0, exponent);
}
template <typename T>
void test_mma(Suite& suite, const char* name, bool whole) {
  const size_t depth = sizeof(T) == 4 ? 8 : 16;
  auto a =
      whole ? test::integers<T>(16 * depth, -8, 8, suite.random) : test::uniforms<T>(16 * depth, -2, 2, suite.random);
  auto b =
      whole ? test::integers<T>(8 * depth, -8, 8, suite.random) : test::uniforms<T>(8 * depth, -2, 2, suite.random);
  auto c = whole ? test::integers<float>(128, -99, 99, suite.random) : test::uniforms<float>(128, -9, 9, suite.random);
  std::vector<double> want(128), bound(128);
  for (size_t m = 0; m < 16; ++m) {
    for (size_t n = 0; n < 8; ++n) {
      double sum = c[m * 8 + n], size = std::fabs(sum);
      for (size_t k = 0; k < depth; ++k) {
        double x = test::as_double(a[m * depth + k]), y = test::as_double(b[k * 8 + n]);
        if (sizeof(T) == 4) x = tf32_of(x), y = tf32_of(y);
        sum += x * y;
        size += std::fabs(x * y);
      }
      want[m * 8 + n] = sum;
      bound[m * 8 + n] = size;
    }
  }
  suite.launched(name, gpu::launch(mma_kernel<T>, 1, 32, 0, nullptr, a.data(), b.data(), c.data()));
  if (whole) {
    suite.exact(name, c, want);
  } else {  // at most one rounding or truncation per product
    suite.bounded(name, c, want, bound, 17 * 0x1p-23);
  }
}
void test_matrices(Suite& suite) {
  test_load_matrices(suite);
  suite.group("matrix products");
  for (int round = 0; round < (suite.quick ? 2 : 10); ++round) {
    for (const bool whole : {true, false}) {
      test_mma<BFloat16>(suite, "mma_bfloat16", whole);
      test_mma<Half>(suite, "mma_float16", whole);
      test_mma<float>(suite, "mma_tf32", whole);
    }
  }
}

FBC_KERNEL(32, 1) void convert_kernel(const float* in, uint32_t* out, int32_t count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32) {
    out[3 * i] = gpu::pack_bfloat16(in[i], in[count - 1 - i]);
    out[3 * i + 1] = gpu::pack_float16(in[i], in[count - 1 - i]);
    out[3 * i + 2] = gpu::to_tf32(in[i]);
  }
}
void test_conversions(Suite& suite) {
  suite.group("conversions");
  Buffer<float> in = test::uniforms<float>(500, -4, 4, suite.random);
  for (const float x : {0.0f, 1.0f, 1.00390625f, 1.01171875f, 1.00048828125f, 1.0009765625f + 0x1p-11f, 65519.0f,
                        65520.0f, 3e38f, 6e-8f, 1e-40f, HUGE_VALF}) {
    in.push_back(x);
    in.push_back(-x);
  }
  const size_t count = in.size();
  auto got = test::poisoned<uint32_t>(static_cast<int64_t>(3 * count));
  auto want = got;
  for (size_t i = 0; i < count; ++i) {
    const float low = in[i], high = in[count - 1 - i];
    const auto pair = [](auto x, auto y) { return x.bits | uint32_t{y.bits} << 16; };
    want[3 * i] = pair(test::from_double<BFloat16>(low), test::from_double<BFloat16>(high));
    want[3 * i + 1] = pair(test::from_double<Half>(low), test::from_double<Half>(high));
    want[3 * i + 2] =
        float_to_bits(std::isinf(low) ? low : static_cast<float>(std::fabs(low) < 1e-37 ? low : tf32_of(low)));
    if (std::fabs(low) < 1e-37) want[3 * i + 2] = (want[3 * i + 2] + 0x1000u) & 0xffffe000u;
  }
  suite.launched("convert",
                 gpu::launch(convert_kernel, 1, 32, 0, nullptr, in.data(), got.data(), static_cast<int32_t>(count)));
  suite.exact("pack and round", got, want);
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  test_matrices(suite);
  test_conversions(suite);
  return suite.finish();
}
