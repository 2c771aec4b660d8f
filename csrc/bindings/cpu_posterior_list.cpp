// sample_posterior_list, its backward and derive_seeds under the CPU key: one entry after another,
// each by the passes that serve a single posterior.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "posterior_call.h"
#include "posterior_pass.h"

namespace fbc {

namespace {

template <typename T>
void draw_entry(const PosteriorTensors& entry, const at::Tensor& sample, T* kl) {
  if (entry.loc->numel() == 0) return;
  const at::Tensor out = in_entry_shape(sample, entry);
  double sum = 0.0;
  draw_sample(host_posterior_params<T>(entry), 0,
              {out.mutable_data_ptr(), dtype_of(out.scalar_type()), posterior_strides(out, out.dim())},
              kl == nullptr ? nullptr : &sum);
  if (kl != nullptr) *kl = static_cast<T>(sum);
}

SampleListResult sample_list_cpu(at::TensorList loc, at::TensorList rho, const at::Tensor& seed,
                                 const OptionalTensors& prior_loc, const OptionalTensors& prior_scale, Doubles prior,
                                 c10::List<bool> with_kl, double scale_floor, at::IntArrayRef stream,
                                 int64_t offset_add, at::IntArrayRef element_offset, c10::List<bool> cast,
                                 std::optional<at::ScalarType> dtype) {
  const PosteriorList list =
      checked_list(loc, rho, seed, prior_loc, prior_scale, {prior, scale_floor, stream, offset_add, element_offset});
  expect_length("with_kl", list.size(), with_kl.size());
  expect_length("cast", list.size(), cast.size());
  const at::Tensor kl =
      at::zeros({static_cast<int64_t>(list.size())}, loc[0].options().memory_format(at::MemoryFormat::Contiguous));
  std::vector<at::Tensor> samples;
  for (size_t i = 0; i < list.size(); ++i) {
    const auto wanted = cast.get(i) ? dtype : std::nullopt;
    samples.push_back(empty_sample(loc[i], checked_sample_dtype(loc[i], wanted)));
    if (loc[0].scalar_type() == at::kDouble) {
      draw_entry<double>(list.entries[i], samples[i], with_kl.get(i) ? kl.mutable_data_ptr<double>() + i : nullptr);
    } else {
      draw_entry<float>(list.entries[i], samples[i], with_kl.get(i) ? kl.mutable_data_ptr<float>() + i : nullptr);
    }
  }
  return {std::move(samples), kl};
}

template <typename T>
PosteriorGradients entry_gradients(const PosteriorTensors& entry, const at::Tensor& grad_sample, double grad_kl,
                                   std::array<bool, 4> wanted) {
  GradientBinder<T> binder(entry, wanted, grad_kl);
  at::Tensor grad;
  if (grad_sample.defined() && grad_sample.numel() > 0) {
    grad = grad_sample.to(entry.loc->scalar_type()).unsqueeze(0);
    binder.set_grad_sample(grad);
  }
  binder.run(host_posterior_params<T>(entry));
  return binder.finish();
}

std::vector<at::Tensor> sample_list_backward_cpu(const OptionalTensors& grad_sample, const OptionalTensor& grad_kl,
                                                 at::TensorList loc, at::TensorList rho, const at::Tensor& seed,
                                                 const OptionalTensors& prior_loc, const OptionalTensors& prior_scale,
                                                 Doubles prior, double scale_floor, at::IntArrayRef stream,
                                                 int64_t offset_add, at::IntArrayRef element_offset,
                                                 c10::List<bool> output_mask) {
  const PosteriorList list =
      checked_list(loc, rho, seed, prior_loc, prior_scale, {prior, scale_floor, stream, offset_add, element_offset});
  const size_t count = list.size();
  const at::Tensor* by_kl = get_if_defined(grad_kl);
  const auto grads = checked_list_gradients(list, grad_sample, by_kl);
  std::vector<at::Tensor> out(4 * count);
  for (size_t i = 0; i < count; ++i) {
    const auto wanted = wanted_of(output_mask, i, count);
    const double kl = by_kl == nullptr ? 0.0 : by_kl->select(0, static_cast<int64_t>(i)).item().toDouble();
    const PosteriorGradients g = loc[0].scalar_type() == at::kDouble
                                     ? entry_gradients<double>(list.entries[i], grads[i], kl, wanted)
                                     : entry_gradients<float>(list.entries[i], grads[i], kl, wanted);
    const OptionalTensor p_loc = prior_loc.get(i), p_scale = prior_scale.get(i);
    out[i] = split_taps(g.loc, loc[i].dim() > 4 ? &loc[i] : nullptr);
    out[count + i] = split_taps(g.rho, loc[i].dim() > 4 ? &rho[i] : nullptr);
    out[2 * count + i] = g.prior_loc;
    out[3 * count + i] = g.prior_scale;
    if (loc[i].dim() <= 4) continue;  // else priors were expanded before their taps were merged
    if (wanted[2] && get_if_defined(p_loc) != nullptr)
      out[2 * count + i] = reduce_to_prior(g.prior_loc.reshape(loc[i].sizes()), *p_loc);
    if (wanted[3] && get_if_defined(p_scale) != nullptr)
      out[3 * count + i] = reduce_to_prior(g.prior_scale.reshape(loc[i].sizes()), *p_scale);
  }
  return out;
}

at::Tensor derive_seeds_cpu(const at::Tensor& seed, int64_t first, int64_t count) {
  check_derive(seed, first, count);
  const NoiseKey parent = noise_key(seed, 0);
  at::Tensor out = at::empty({count, 2}, seed.options());
  int64_t* data = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    const NoiseKey child = derive_seed(parent, static_cast<uint64_t>(first + i));
    data[2 * i] = static_cast<int64_t>(child.key);
    data[2 * i + 1] = static_cast<int64_t>(child.offset);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, CPU, m) {
  m.impl("sample_posterior_list", sample_list_cpu);
  m.impl("sample_posterior_list_backward", sample_list_backward_cpu);
  m.impl("derive_seeds", derive_seeds_cpu);
}

}  // namespace fbc
