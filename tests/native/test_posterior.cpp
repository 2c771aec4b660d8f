// Noise, sampling, KL and their backward against the scalar definitions of csrc/core and against double
// precision; every instruction set must give the same bits. Exact-size buffers: a sanitizer sees any
// read or write outside.
#include <cmath>
#include <cstring>

#include "../../csrc/core/posterior.h"
#include "harness.h"

using namespace fbc;
using harness::Random;

namespace {

void test_known_answers() {
  struct Vector {
    uint32_t counter[4], key[2], want[4];
  };
  const Vector vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Vector& v : vectors) {
    PhiloxWords counter;
    std::memcpy(counter.word, v.counter, sizeof counter.word);
    const PhiloxWords got = philox4x32_10(counter, v.key[0], v.key[1]);
    CHECK(std::memcmp(got.word, v.want, sizeof got.word) == 0);
  }
}

bool same_bits(float a, float b) { return float_to_bits(a) == float_to_bits(b); }

// Every fast path equals the one-element definition, also where the counter carries into its high word.
void test_normals(Random& random) {
  std::vector<uint64_t> starts = {0, 1, 3, 61, 4095, (1ull << 61) - 100, (1ull << 62) - 100, ~0ull - 99};
  // The last counter of a group on either side of where the upper half of its number changes.
  for (uint64_t d = 0; d <= 40; ++d) starts.push_back((1ull << 34) - 4 * d);
  for (uint64_t first : starts) {
    const NoiseKey noise = {random.next(), random.next()};
    const Stream stream = static_cast<Stream>(random.below(16));
    const int64_t count = random.between(1, 700);
    std::vector<float> got(static_cast<size_t>(count));
    noise_kernels().normals(noise, stream, first, count, got.data());
    bool same = true;
    for (int64_t i = 0; i < count; ++i) {
      same = same &&
             same_bits(got[static_cast<size_t>(i)], standard_normal(noise, stream, first + static_cast<uint64_t>(i)));
    }
    CHECK(same && "normals equal their definition");
    noise_kernels().signs(noise, stream, first, count, got.data());
    same = true;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t element = first + static_cast<uint64_t>(i);
      const uint32_t word = noise_words(noise, stream, element / 4).word[element % 4];
      same = same && got[static_cast<size_t>(i)] == ((word & 1u) != 0 ? -1.0f : 1.0f) &&
             got[static_cast<size_t>(i)] == random_sign(noise, stream, element);
    }
    CHECK(same && "signs equal their definition");
  }
}

template <typename T>
struct Fixture {
  int64_t K, R, S, C;
  std::vector<T> loc, rho, prior_loc, prior_scale;
  PosteriorParams<T> params;

  // layout 0: KRSC, 1: KCRS, 2: CRSK
  WeightStrides strides(int layout) const {
    if (layout == 0) return {R * S * C, S * C, C, 1};
    if (layout == 1) return {C * R * S, S, 1, R * S};
    return {1, S * K, K, R * S * K};
  }
  int64_t elements() const { return K * R * S * C; }

  Fixture(Random& random, bool prior_tensors) {
    K = random.between(1, 5), R = random.between(1, 3), S = random.between(1, 4), C = random.between(1, 90);
    const auto fill = [&](std::vector<T>& v, double low, double high) {
      v.resize(static_cast<size_t>(elements()));
      for (T& x : v) x = static_cast<T>(low + (high - low) * random.uniform());
    };
    fill(loc, -1, 1);
    fill(rho, random.below(3) == 0 ? -200 : -6, random.below(3) == 0 ? 200 : 1);
    fill(prior_loc, -0.5, 0.5);
    fill(prior_scale, 0.1, 2);
    params = {};
    params.K = K, params.R = R, params.S = S, params.C = C;
    params.loc = loc.data(), params.rho = rho.data();
    params.loc_stride = strides(static_cast<int>(random.below(3)));
    params.rho_stride = strides(static_cast<int>(random.below(3)));
    params.prior_loc_value = T(0.25), params.prior_scale_value = T(random.below(3) == 0 ? 1e4 : 0.5);
    if (prior_tensors) {
      params.prior_loc = prior_loc.data();
      params.prior_scale = prior_scale.data();
      params.prior_loc_stride = strides(static_cast<int>(random.below(3)));
      params.prior_scale_stride = {1, 0, 0, 0};  // one per filter
    }
    params.scale_floor = T(1.1920929e-07);
    params.noise = {random.next(), random.next()};
    params.element_offset = static_cast<uint64_t>(random.below(9));
  }
  T at(const T* data, WeightStrides s, int64_t k, int64_t r, int64_t t, int64_t c) const {
    return data[k * s.k + r * s.r + t * s.s + c * s.c];
  }
};

double exact_kl(double loc, double scale, double prior_loc, double prior_scale) {
  const double d = (loc - prior_loc) / prior_scale, l = std::log(scale / prior_scale);
  return 0.5 * d * d + 0.5 * std::expm1(2 * l) - l;
}

double exact_scale(double rho, double floor) {
  return floor + (rho > 0 ? rho + std::log1p(std::exp(-rho)) : std::log1p(std::exp(rho)));
}

