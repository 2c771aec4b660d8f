// The C++ types of the operators, in schema order, and the non-tensor arguments of a convolution as
// one struct. schema.cpp quotes the schemas themselves.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <array>
#include <tuple>

#include "checks.h"

namespace fbc {

using Tensors2 = std::tuple<at::Tensor, at::Tensor>;
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors9 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                            at::Tensor, at::Tensor>;
using Doubles = c10::ArrayRef<double>;
using OptionalTensors = c10::List<std::optional<at::Tensor>>;

using Bconv2dSignature = Tensors4(const at::Tensor& input, const at::Tensor& weight_loc,
                                  const OptionalTensor& weight_rho, const OptionalTensor& bias_loc,
                                  const OptionalTensor& bias_rho, const at::Tensor& seed,
                                  const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                                  const OptionalTensor& bias_prior_loc, const OptionalTensor& bias_prior_scale,
                                  Doubles prior, bool weight_kl, bool bias_kl, double scale_floor,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  int64_t groups, int64_t activation, double activation_param, int64_t num_samples,
                                  bool share_input, int64_t offset_add, at::IntArrayRef element_offset,
                                  int64_t algorithm, bool keep_weight, bool save_pre_activation);

using Bconv2dBackwardSignature = Tensors9(
    const at::Tensor& grad_output, const OptionalTensor& grad_kl, const at::Tensor& input, const OptionalTensor& saved,
    const OptionalTensor& weight, const at::Tensor& weight_loc, const OptionalTensor& weight_rho,
    const OptionalTensor& bias_loc, const OptionalTensor& bias_rho, const at::Tensor& seed,
    const OptionalTensor& prior_loc, const OptionalTensor& prior_scale, const OptionalTensor& bias_prior_loc,
    const OptionalTensor& bias_prior_scale, Doubles prior, bool weight_kl, bool bias_kl, double scale_floor,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t activation,
    double activation_param, int64_t num_samples, bool share_input, int64_t offset_add, at::IntArrayRef element_offset,
    int64_t algorithm, std::array<bool, 9> output_mask);

using Bconv2dAffineSignature = Tensors4(
    const at::Tensor& input, const at::Tensor& weight_loc, const at::Tensor& weight_rho, const OptionalTensor& bias_loc,
    const OptionalTensor& bias_rho, const at::Tensor& seed, const OptionalTensor& prior_loc,
    const OptionalTensor& prior_scale, const OptionalTensor& bias_prior_loc, const OptionalTensor& bias_prior_scale,
    int64_t estimator, Doubles prior, bool weight_kl, bool bias_kl, double scale_floor, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t activation, double activation_param,
    int64_t num_samples, bool share_input, int64_t offset_add, at::IntArrayRef element_offset, int64_t row_offset,
    int64_t algorithm, bool save_pre_activation);

using Bconv2dAffineBackwardSignature = Tensors9(
    const at::Tensor& grad_output, const OptionalTensor& grad_kl, const at::Tensor& input, const OptionalTensor& saved,
    const OptionalTensor& deviation, const at::Tensor& weight_loc, const at::Tensor& weight_rho,
    const OptionalTensor& bias_loc, const OptionalTensor& bias_rho, const at::Tensor& seed,
    const OptionalTensor& prior_loc, const OptionalTensor& prior_scale, const OptionalTensor& bias_prior_loc,
    const OptionalTensor& bias_prior_scale, int64_t estimator, Doubles prior, bool weight_kl, bool bias_kl,
    double scale_floor, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    int64_t activation, double activation_param, int64_t num_samples, bool share_input, int64_t offset_add,
    at::IntArrayRef element_offset, int64_t row_offset, int64_t algorithm, std::array<bool, 9> output_mask);

using SamplePosteriorSignature = Tensors2(const at::Tensor& loc, const OptionalTensor& rho, const at::Tensor& seed,
                                          const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                                          Doubles prior, bool with_kl, double scale_floor, int64_t stream,
                                          int64_t num_samples, int64_t offset_add, int64_t element_offset,
                                          std::optional<at::ScalarType> dtype);

using SamplePosteriorBackwardSignature = Tensors4(const OptionalTensor& grad_sample, const OptionalTensor& grad_kl,
                                                  const at::Tensor& loc, const OptionalTensor& rho,
                                                  const at::Tensor& seed, const OptionalTensor& prior_loc,
                                                  const OptionalTensor& prior_scale, Doubles prior, double scale_floor,
                                                  int64_t stream, int64_t num_samples, int64_t offset_add,
                                                  int64_t element_offset, std::array<bool, 4> output_mask);

using SampleListResult = std::tuple<std::vector<at::Tensor>, at::Tensor>;
using SampleListSignature = SampleListResult(at::TensorList loc, at::TensorList rho, const at::Tensor& seed,
                                             const OptionalTensors& prior_loc, const OptionalTensors& prior_scale,
                                             Doubles prior, c10::List<bool> with_kl, double scale_floor,
                                             at::IntArrayRef stream, int64_t offset_add, at::IntArrayRef element_offset,
                                             c10::List<bool> cast, std::optional<at::ScalarType> dtype);

using SampleListBackwardSignature = std::vector<at::Tensor>(
    const OptionalTensors& grad_sample, const OptionalTensor& grad_kl, at::TensorList loc, at::TensorList rho,
    const at::Tensor& seed, const OptionalTensors& prior_loc, const OptionalTensors& prior_scale, Doubles prior,
    double scale_floor, at::IntArrayRef stream, int64_t offset_add, at::IntArrayRef element_offset,
    c10::List<bool> output_mask);

using KlNormalSignature = at::Tensor(const at::Tensor& loc, const at::Tensor& rho, const OptionalTensor& prior_loc,
                                     const OptionalTensor& prior_scale, Doubles prior, double scale_floor);

using KlNormalBackwardSignature = Tensors4(const at::Tensor& grad_kl, const at::Tensor& loc, const at::Tensor& rho,
                                           const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                                           Doubles prior, double scale_floor, std::array<bool, 4> output_mask);

// Every non-tensor argument that bconv2d and bconv2d_backward share, and the two that only the
// bconv2d_affine operators have.
struct ConvOptions {
  std::array<double, 4> prior;  // weight loc, weight scale, bias loc, bias scale
  double scale_floor;
  double activation_param;
  bool weight_kl, bias_kl;
  std::array<int64_t, 2> stride;
  std::array<int64_t, 4> padding;  // top, bottom, left, right
  std::array<int64_t, 2> dilation;
  int64_t groups;
  int64_t activation;
  int64_t num_samples;
  bool share_input;
  int64_t offset_add;
  std::array<int64_t, 2> element_offset;  // weight, bias
  int64_t algorithm;
  int64_t estimator = 0;   // of core/estimator.h
  int64_t row_offset = 0;  // number of the first row of every draw
};

template <size_t kLength, typename T>
std::array<T, kLength> to_array(const char* name, c10::ArrayRef<T> values) {
  expect_length(name, kLength, values.size());
  std::array<T, kLength> out;
  std::copy(values.begin(), values.end(), out.begin());
  return out;
}

// The arguments between the tensors and keep_weight / output_mask, in schema order.
inline ConvOptions conv_options(Doubles prior, bool weight_kl, bool bias_kl, double scale_floor, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t activation,
                                double activation_param, int64_t num_samples, bool share_input, int64_t offset_add,
                                at::IntArrayRef element_offset, int64_t algorithm) {
  return {to_array<4>("prior", prior),
          scale_floor,
          activation_param,
          weight_kl,
          bias_kl,
          to_array<2>("stride", stride),
          to_array<4>("padding", padding),
          to_array<2>("dilation", dilation),
          groups,
          activation,
          num_samples,
          share_input,
          offset_add,
          to_array<2>("element_offset", element_offset),
          algorithm};
}

}  // namespace fbc
