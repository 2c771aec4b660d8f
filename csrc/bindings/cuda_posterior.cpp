// The posterior operators under the CUDA key: one launch each, for a list as for one. Nothing is
// read back: seeds and gradients by the KL are the kernels' to read, and values are not checked.
#include "device.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda_pass.h"
#include "posterior_call.h"

namespace fbc {

namespace {

using device::Guard;
using device::Site;

bool is_double(const at::Tensor& loc) { return loc.scalar_type() == at::kDouble; }

at::Tensor empty_scalars(at::IntArrayRef sizes, const at::Tensor& parameter) {
  return at::empty(sizes, parameter.options().memory_format(at::MemoryFormat::Contiguous));
}

// Draws entries into samples; kl[i] undefined: no KL of entry i.
template <typename T>
void draw_entries(const std::vector<PosteriorTensors>& entries, at::TensorList samples, at::TensorList kl,
                  const Site& site) {
  SampleLaunch<T> launch;
  for (size_t i = 0; i < entries.size(); ++i) launch.add(entries[i], samples[i], kl[i]);
  launch.run(*entries[0].loc, site);
}

void draw(const std::vector<PosteriorTensors>& entries, at::TensorList samples, at::TensorList kl, const Site& site) {
  const Guard guard(*entries[0].loc);
  if (is_double(*entries[0].loc)) {
    draw_entries<double>(entries, samples, kl, site);
  } else {
    draw_entries<float>(entries, samples, kl, site);
  }
}

Tensors2 sample_posterior_cuda(const at::Tensor& loc, const OptionalTensor& rho, const at::Tensor& seed,
                               const OptionalTensor& prior_loc, const OptionalTensor& prior_scale, Doubles prior,
                               bool with_kl, double scale_floor, int64_t stream, int64_t num_samples,
                               int64_t offset_add, int64_t element_offset, std::optional<at::ScalarType> dtype) {
  PosteriorTensors t = posterior_tensors(loc, get_if_defined(rho), prior_loc, prior_scale, prior, scale_floor);
  set_noise(&t, seed, stream, offset_add, element_offset);
  const std::vector<int64_t> sizes = sample_sizes(loc, num_samples);
  if (loc.dim() > 4) {
    const auto [sample, kl] =
        sample_posterior_cuda(merge_taps(loc, loc.sizes()), merge_taps(rho, loc.sizes()), seed,
                              merge_taps(prior_loc, loc.sizes()), merge_taps(prior_scale, loc.sizes()), prior, with_kl,
                              scale_floor, stream, num_samples, offset_add, element_offset, dtype);
    return {sample.reshape(sizes), kl};
  }
  const at::Tensor sample = at::empty(
      sizes, loc.options().dtype(checked_sample_dtype(loc, dtype)).memory_format(at::MemoryFormat::Contiguous));
  const at::Tensor kl = with_kl ? empty_scalars({}, loc) : at::Tensor();
  draw({t}, {sample}, {kl}, {"fastbconv::sample_posterior", "loc", loc.sizes()});
  return {sample, with_kl ? kl : empty_scalars({0}, loc)};
}

SampleListResult sample_list_cuda(at::TensorList loc, at::TensorList rho, const at::Tensor& seed,
                                  const OptionalTensors& prior_loc, const OptionalTensors& prior_scale, Doubles prior,
                                  c10::List<bool> with_kl, double scale_floor, at::IntArrayRef stream,
                                  int64_t offset_add, at::IntArrayRef element_offset, c10::List<bool> cast,
                                  std::optional<at::ScalarType> dtype) {
  const PosteriorList list =
      checked_list(loc, rho, seed, prior_loc, prior_scale, {prior, scale_floor, stream, offset_add, element_offset});
  expect_length("with_kl", list.size(), with_kl.size());
  expect_length("cast", list.size(), cast.size());
  bool all_kl = true;
  for (size_t i = 0; i < list.size(); ++i) all_kl = all_kl && with_kl.get(i);
  at::Tensor kl = empty_scalars({static_cast<int64_t>(list.size())}, loc[0]);
  if (!all_kl) kl.zero_();
  std::vector<at::Tensor> samples, views, kls;
  for (size_t i = 0; i < list.size(); ++i) {
    const auto wanted = cast.get(i) ? dtype : std::nullopt;
    samples.push_back(empty_sample(loc[i], checked_sample_dtype(loc[i], wanted)));
    views.push_back(in_entry_shape(samples[i], list.entries[i]).unsqueeze(0));
    kls.push_back(with_kl.get(i) ? kl.select(0, static_cast<int64_t>(i)) : at::Tensor());
  }
  draw(list.entries, views, kls, {"fastbconv::sample_posterior_list", "loc[0]", loc[0].sizes()});
  return {std::move(samples), kl};
}

// grad_samples: (num_samples, ...) by entry; grad_kl: one element by entry; both may be undefined.
template <typename T>
std::vector<PosteriorGradientTensors> entry_gradients(const std::vector<PosteriorTensors>& entries,
                                                      at::TensorList grad_samples, at::TensorList grad_kl,
                                                      const std::vector<std::array<bool, 4>>& masks, const Site& site) {
  GradientLaunch<T> launch;
  for (size_t i = 0; i < entries.size(); ++i) launch.add(entries[i], {grad_samples[i], {}, {}}, grad_kl[i], masks[i]);
  return launch.run(site);
}

std::vector<PosteriorGradientTensors> gradients(const std::vector<PosteriorTensors>& entries,
                                                at::TensorList grad_samples, at::TensorList grad_kl,
                                                const std::vector<std::array<bool, 4>>& masks, const Site& site) {
  const Guard guard(*entries[0].loc);
  return is_double(*entries[0].loc) ? entry_gradients<double>(entries, grad_samples, grad_kl, masks, site)
                                    : entry_gradients<float>(entries, grad_samples, grad_kl, masks, site);
}

at::Tensor checked_grad_kl(const at::Tensor* grad_kl, const at::Tensor& loc) {
  if (grad_kl == nullptr || grad_kl->numel() == 0) return {};  // (0,) where no KL was asked for
  expect_shape("grad_kl", {}, grad_kl->sizes());
  expect_device("grad_kl", loc.device(), *grad_kl);
  return in_dtype(*grad_kl, loc.scalar_type());
}

// A gradient of merged taps, in the shape of its prior.
at::Tensor split_prior_taps(const at::Tensor& grad, const OptionalTensor& prior, at::IntArrayRef sizes) {
  const at::Tensor* like = get_if_defined(prior);
  if (like == nullptr || grad.dim() != 4) return grad;
  return grad.reshape(sizes).sum_to_size(like->sizes());
}

Tensors4 sample_posterior_backward_cuda(const OptionalTensor& grad_sample, const OptionalTensor& grad_kl,
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
  if (loc.dim() <= 4) {
    const auto g =
        gradients({t}, {grad == nullptr ? at::Tensor() : *grad}, {checked_grad_kl(get_if_defined(grad_kl), loc)},
                  {mask}, {"fastbconv::sample_posterior_backward", "loc", loc.sizes()})[0]
            .grad;
    return {g[0], g[1], g[2], g[3]};
  }
  OptionalTensor merged_grad;
  if (grad != nullptr) merged_grad = grad->reshape({num_samples, sizes[1], sizes[2], -1, sizes.back()});
  const auto [g_loc, g_rho, g_prior_loc, g_prior_scale] =
      sample_posterior_backward_cuda(merged_grad, grad_kl, merge_taps(loc, loc.sizes()), merge_taps(rho, loc.sizes()),
                                     seed, merge_taps(prior_loc, loc.sizes()), merge_taps(prior_scale, loc.sizes()),
                                     prior, scale_floor, stream, num_samples, offset_add, element_offset, mask);
  return {split_taps(g_loc, &loc), split_taps(g_rho, get_if_defined(rho)),
          split_prior_taps(g_prior_loc, prior_loc, loc.sizes()),
          split_prior_taps(g_prior_scale, prior_scale, loc.sizes())};
}

std::vector<at::Tensor> sample_list_backward_cuda(const OptionalTensors& grad_sample, const OptionalTensor& grad_kl,
                                                  at::TensorList loc, at::TensorList rho, const at::Tensor& seed,
                                                  const OptionalTensors& prior_loc, const OptionalTensors& prior_scale,
                                                  Doubles prior, double scale_floor, at::IntArrayRef stream,
                                                  int64_t offset_add, at::IntArrayRef element_offset,
                                                  c10::List<bool> output_mask) {
  const PosteriorList list =
      checked_list(loc, rho, seed, prior_loc, prior_scale, {prior, scale_floor, stream, offset_add, element_offset});
  const size_t count = list.size();
  const at::Tensor* by_kl = get_if_defined(grad_kl);
  std::vector<at::Tensor> by_sample = checked_list_gradients(list, grad_sample, by_kl);
  const at::Tensor kl = by_kl == nullptr ? at::Tensor() : in_dtype(*by_kl, loc[0].scalar_type());
  std::vector<at::Tensor> kls(count);
  std::vector<std::array<bool, 4>> masks(count);
  for (size_t i = 0; i < count; ++i) {
    if (by_sample[i].defined()) by_sample[i] = by_sample[i].unsqueeze(0);
    if (kl.defined()) kls[i] = kl.select(0, static_cast<int64_t>(i));
    masks[i] = wanted_of(output_mask, i, count);
  }
  const auto g = gradients(list.entries, by_sample, kls, masks,
                           {"fastbconv::sample_posterior_list_backward", "loc[0]", loc[0].sizes()});
  std::vector<at::Tensor> out(4 * count);
  for (size_t i = 0; i < count; ++i) {
    const bool merged = loc[i].dim() > 4;
    for (size_t j = 0; j < 4; ++j) out[j * count + i] = g[i].grad[j];
    if (!merged) continue;
    out[i] = split_taps(out[i], &loc[i]);
    out[count + i] = split_taps(out[count + i], &rho[i]);
    out[2 * count + i] = split_prior_taps(out[2 * count + i], prior_loc.get(i), loc[i].sizes());
    out[3 * count + i] = split_prior_taps(out[3 * count + i], prior_scale.get(i), loc[i].sizes());
  }
  return out;
}

at::Tensor kl_normal_cuda(const at::Tensor& loc, const at::Tensor& rho, const OptionalTensor& prior_loc,
                          const OptionalTensor& prior_scale, Doubles prior, double scale_floor) {
  expect_defined("rho", rho);
  const auto t = posterior_tensors(loc, &rho, prior_loc, prior_scale, prior, scale_floor);
  if (loc.dim() > 4) {
    return kl_normal_cuda(merge_taps(loc, loc.sizes()), merge_taps(rho, loc.sizes()),
                          merge_taps(prior_loc, loc.sizes()), merge_taps(prior_scale, loc.sizes()), prior, scale_floor);
  }
  const at::Tensor kl = empty_scalars({}, loc);
  draw({t}, {at::Tensor()}, {kl}, {"fastbconv::kl_normal", "loc", loc.sizes()});
  return kl;
}

Tensors4 kl_normal_backward_cuda(const at::Tensor& grad_kl, const at::Tensor& loc, const at::Tensor& rho,
                                 const OptionalTensor& prior_loc, const OptionalTensor& prior_scale, Doubles prior,
                                 double scale_floor, std::array<bool, 4> mask) {
  expect_defined("grad_kl", grad_kl);
  expect_defined("rho", rho);
  const auto t = posterior_tensors(loc, &rho, prior_loc, prior_scale, prior, scale_floor);
  if (loc.dim() <= 4) {
    const auto g = gradients({t}, {at::Tensor()}, {checked_grad_kl(&grad_kl, loc)}, {mask},
                             {"fastbconv::kl_normal_backward", "loc", loc.sizes()})[0]
                       .grad;
    return {g[0], g[1], g[2], g[3]};
  }
  const auto [g_loc, g_rho, g_prior_loc, g_prior_scale] = kl_normal_backward_cuda(
      grad_kl, merge_taps(loc, loc.sizes()), merge_taps(rho, loc.sizes()), merge_taps(prior_loc, loc.sizes()),
      merge_taps(prior_scale, loc.sizes()), prior, scale_floor, mask);
  return {split_taps(g_loc, &loc), split_taps(g_rho, &rho), split_prior_taps(g_prior_loc, prior_loc, loc.sizes()),
          split_prior_taps(g_prior_scale, prior_scale, loc.sizes())};
}

using DrawLauncher = int (*)(const int64_t*, int64_t, Stream, int64_t, int64_t, float*, cuda::StreamHandle);

at::Tensor draw_elements(DrawLauncher launch, const char* op, const at::Tensor& seed, int64_t numel, int64_t stream,
                         int64_t sample, int64_t element_offset) {
  const Stream which = check_draw(seed, numel, stream, element_offset);
  const Guard guard(seed);
  const at::Tensor key = seed.contiguous();
  const at::Tensor out = at::empty({numel}, seed.options().dtype(at::kFloat));
  if (numel == 0) return out;
  device::check_launch(launch(key.const_data_ptr<int64_t>(), sample, which, element_offset, numel,
                              out.mutable_data_ptr<float>(), device::current_stream(seed)),
                       {op, "output", out.sizes()});
  return out;
}

at::Tensor standard_normal_cuda(const at::Tensor& seed, int64_t numel, int64_t stream, int64_t sample,
                                int64_t element_offset) {
  return draw_elements(cuda::normals, "fastbconv::standard_normal", seed, numel, stream, sample, element_offset);
}

at::Tensor random_signs_cuda(const at::Tensor& seed, int64_t numel, int64_t stream, int64_t sample,
                             int64_t element_offset) {
  return draw_elements(cuda::signs, "fastbconv::random_signs", seed, numel, stream, sample, element_offset);
}

// Words beyond 32 bits, which the CPU refuses, are cut off: values are not looked at here.
at::Tensor philox4x32_10_cuda(const at::Tensor& counter, const at::Tensor& key) {
  check_philox(counter, key);
  const Guard guard(counter);
  const at::Tensor counters = counter.contiguous(), keys = key.contiguous();
  const at::Tensor out = at::empty(counters.sizes(), counters.options());
  if (out.numel() == 0) return out;
  device::check_launch(
      cuda::philox(counters.const_data_ptr<int64_t>(), keys.const_data_ptr<int64_t>(), counters.numel() / 4,
                   out.mutable_data_ptr<int64_t>(), device::current_stream(counter)),
      {"fastbconv::philox4x32_10", "counter", counter.sizes()});
  return out;
}

at::Tensor derive_seeds_cuda(const at::Tensor& seed, int64_t first, int64_t count) {
  check_derive(seed, first, count);
  const Guard guard(seed);
  const at::Tensor parent = seed.contiguous();
  const at::Tensor out = at::empty({count, 2}, seed.options());
  if (count == 0) return out;
  device::check_launch(cuda::derive_seeds(parent.const_data_ptr<int64_t>(), first, count,
                                          out.mutable_data_ptr<int64_t>(), device::current_stream(seed)),
                       {"fastbconv::derive_seeds", "output", out.sizes()});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, FBC_CUDA_KEY, m) {
  m.impl("sample_posterior", sample_posterior_cuda);
  m.impl("sample_posterior_backward", sample_posterior_backward_cuda);
  m.impl("sample_posterior_list", sample_list_cuda);
  m.impl("sample_posterior_list_backward", sample_list_backward_cuda);
  m.impl("kl_normal", kl_normal_cuda);
  m.impl("kl_normal_backward", kl_normal_backward_cuda);
  m.impl("standard_normal", standard_normal_cuda);
  m.impl("random_signs", random_signs_cuda);
  m.impl("philox4x32_10", philox4x32_10_cuda);
  m.impl("derive_seeds", derive_seeds_cuda);
}

}  // namespace fbc
