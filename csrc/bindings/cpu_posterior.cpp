// sample_posterior, kl_normal, standard_normal and philox4x32_10 under the CPU key; the list of
// posteriors is in cpu_posterior_list.cpp.
#include <ATen/ops/zeros.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

#include "../core/philox.h"
#include "posterior_call.h"
#include "posterior_pass.h"

namespace fbc {

namespace {

// The KL is a plain sum in a fixed order, and so is the gradient of a scalar prior: rows in
// parallel, their sums in order. at::sum would choose its order by the number of threads.
template <typename T>
double sum_in_fixed_order(const at::Tensor& full) {
  const at::Tensor rows = full.contiguous().reshape({full.dim() == 0 ? 1 : full.size(0), -1});
  std::vector<double> partial(static_cast<size_t>(rows.size(0)));
  const T* data = rows.const_data_ptr<T>();
  const int64_t width = rows.size(1);
  at::parallel_for(0, rows.size(0), std::max<int64_t>(1, 8192 / std::max<int64_t>(1, width)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t k = begin; k < end; ++k) {
                       double sum = 0.0;
                       for (int64_t i = 0; i < width; ++i) sum += data[k * width + i];
                       partial[static_cast<size_t>(k)] = sum;
                     }
                   });
  return sum_kl_partials(partial.data(), rows.size(0));
}

}  // namespace

at::Tensor reduce_to_prior(const at::Tensor& full, const at::Tensor& prior) {
  at::Tensor out = at::empty_like(prior);
  if (prior.numel() == 1) {
    const double sum =
        full.scalar_type() == at::kDouble ? sum_in_fixed_order<double>(full) : sum_in_fixed_order<float>(full);
    return out.fill_(sum);
  }
  // at::sum splits its work by threads; here every output adds its elements in memory order.
  const at::Tensor values = full.to(at::kDouble).contiguous();
  at::Tensor sums = at::zeros(prior.sizes(), values.options());
  const at::Tensor target = sums.expand(full.sizes());
  const double* from = values.const_data_ptr<double>();
  double* to = sums.mutable_data_ptr<double>();
  std::vector<int64_t> index(static_cast<size_t>(full.dim()), 0);
  for (int64_t i = 0, offset = 0; i < values.numel(); ++i) {
    to[offset] += from[i];
    for (int64_t d = full.dim() - 1; d >= 0; --d) {
      offset += target.stride(d);
      if (++index[static_cast<size_t>(d)] < full.size(d)) break;
      offset -= target.stride(d) * full.size(d);
      index[static_cast<size_t>(d)] = 0;
    }
  }
  return out.copy_(sums);
}