template <typename T>
void test_posterior(Random& random, bool prior_tensors, std::vector<double>* bits) {
  Fixture<T> f(random, prior_tensors);
  const KernelTable<T>& table = kernels<T>();
  const int64_t samples = random.between(1, 3);
  const int layout = static_cast<int>(random.below(3));
  std::vector<T> weight(static_cast<size_t>(f.elements()));
  std::vector<double> partials(static_cast<size_t>(f.K * kl_chunks_per_row(f.params)), -1.0);
  const WeightOut out = {weight.data(), sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32, f.strides(layout)};
  for (int64_t k = 0; k < f.K; ++k) table.sample(f.params, 2, k, k + 1, out, partials.data());
  const double kl = sum_kl_partials(partials.data(), static_cast<int64_t>(partials.size()));
  std::vector<double> alone(partials.size());
  table.kl(f.params, 0, f.K, alone.data());
  CHECK(alone == partials);

  std::vector<T> grad(static_cast<size_t>(samples * f.elements()));
  for (T& g : grad) g = static_cast<T>(random.uniform() - 0.5);
  std::vector<T> grad_loc(weight.size()), grad_rho(weight.size()), by_prior(weight.size());
  PosteriorGrads<T> g = {};
  g.grad_weight = grad.data(), g.grad_weight_stride = f.strides(static_cast<int>(random.below(3)));
  g.grad_weight_sample_stride = f.elements(), g.num_samples = samples, g.grad_kl = T(0.3);
  g.grad_loc = grad_loc.data(), g.grad_loc_stride = f.strides(static_cast<int>(random.below(3)));
  g.grad_rho = grad_rho.data(), g.grad_rho_stride = f.strides(static_cast<int>(random.below(3)));
  g.grad_prior_loc = by_prior.data(), g.grad_prior_loc_stride = f.strides(0);
  table.posterior_backward(f.params, g, 0, f.K);

  double want_kl = 0, worst = 0, worst_grad = 0;
  for (int64_t k = 0; k < f.K; ++k)
    for (int64_t r = 0; r < f.R; ++r)
      for (int64_t t = 0; t < f.S; ++t)
        for (int64_t c = 0; c < f.C; ++c) {
          const PosteriorParams<T>& p = f.params;
          const uint64_t element = p.element_offset + static_cast<uint64_t>(((k * f.R + r) * f.S + t) * f.C + c);
          const double loc = f.at(p.loc, p.loc_stride, k, r, t, c);
          const double rho = f.at(p.rho, p.rho_stride, k, r, t, c);
          const double prior_loc = prior_tensors ? f.at(p.prior_loc, p.prior_loc_stride, k, r, t, c) : 0.25;
          const double prior_scale = prior_tensors ? f.prior_scale[static_cast<size_t>(k)] : p.prior_scale_value;
          const double scale = exact_scale(rho, p.scale_floor);
          const double want = loc + scale * standard_normal({p.noise.key, p.noise.offset + 2}, p.stream, element);
          const double got = f.at(weight.data(), out.stride, k, r, t, c);
          worst = std::fmax(worst, std::fabs(got - want) / (1 + std::fabs(want)));
          want_kl += exact_kl(loc, scale, prior_loc, prior_scale);
          double by_loc = 0, by_scale = 0;
          for (int64_t s = 0; s < samples; ++s) {
            const double gs = f.at(grad.data() + s * f.elements(), g.grad_weight_stride, k, r, t, c);
            by_loc += gs;
            by_scale +=
                gs * standard_normal({p.noise.key, p.noise.offset + static_cast<uint64_t>(s)}, p.stream, element);
          }
          const double inverse = 1 / (prior_scale * prior_scale);
          by_loc += 0.3 * (loc - prior_loc) * inverse;
          by_scale += 0.3 * (scale * inverse - 1 / scale);
          const double by_rho = by_scale / (1 + std::exp(-rho));
          const double got_loc = f.at(grad_loc.data(), g.grad_loc_stride, k, r, t, c);
          const double got_rho = f.at(grad_rho.data(), g.grad_rho_stride, k, r, t, c);
          worst_grad = std::fmax(worst_grad, std::fabs(got_loc - by_loc) / (1 + std::fabs(by_loc)));
          worst_grad = std::fmax(worst_grad, std::fabs(got_rho - by_rho) / (1 + std::fabs(by_rho)));
          const double got_prior = f.at(by_prior.data(), f.strides(0), k, r, t, c);
          worst_grad = std::fmax(worst_grad, std::fabs(got_prior + 0.3 * (loc - prior_loc) * inverse));
          if (bits != nullptr) {
            bits->push_back(got), bits->push_back(got_loc), bits->push_back(got_rho);
          }
        }
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 4e-6;
  CHECK(worst < tolerance);
  CHECK(worst_grad < tolerance);
  CHECK(std::fabs(kl - want_kl) <= 1e-6 * want_kl);
  if (bits != nullptr) bits->push_back(kl);
}

}  // namespace

int main() {
  test_known_answers();
  std::vector<double> first;
  for (int32_t isa = 0; isa <= static_cast<int32_t>(detected_isa()); ++isa) {
    limit_isa(static_cast<Isa>(isa));
    Random random(5);
    test_normals(random);
    std::vector<double> bits;
    for (int i = 0; i < 60; ++i) {
      test_posterior<float>(random, i % 2 == 0, &bits);
      test_posterior<double>(random, i % 2 == 0, nullptr);
    }
    if (isa == 0) first = bits;
    CHECK(bits == first && "every instruction set gives the same bits");
  }
  return harness::report("posterior");
}
