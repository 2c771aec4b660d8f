// The kernels of csrc/cuda/sample.cu and normals.cu: samples, noise and scales bit for bit against
// the functions of csrc/core, the KL against float64; lists against their entries alone.
#include "cuda/normals.cu"
#include "cuda/sample.cu"
#include "posterior_subject.h"

namespace {

using namespace fbc;
using namespace fbc::cuda;
using namespace fbc::test;

template <typename T, typename Out>
SampleEntry<T> entry_for(Subject<T>& subject, Tensor<Out>* out, int64_t num_samples, T* kl) {
  SampleEntry<T> e = {};
  e.posterior = subject.params;
  e.seed = subject.params.rho != nullptr ? subject.seed.data() : nullptr;
  e.num_samples = num_samples;
  e.kl = kl;
  if (out != nullptr) {
    e.sample = out->data(), e.sample_stride = out->stride, e.sample_sample_stride = out->span;
  }
  e.sample_dtype = dtype_of<Out>();
  return e;
}

template <typename T>
int run_sample(const std::vector<SampleEntry<T>>& entries) {
  const int count = static_cast<int>(entries.size());
  Buffer<unsigned char> workspace =
      test::poisoned<unsigned char>(static_cast<int64_t>(sample_workspace(entries.data(), count)));
  return sample(entries.data(), count, workspace.data(), nullptr);
}

template <typename T, typename Out>
void check_sample(Suite& suite, Subject<T>& subject, Layout out_layout, int64_t num_samples, const std::string& name) {
  Tensor<Out> out(subject.shape, out_layout, num_samples), want(subject.shape, out_layout, num_samples);
  Buffer<T> kl = test::poisoned<T>(1);
  suite.launched("sample", run_sample<T>({entry_for(subject, &out, num_samples, kl.data())}));
  for (int64_t s = 0; s < num_samples; ++s)
    for (int64_t e = 0; e < subject.shape.elements(); ++e)
      want(e, s) = test::from_double<Out>(static_cast<double>(subject.weight(e, s)));
#if defined(__CUDACC__)  // exp and log of double are those of another library there
  constexpr bool kSameBits = sizeof(T) == 4;
#else
  constexpr bool kSameBits = true;
#endif
  if (kSameBits) {
    suite.same_bits(name + " sample", out.memory, want.memory);
  } else {
    suite.close(name + " sample", out.memory, want.memory, 1e-14, 1e-14);
  }
  suite.close(name + " kl", kl, std::vector<double>{subject.kl()}, sizeof(T) == 8 ? 1e-12 : 1e-6);
}

template <typename T, typename Out>
void sample_layouts(Suite& suite, const std::vector<Shape>& shapes) {
  int turn = 0;
  for (const Shape& shape : shapes)
    for (Layout layout : kLayouts)
      for (Layout out : {Layout::kKrsc, Layout::kKcrs, layout}) {
        const uint64_t offset =
            std::vector<uint64_t>{0, 4, 1, 0, 2, (uint64_t{1} << 34) + 3}[static_cast<size_t>(turn++ % 6)];
        const auto prior = static_cast<Prior>(turn % 3);
        Subject<T> subject(shape, layout, prior, offset, suite.random);
        check_sample<T, Out>(suite, subject, out, 1 + turn % 3,
                             "K" + std::to_string(shape.K) + " R" + std::to_string(shape.R) + " C" +
                                 std::to_string(shape.C) + " turn " + std::to_string(turn));
      }
}

template <typename T>
void check_same_list(Suite& suite, std::vector<std::unique_ptr<Subject<T>>>& subjects) {
  const size_t count = subjects.size();
  Buffer<T> together = test::poisoned<T>(static_cast<int64_t>(count)), alone = together;
  std::vector<Tensor<T>> first, second;
  std::vector<SampleEntry<T>> entries;
  first.reserve(count), second.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    first.emplace_back(subjects[i]->shape, Layout::kKrsc);
    second.emplace_back(subjects[i]->shape, Layout::kKrsc);
    entries.push_back(entry_for(*subjects[i], &first[i], 1, &together[i]));
  }
  suite.launched("list", run_sample(entries));
#if !defined(__CUDACC__)
  simt::settings().workers = 1;
  simt::settings().resident_blocks = 1;  // many chunks to a block
  const Buffer<T> before = together;
  poison(together);
  suite.launched("list in few blocks", run_sample(entries));
  suite.same_bits("kl in few blocks", together, before);
  simt::settings().resident_blocks = 0;
#endif
  for (size_t i = 0; i < count; ++i) {
    suite.launched("alone", run_sample<T>({entry_for(*subjects[i], &second[i], 1, &alone[i])}));
    suite.same_bits("sample " + std::to_string(i), first[i].memory, second[i].memory);
    suite.close("kl " + std::to_string(i), std::vector<T>{alone[i]}, std::vector<double>{subjects[i]->kl()},
                sizeof(T) == 8 ? 1e-12 : 1e-6);
  }
#if !defined(__CUDACC__)
  simt::settings().workers = 0;
#endif
  suite.same_bits("kl of a list and alone", together, alone);
}