namespace {

template <typename T>
double draw_all(const PosteriorTensors& t, const at::Tensor& sample, bool with_kl) {
  const auto p = host_posterior_params<T>(t);
  double kl = 0.0;
  if (t.loc->numel() == 0) return kl;
  for (int64_t s = 0; s < sample.size(0); ++s) {
    const at::Tensor one = sample.select(0, s);
    draw_sample(p, s, {one.mutable_data_ptr(), dtype_of(one.scalar_type()), posterior_strides(one, one.dim())},
                s == 0 && with_kl ? &kl : nullptr);
  }
  return kl;
}

Tensors2 sample_posterior_cpu(const at::Tensor& loc, const OptionalTensor& rho, const at::Tensor& seed,
                              const OptionalTensor& prior_loc, const OptionalTensor& prior_scale, Doubles prior,
                              bool with_kl, double scale_floor, int64_t stream, int64_t num_samples, int64_t offset_add,
                              int64_t element_offset, std::optional<at::ScalarType> dtype) {
  PosteriorTensors t = posterior_tensors(loc, get_if_defined(rho), prior_loc, prior_scale, prior, scale_floor);
  set_noise(&t, seed, stream, offset_add, element_offset);
  const std::vector<int64_t> sizes = sample_sizes(loc, num_samples);
  if (loc.dim() > 4) {
    const auto [sample, kl] =
        sample_posterior_cpu(merge_taps(loc, loc.sizes()), merge_taps(rho, loc.sizes()), seed,
                             merge_taps(prior_loc, loc.sizes()), merge_taps(prior_scale, loc.sizes()), prior, with_kl,
                             scale_floor, stream, num_samples, offset_add, element_offset, dtype);
    return {sample.reshape(sizes), kl};
  }
  const at::ScalarType type = checked_sample_dtype(loc, dtype);
  const at::Tensor sample = at::empty(sizes, loc.options().dtype(type));
  const double kl =
      loc.scalar_type() == at::kDouble ? draw_all<double>(t, sample, with_kl) : draw_all<float>(t, sample, with_kl);
  return {sample, with_kl ? scalar_like(loc, kl) : empty_gradient(loc)};
}

template <typename T>
Tensors4 backward_all(const PosteriorTensors& t, const at::Tensor* grad_sample, double grad_kl,
                      const std::array<bool, 4>& mask) {
  GradientBinder<T> binder(t, mask, grad_kl);
  if (grad_sample != nullptr && t.loc->numel() > 0) {
    const at::Tensor grad = grad_sample->to(t.loc->scalar_type());
    binder.set_grad_sample(grad);
    binder.run(host_posterior_params<T>(t));
  } else {
    binder.run(host_posterior_params<T>(t));
  }
  const PosteriorGradients g = binder.finish();
  return {g.loc, g.rho, g.prior_loc, g.prior_scale};
}

Tensors4 backward_of_dtype(const PosteriorTensors& t, const at::Tensor* grad_sample, const at::Tensor* grad_kl,
                           const std::array<bool, 4>& mask) {
  double by_kl = 0.0;
  if (grad_kl != nullptr) {
    expect_shape("grad_kl", {}, grad_kl->sizes());
    by_kl = grad_kl->item().toDouble();
  }
  return t.loc->scalar_type() == at::kDouble ? backward_all<double>(t, grad_sample, by_kl, mask)
                                             : backward_all<float>(t, grad_sample, by_kl, mask);
}

at::Tensor split_prior_taps(const at::Tensor& grad, const OptionalTensor& prior, at::IntArrayRef sizes) {
  const at::Tensor* like = get_if_defined(prior);
  return like == nullptr || grad.dim() != 4 ? grad : reduce_to_prior(grad.reshape(sizes), *like);
}

Tensors4 sample_posterior_backward_cpu(const OptionalTensor& grad_sample, const OptionalTensor& grad_kl,
                                       const at::Tensor& loc, const OptionalTensor& rho, const at::Tensor& seed,
                                       const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                                       Doubles prior, double scale_floor, int64_t stream, int64_t num_samples,
                                       int64_t offset_add, int64_t element_offset, std::array<bool, 4> mask) {
  PosteriorTensors t = posterior_tensors(loc, get_if_defined(rho), prior_loc, prior_scale, prior, scale_floor);
  set_noise(&t, seed, stream, offset_add, element_offset);
  const std::vector<int64_t> sizes = sample_sizes(loc, num_samples);
  const at::Tensor* grad = get_if_defined(grad_sample);
  if (grad != nullptr) {
    expect_shape("grad_sample", sizes, grad->sizes());
    expect_device("grad_sample", loc.device(), *grad);
    expect_gradient_dtype("grad_sample", *grad);
  }
  if (loc.dim() <= 4) return backward_of_dtype(t, grad, get_if_defined(grad_kl), mask);
  OptionalTensor merged_grad;
  if (grad != nullptr) merged_grad = grad->reshape({num_samples, sizes[1], sizes[2], -1, sizes.back()});
  const auto [g_loc, g_rho, g_prior_loc, g_prior_scale] =
      sample_posterior_backward_cpu(merged_grad, grad_kl, merge_taps(loc, loc.sizes()), merge_taps(rho, loc.sizes()),
                                    seed, merge_taps(prior_loc, loc.sizes()), merge_taps(prior_scale, loc.sizes()),
                                    prior, scale_floor, stream, num_samples, offset_add, element_offset, mask);
  return {split_taps(g_loc, &loc), split_taps(g_rho, get_if_defined(rho)),
          split_prior_taps(g_prior_loc, prior_loc, loc.sizes()),
          split_prior_taps(g_prior_scale, prior_scale, loc.sizes())};
}

at::Tensor kl_normal_cpu(const at::Tensor& loc, const at::Tensor& rho, const OptionalTensor& prior_loc,
                         const OptionalTensor& prior_scale, Doubles prior, double scale_floor) {
  expect_defined("rho", rho);
  const auto t = posterior_tensors(loc, &rho, prior_loc, prior_scale, prior, scale_floor);
  if (loc.dim() > 4) {
    return kl_normal_cpu(merge_taps(loc, loc.sizes()), merge_taps(rho, loc.sizes()), merge_taps(prior_loc, loc.sizes()),
                         merge_taps(prior_scale, loc.sizes()), prior, scale_floor);
  }
  if (loc.numel() == 0) return scalar_like(loc, 0.0);
  const double kl = loc.scalar_type() == at::kDouble ? kl_divergence(host_posterior_params<double>(t))
                                                     : kl_divergence(host_posterior_params<float>(t));
  return scalar_like(loc, kl);
}

Tensors4 kl_normal_backward_cpu(const at::Tensor& grad_kl, const at::Tensor& loc, const at::Tensor& rho,
                                const OptionalTensor& prior_loc, const OptionalTensor& prior_scale, Doubles prior,
                                double scale_floor, std::array<bool, 4> mask) {
  expect_defined("grad_kl", grad_kl);
  expect_defined("rho", rho);
  const auto t = posterior_tensors(loc, &rho, prior_loc, prior_scale, prior, scale_floor);
  if (loc.dim() <= 4) return backward_of_dtype(t, nullptr, &grad_kl, mask);
  const auto [g_loc, g_rho, g_prior_loc, g_prior_scale] = kl_normal_backward_cpu(
      grad_kl, merge_taps(loc, loc.sizes()), merge_taps(rho, loc.sizes()), merge_taps(prior_loc, loc.sizes()),
      merge_taps(prior_scale, loc.sizes()), prior, scale_floor, mask);
  return {split_taps(g_loc, &loc), split_taps(g_rho, &rho), split_prior_taps(g_prior_loc, prior_loc, loc.sizes()),
          split_prior_taps(g_prior_scale, prior_scale, loc.sizes())};
}

using DrawKernel = void (*)(NoiseKey, Stream, uint64_t, int64_t, float*);

at::Tensor draw_elements(DrawKernel kernel, const at::Tensor& seed, int64_t numel, int64_t stream, int64_t sample,
                         int64_t element_offset) {
  const Stream which = check_draw(seed, numel, stream, element_offset);
  const NoiseKey key = noise_key(seed, sample);
  at::Tensor out = at::empty({numel}, seed.options().dtype(at::kFloat));
  float* data = out.mutable_data_ptr<float>();
  const auto first = static_cast<uint64_t>(element_offset);
  at::parallel_for(0, numel, 16384, [&](int64_t begin, int64_t end) {
    kernel(key, which, first + static_cast<uint64_t>(begin), end - begin, data + begin);
  });
  return out;
}

at::Tensor standard_normal_cpu(const at::Tensor& seed, int64_t numel, int64_t stream, int64_t sample,
                               int64_t element_offset) {
  return draw_elements(noise_kernels().normals, seed, numel, stream, sample, element_offset);
}

at::Tensor random_signs_cpu(const at::Tensor& seed, int64_t numel, int64_t stream, int64_t sample,
                            int64_t element_offset) {
  return draw_elements(noise_kernels().signs, seed, numel, stream, sample, element_offset);
}

uint32_t checked_word(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= 0 && value <= 0xffffffffLL, name, ": expected words from 0 to 2^32 - 1, got ", value);
  return static_cast<uint32_t>(value);
}

