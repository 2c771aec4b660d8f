#include "cuda_pass.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

namespace fbc {

namespace {

const int64_t* seed_pointer(const PosteriorTensors& t, std::vector<at::Tensor>* held) {
  if (t.rho == nullptr || t.seed == nullptr) return nullptr;
  held->push_back(t.seed->contiguous());
  return held->back().const_data_ptr<int64_t>();
}

// Of one draw among (num_samples, shape of loc).
WeightStrides strides_of_draw(const at::Tensor& draws, int64_t dim) {
  return posterior_strides(draws.sizes().slice(1), draws.strides().slice(1), dim);
}

// A gradient in a dtype that the kernels read beside parameters of `dtype`.
at::Tensor readable_gradient(const at::Tensor& grad, at::ScalarType dtype) {
  const bool is_double = grad.scalar_type() == at::kDouble;
  return is_double == (dtype == at::kDouble) ? grad : grad.to(dtype);
}

// The gradient of a broadcast prior from its full-size gradient.
at::Tensor sum_to_prior(const at::Tensor& full, const at::Tensor& prior) {
  if (full.sizes() == prior.sizes()) return full;
  return full.sum_to_size(prior.sizes());
}

}  // namespace

template <typename T>
void SampleLaunch<T>::add(const PosteriorTensors& t, const at::Tensor& sample, const at::Tensor& kl) {
  if (!sample.defined() && !kl.defined()) return;
  cuda::SampleEntry<T> e = {};
  e.posterior = posterior_params<T>(t);
  e.seed = seed_pointer(t, &held_);
  if (sample.defined()) {
    e.sample = sample.mutable_data_ptr();
    e.sample_dtype = dtype_of(sample.scalar_type());
    e.num_samples = sample.size(0);
    e.sample_sample_stride = sample.stride(0);
    e.sample_stride = strides_of_draw(sample, t.loc->dim());
  }
  if (kl.defined()) e.kl = kl.mutable_data_ptr<T>();
  entries_.push_back(e);
}

template <typename T>
void SampleLaunch<T>::run(const at::Tensor& like, const device::Site& site) {
  if (entries_.empty()) return;
  const int count = static_cast<int>(entries_.size());
  const device::Workspace workspace(cuda::sample_workspace(entries_.data(), count), like);
  device::check_launch(cuda::sample(entries_.data(), count, workspace.data(), device::current_stream(like)), site);
}

template <typename T>
void GradientLaunch<T>::add(const PosteriorTensors& t, const SampleGradient& by_sample, const at::Tensor& grad_kl,
                            const std::array<bool, 4>& wanted) {
  cuda::PosteriorGradEntry<T> e = {};
  e.posterior = posterior_params<T>(t);
  e.seed = seed_pointer(t, &held_);
  e.num_samples = e.slabs = 1;
  if (by_sample.grad.defined()) {
    const at::Tensor& grad = by_sample.grad;
    held_.push_back(readable_gradient(grad, t.dtype()));
    const at::Tensor& kept = held_.back();
    e.grad_weight = kept.const_data_ptr();
    e.grad_dtype = dtype_of(kept.scalar_type());
    e.num_samples = kept.size(0);
    e.grad_sample_stride = kept.stride(0);
    e.grad_stride = strides_of_draw(kept, t.loc->dim());
  } else if (by_sample.slabs.defined()) {
    const at::Tensor& slabs = by_sample.slabs;
    held_.push_back(slabs);
    e.grad_weight = slabs.const_data_ptr();
    e.grad_dtype = dtype_of(slabs.scalar_type());
    e.slabs = slabs.size(0);
    e.grad_slab_stride = slabs.stride(0);
    e.grad_stride = {slabs.stride(1), slabs.stride(2), slabs.stride(3), slabs.stride(4)};
    if (by_sample.slabs_eps.defined()) {
      held_.push_back(by_sample.slabs_eps);
      e.grad_weight_eps = by_sample.slabs_eps.const_data_ptr();
    }
  }
  if (grad_kl.defined() && t.rho != nullptr) {
    held_.push_back(grad_kl);
    e.grad_kl = grad_kl.const_data_ptr<T>();
  }
  bind_gradients(t, wanted, &e);
  posteriors_.push_back(t);
  wanted_.push_back(wanted);
  if (t.loc->numel() == 0) return;
  if (e.grad_loc != nullptr || e.grad_rho != nullptr || e.grad_prior_loc != nullptr || e.grad_prior_scale != nullptr) {
    entries_.push_back(e);
  }
}

template <typename T>
void GradientLaunch<T>::bind_gradients(const PosteriorTensors& t, const std::array<bool, 4>& wanted,
                                       cuda::PosteriorGradEntry<T>* e) {
  const std::array<const at::Tensor*, 4> like = {t.loc, t.rho, t.prior_loc, t.prior_scale};
  const std::array<T**, 4> pointer = {&e->grad_loc, &e->grad_rho, &e->grad_prior_loc, &e->grad_prior_scale};
  const std::array<WeightStrides*, 4> stride = {&e->grad_loc_stride, &e->grad_rho_stride, &e->grad_prior_loc_stride,
                                                &e->grad_prior_scale_stride};
  results_.emplace_back();
  for (size_t i = 0; i < 4; ++i) {
    at::Tensor& grad = results_.back().grad[i];
    const auto options = t.loc->options().memory_format(at::MemoryFormat::Contiguous);
    if (!wanted[i] || like[i] == nullptr) {
      grad = at::empty({0}, options);
      continue;
    }
    const bool is_prior = i >= 2;
    if (is_prior && t.rho == nullptr) {  // a point mass has no KL
      grad = at::zeros(t.loc->sizes(), options);
      continue;
    }
    grad =
        is_prior && like[i]->sizes() != t.loc->sizes() ? at::empty(t.loc->sizes(), options) : at::empty_like(*like[i]);
    *pointer[i] = grad.template mutable_data_ptr<T>();
    *stride[i] = posterior_strides(grad, t.loc->dim());
  }
}

template <typename T>
std::vector<PosteriorGradientTensors> GradientLaunch<T>::run(const device::Site& site) {
  if (!entries_.empty()) {
    device::check_launch(cuda::posterior_backward(entries_.data(), static_cast<int>(entries_.size()),
                                                  device::current_stream(*posteriors_[0].loc)),
                         site);
  }
  for (size_t i = 0; i < results_.size(); ++i) {
    auto& grad = results_[i].grad;
    const PosteriorTensors& t = posteriors_[i];
    if (wanted_[i][2] && t.prior_loc != nullptr) grad[2] = sum_to_prior(grad[2], *t.prior_loc);
    if (wanted_[i][3] && t.prior_scale != nullptr) grad[3] = sum_to_prior(grad[3], *t.prior_scale);
  }
  return std::move(results_);
}

template class SampleLaunch<float>;
template class SampleLaunch<double>;
template class GradientLaunch<float>;
template class GradientLaunch<double>;

}  // namespace fbc
