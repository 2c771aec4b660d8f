// Passes over one posterior, in parallel: draw a sample, sum the KL, form the gradients. Shared by
// the convolution operators and by sample_posterior and kl_normal.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <memory>

#include "../cpu/kernels.h"
#include "parallel.h"
#include "tensor_args.h"

namespace fbc {

// Rows are handed to threads in pieces worth the hand-over. Where a row ends up changes no bit.
template <typename T, typename F>
void for_rows(const PosteriorParams<T>& p, F&& body) {
  constexpr int64_t kElementsPerPiece = 8192;
  const int64_t per_row = std::max<int64_t>(1, p.R * p.S * p.C);
  at::parallel_for(0, p.K, std::max<int64_t>(1, kElementsPerPiece / per_row), body);
}

// One double per chunk of the KL sum.
template <typename T>
class KlPartials {
 public:
  explicit KlPartials(const PosteriorParams<T>& p)
      : count_(p.K * kl_chunks_per_row(p)), values_(new double[std::max<int64_t>(1, count_)]) {}
  double* data() { return values_.get(); }
  double sum() const { return sum_kl_partials(values_.get(), count_); }

 private:
  int64_t count_;
  std::unique_ptr<double[]> values_;
};

// Draws sample number `sample` into out. kl: the KL is added to it in the same sweep; null: no KL.
template <typename T>
void draw_sample(const PosteriorParams<T>& p, int64_t sample, const WeightOut& out, double* kl) {
  const auto& table = kernels<T>();
  if (kl == nullptr || p.rho == nullptr) {
    for_rows(p, [&](int64_t begin, int64_t end) { table.sample(p, sample, begin, end, out, nullptr); });
    return;
  }
  KlPartials<T> partials(p);
  for_rows(p, [&](int64_t begin, int64_t end) { table.sample(p, sample, begin, end, out, partials.data()); });
  *kl += partials.sum();
}

template <typename T>
double kl_divergence(const PosteriorParams<T>& p) {
  if (p.rho == nullptr) return 0.0;
  KlPartials<T> partials(p);
  for_rows(p, [&](int64_t begin, int64_t end) { kernels<T>().kl(p, begin, end, partials.data()); });
  return partials.sum();
}

inline at::Tensor scalar_like(const at::Tensor& parameter, double value) {
  return at::empty({}, parameter.options().memory_format(c10::MemoryFormat::Contiguous)).fill_(value);
}

// Gradients of one posterior and its prior, in the order loc, rho, prior_loc, prior_scale. Unwanted
// ones are empty (0,) tensors.
struct PosteriorGradients {
  at::Tensor loc, rho, prior_loc, prior_scale;
};

// The gradient of a broadcast prior, from its full-size gradient.
at::Tensor reduce_to_prior(const at::Tensor& full, const at::Tensor& prior);

inline at::Tensor empty_gradient(const at::Tensor& parameter) { return at::empty({0}, parameter.options()); }

// Allocates the wanted gradients and binds them to the kernels' struct. Then run the kernel and
// call finish(), which sums prior gradients to the shape of their prior.
template <typename T>
class GradientBinder {
 public:
  GradientBinder(const PosteriorTensors& t, std::array<bool, 4> wanted, double grad_kl) : tensors_(t) {
    const at::Tensor& loc = *t.loc;
    grads.grad_kl = static_cast<T>(t.rho == nullptr ? 0.0 : grad_kl);
    out_.loc = wanted[0] ? at::empty_like(loc) : empty_gradient(loc);
    out_.rho = wanted[1] && t.rho != nullptr ? at::empty_like(*t.rho) : empty_gradient(loc);
    out_.prior_loc = prior_buffer(wanted[2] ? t.prior_loc : nullptr);
    out_.prior_scale = prior_buffer(wanted[3] ? t.prior_scale : nullptr);
    bind(out_.loc, wanted[0], &grads.grad_loc, &grads.grad_loc_stride);
    bind(out_.rho, wanted[1] && t.rho != nullptr, &grads.grad_rho, &grads.grad_rho_stride);
    bind(out_.prior_loc, wanted[2] && t.prior_loc != nullptr, &grads.grad_prior_loc, &grads.grad_prior_loc_stride);
    bind(out_.prior_scale, wanted[3] && t.prior_scale != nullptr, &grads.grad_prior_scale,
         &grads.grad_prior_scale_stride);
  }

  // (num_samples, ...) gradient by each draw, any strides.
  void set_grad_sample(const at::Tensor& grad) {
    grads.grad_weight = grad.const_data_ptr<T>();
    grads.num_samples = grad.size(0);
    grads.grad_weight_sample_stride = grad.stride(0);
    grads.grad_weight_stride = posterior_strides(grad.select(0, 0), tensors_.loc->dim());
  }

  bool wants_anything() const {
    return grads.grad_loc != nullptr || grads.grad_rho != nullptr || grads.grad_prior_loc != nullptr ||
           grads.grad_prior_scale != nullptr;
  }

  void run(const PosteriorParams<T>& p) {
    if (!wants_anything()) return;
    for_rows(p, [&](int64_t begin, int64_t end) { kernels<T>().posterior_backward(p, grads, begin, end); });
  }

  PosteriorGradients finish() {
    if (grads.grad_prior_loc != nullptr) out_.prior_loc = reduce_to_prior(out_.prior_loc, *tensors_.prior_loc);
    if (grads.grad_prior_scale != nullptr) out_.prior_scale = reduce_to_prior(out_.prior_scale, *tensors_.prior_scale);
    return out_;
  }

  PosteriorGrads<T> grads = {};

 private:
  // A point mass has no KL: its kernels write no prior gradient.
  at::Tensor prior_buffer(const at::Tensor* prior) {
    if (prior == nullptr) return empty_gradient(*tensors_.loc);
    at::Tensor full = at::empty(tensors_.loc->sizes(), tensors_.loc->options());
    if (tensors_.rho == nullptr) full.zero_();
    return full;
  }

  void bind(const at::Tensor& tensor, bool wanted, T** pointer, WeightStrides* strides) {
    if (!wanted) return;
    *pointer = tensor.mutable_data_ptr<T>();
    *strides = posterior_strides(tensor, tensors_.loc->dim());
  }

  PosteriorTensors tensors_;
  PosteriorGradients out_;
};

}  // namespace fbc