at::Tensor philox4x32_10_cpu(const at::Tensor& counter, const at::Tensor& key) {
  check_philox(counter, key);
  const at::Tensor counters = counter.contiguous(), keys = key.contiguous();
  at::Tensor out = at::empty(counters.sizes(), counters.options());
  const int64_t* c = counters.const_data_ptr<int64_t>();
  const int64_t* k = keys.const_data_ptr<int64_t>();
  int64_t* o = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < counters.numel() / 4; ++i) {
    PhiloxWords words;
    for (int j = 0; j < 4; ++j) words.word[j] = checked_word("counter", c[4 * i + j]);
    words = philox4x32_10(words, checked_word("key", k[2 * i]), checked_word("key", k[2 * i + 1]));
    for (int j = 0; j < 4; ++j) o[4 * i + j] = words.word[j];
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, CPU, m) {
  m.impl("sample_posterior", sample_posterior_cpu);
  m.impl("sample_posterior_backward", sample_posterior_backward_cpu);
  m.impl("kl_normal", kl_normal_cpu);
  m.impl("kl_normal_backward", kl_normal_backward_cpu);
  m.impl("standard_normal", standard_normal_cpu);
  m.impl("random_signs", random_signs_cpu);
  m.impl("philox4x32_10", philox4x32_10_cpu);
}

}  // namespace fbc