void lists(Suite& suite) {
  for (int count : {2, 5, suite.quick ? 6 : kLargeTable + kSmallTable + 3}) {
    std::vector<std::unique_ptr<Subject<float>>> subjects;
    for (int i = 0; i < count; ++i) {
      const Shape shape = i == 1 ? Shape{73, 3, 3, 20} : Shape{1 + i % 5, 1 + i % 2, 3, 1 + i % 7};
      subjects.push_back(std::make_unique<Subject<float>>(shape, kLayouts[i % 4], static_cast<Prior>(i % 3),
                                                          static_cast<uint64_t>(i), suite.random));
      if (i % 6 == 5) subjects.back()->params.rho = nullptr;  // point mass
    }
    check_same_list(suite, subjects);
  }
}

void corners(Suite& suite) {
  Subject<float> subject({3, 2, 2, 4}, Layout::kKrsc, Prior::kNumbers, 0, suite.random);
  Buffer<float> kl = test::poisoned<float>(1);
  suite.launched("only kl", run_sample<float>({entry_for<float, float>(subject, nullptr, 1, kl.data())}));
  suite.close("only kl", kl, std::vector<double>{subject.kl()}, 1e-6);
  Tensor<BFloat16> out(subject.shape, Layout::kKcrs, 2), want = out;
  suite.launched("no kl", run_sample<float>({entry_for(subject, &out, 2, static_cast<float*>(nullptr))}));
  for (int64_t i = 0; i < 2 * subject.shape.elements(); ++i)
    want(i % subject.shape.elements(), i / subject.shape.elements()) =
        test::from_double<BFloat16>(subject.weight(i % subject.shape.elements(), i / subject.shape.elements()));
  suite.same_bits("no kl", out.memory, want.memory);
  Subject<float> empty({0, 3, 3, 4}, Layout::kKrsc, Prior::kNumbers, 0, suite.random);
  test::poison(kl);
  suite.launched("empty", run_sample<float>({entry_for<float, float>(empty, nullptr, 1, kl.data())}));
  suite.exact("kl of nothing", kl, std::vector<float>{0.0f});
  suite.expect(sample<float>(nullptr, 0, nullptr, nullptr) == 0, "no entries");
  subject.params.prior_scale_value = -1.0f;
  suite.launched("bad prior", run_sample<float>({entry_for<float, float>(subject, nullptr, 1, kl.data())}));
  suite.expect(std::isnan(kl[0]), "a prior scale that is not positive shows as NaN");
  SampleEntry<float> wrong = entry_for(subject, &out, 1, static_cast<float*>(nullptr));
  wrong.sample_dtype = Dtype::kFloat64;
  suite.expect(sample(&wrong, 1, nullptr, nullptr) != 0, "float64 samples of float32 are refused");
}

