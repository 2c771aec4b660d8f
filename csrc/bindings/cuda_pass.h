// Launches over posteriors on the device: sampling, and gradients. Shared by the convolution
// operators and by those of a posterior alone.
#pragma once

#include "device.h"

#include <ATen/core/Tensor.h>

#include <vector>

#include "../cuda/kernels.h"
#include "tensor_args.h"

namespace fbc {

// Draws of several posteriors in one launch. T is the dtype of the parameters.
template <typename T>
class SampleLaunch {
 public:
  // sample: (num_samples, shape of loc) of any strides; undefined: only the KL. kl: a tensor of one
  // element of the parameters' dtype; undefined: no KL.
  void add(const PosteriorTensors& t, const at::Tensor& sample, const at::Tensor& kl);
  // like: any tensor on the device.
  void run(const at::Tensor& like, const device::Site& site);

 private:
  std::vector<cuda::SampleEntry<T>> entries_;
  std::vector<at::Tensor> held_;  // what the entries point to and the caller may not hold
};

// Gradients of one posterior in the order loc, rho, prior_loc, prior_scale; (0,) where not wanted.
struct PosteriorGradientTensors {
  std::array<at::Tensor, 4> grad;
};

// Where the gradient by a sample stands.
struct SampleGradient {
  at::Tensor grad;       // (num_samples, shape of loc), any float dtype and strides; undefined: none
  at::Tensor slabs;      // instead: (slabs, K, R, S, C/G), float32, contiguous
  at::Tensor slabs_eps;  // the same weighed by the noise, where there are several draws
};

// Gradients of several posteriors in one launch.
template <typename T>
class GradientLaunch {
 public:
  // grad_kl: one element of the parameters' dtype; undefined: none.
  void add(const PosteriorTensors& t, const SampleGradient& by_sample, const at::Tensor& grad_kl,
           const std::array<bool, 4>& wanted);
  // One per add(), in order.
  std::vector<PosteriorGradientTensors> run(const device::Site& site);

 private:
  void bind_gradients(const PosteriorTensors& t, const std::array<bool, 4>& wanted, cuda::PosteriorGradEntry<T>* entry);

  std::vector<cuda::PosteriorGradEntry<T>> entries_;
  std::vector<PosteriorGradientTensors> results_;
  std::vector<PosteriorTensors> posteriors_;
  std::vector<std::array<bool, 4>> wanted_;
  std::vector<at::Tensor> held_;
};

}  // namespace fbc