// ---- noise and scales -----------------------------------------------------------------------
void noise(Suite& suite) {
  Buffer<int64_t> seed = {static_cast<int64_t>(0x9E3779B97F4A7C15ull), -3};
  const NoiseKey key = {static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1]) + 5};
  for (int64_t first : {int64_t{0}, int64_t{3}, int64_t{1} << 34})
    for (int64_t count : {0, 1, 4, 5, 1023, 1030}) {
      Buffer<float> out = test::poisoned<float>(count), want = out;
      suite.launched("normals", normals(seed.data(), 5, Stream::kLocal, first, count, out.data(), nullptr));
      for (int64_t i = 0; i < count; ++i)
        want[static_cast<size_t>(i)] = standard_normal(key, Stream::kLocal, static_cast<uint64_t>(first + i));
      suite.same_bits("normals", out, want);
      out = test::poisoned<float>(count);
      suite.launched("signs", signs(seed.data(), 5, Stream::kSignInput, first, count, out.data(), nullptr));
      for (int64_t i = 0; i < count; ++i)
        want[static_cast<size_t>(i)] = random_sign(key, Stream::kSignInput, static_cast<uint64_t>(first + i));
      suite.same_bits("signs", out, want);
    }
  Buffer<int64_t> derived = test::poisoned<int64_t>(2 * 300), want = derived;
  suite.launched("derive", derive_seeds(seed.data(), 17, 300, derived.data(), nullptr));
  for (uint64_t i = 0; i < 300; ++i) {
    const PhiloxWords w = noise_words({key.key, key.offset - 5}, Stream::kDerive, 17 + i);
    want[2 * i] = static_cast<int64_t>(w.word[0] | static_cast<uint64_t>(w.word[1]) << 32);
    want[2 * i + 1] = static_cast<int64_t>(w.word[2] | static_cast<uint64_t>(w.word[3]) << 32);
  }
  suite.same_bits("derived seeds", derived, want);
  // The known answer of the authors' library for all words 0xffffffff.
  Buffer<int64_t> counter(4, 0xffffffff), words = test::poisoned<int64_t>(4);
  Buffer<int64_t> philox_key(2, 0xffffffff);
  suite.launched("philox", philox(counter.data(), philox_key.data(), 1, words.data(), nullptr));
  suite.exact("philox", words, std::vector<int64_t>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
}

void scales(Suite& suite) {
  for (const Shape& shape : shapes_for(suite.quick))
    for (Layout layout : kLayouts) {
      Subject<float> subject(shape, layout, Prior::kNumbers, 3, suite.random);
      Tensor<float> out(shape, Layout::kKrsc), want(shape, Layout::kKrsc);
      suite.launched("scale_of", scale_of(subject.params, out.data(), nullptr));
      for (int64_t e = 0; e < shape.elements(); ++e) {
        float t;
        want(e) = scale_from_rho(subject.rho(e), subject.params.scale_floor, &t);
      }
      suite.same_bits("scale_of", out.memory, want.memory);
    }
}

// Numbers too large for the tests of kernels: digits with and without the long division.
void digits(Suite& suite) {
#if !defined(__CUDACC__)
  for (const int64_t d3 : {1, 3, 7, 64, 2147483647}) {
    for (const int64_t number :
         {int64_t{0}, int64_t{1}, int64_t{12345678}, kNarrow - 1, kNarrow + 5, (int64_t{1} << 40) + 77}) {
      const int64_t outer = number / d3;
      if (outer / 15 >= kNarrow) continue;
      const Digits d = digits_of(make_radix(3, 5, d3, number < kNarrow), number);
      suite.expect(d.d3 == number % d3 && d.d2 == outer % 5 && d.d1 == outer / 5 % 3 && d.d0 == outer / 15,
                   "digits of %lld", static_cast<long long>(number));
    }
  }
#else
  suite.expect(true, "on the host only");
#endif
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  const std::vector<Shape> shapes = shapes_for(suite.quick);
  suite.group("samples, float32"), sample_layouts<float, float>(suite, shapes);
  suite.group("samples, bfloat16"), sample_layouts<float, BFloat16>(suite, shapes);
  suite.group("samples, float16"), sample_layouts<float, Half>(suite, shapes);
  suite.group("samples, float64"), sample_layouts<double, double>(suite, shapes);
  suite.group("lists and entries alone"), lists(suite);
  suite.group("corners"), corners(suite);
  suite.group("noise"), noise(suite);
  suite.group("scale_of"), scales(suite);
  suite.group("digits"), digits(suite);
  return suite.finish();
}
