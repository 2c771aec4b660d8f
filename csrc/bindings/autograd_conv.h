// What the autograd formulas of the convolutions share: the order of their arguments, their options
// as autograd keeps them, and the gradients of a KL that is used alone.
#pragma once

#include "autograd.h"
#include "signatures.h"

namespace fbc {

// Tensor arguments of a convolution, in order.
enum Argument : size_t {
  kInput,
  kWeightLoc,
  kWeightRho,
  kBiasLoc,
  kBiasRho,
  kSeed,
  kPriorLoc,
  kPriorScale,
  kBiasPriorLoc,
  kBiasPriorScale,
  kNumArguments,
  kSaved = kNumArguments,    // what is kept beside them
  kKeptWeight,               // bconv2d
  kDeviation = kKeptWeight,  // bconv2d_affine
  kNumKept,
};
constexpr std::array<size_t, 9> kDifferentiable = {kInput,    kWeightLoc,  kWeightRho,    kBiasLoc,       kBiasRho,
                                                   kPriorLoc, kPriorScale, kBiasPriorLoc, kBiasPriorScale};

// The options as two flat lists: autograd's saved_data holds no structs.
inline std::vector<double> pack_doubles(const ConvOptions& o) {
  return {o.prior[0], o.prior[1], o.prior[2], o.prior[3], o.scale_floor, o.activation_param};
}
inline std::vector<int64_t> pack_ints(const ConvOptions& o) {
  return {
      o.weight_kl,  o.bias_kl,           o.stride[0],         o.stride[1], o.padding[0], o.padding[1],  o.padding[2],
      o.padding[3], o.dilation[0],       o.dilation[1],       o.groups,    o.activation, o.num_samples, o.share_input,
      o.offset_add, o.element_offset[0], o.element_offset[1], o.algorithm, o.estimator,  o.row_offset};
}
inline ConvOptions unpack(const std::vector<double>& d, const std::vector<int64_t>& i) {
  ConvOptions o = {};
  o.prior = {d[0], d[1], d[2], d[3]};
  o.scale_floor = d[4];
  o.activation_param = d[5];
  o.weight_kl = i[0] != 0;
  o.bias_kl = i[1] != 0;
  o.stride = {i[2], i[3]};
  o.padding = {i[4], i[5], i[6], i[7]};
  o.dilation = {i[8], i[9]};
  o.groups = i[10];
  o.activation = i[11];
  o.num_samples = i[12];
  o.share_input = i[13] != 0;
  o.offset_add = i[14];
  o.element_offset = {i[15], i[16]};
  o.algorithm = i[17];
  o.estimator = i[18];
  o.row_offset = i[19];
  return o;
}

// Only the KL was used: no pixel is touched. grads in the order loc, rho, prior_loc, prior_scale.
inline Tensors4 kl_backward(const variable_list& kept, bool with_kl, size_t loc, size_t rho, size_t prior_loc,
                            size_t prior_scale, const at::Tensor& grad_kl, Doubles prior, double scale_floor,
                            std::array<bool, 4> mask) {
  static const auto op = find_op<KlNormalBackwardSignature>("fastbconv::kl_normal_backward");
  const bool any = mask[0] || mask[1] || mask[2] || mask[3];
  if (!with_kl || !any || !kept[rho].defined()) return {};
  return op.call(grad_kl, kept[loc], kept[rho], or_nullopt(kept[prior_loc]), or_nullopt(kept[prior_scale]), prior,
                 scale_floor, mask);
}

inline Tensors9 call_kl_backward(const variable_list& kept, const at::Tensor& grad_kl, const ConvOptions& o,
                                 const std::array<bool, 9>& mask) {
  const Doubles prior = o.prior;
  const auto [w_loc, w_rho, w_prior_loc, w_prior_scale] =
      kl_backward(kept, o.weight_kl, kWeightLoc, kWeightRho, kPriorLoc, kPriorScale, grad_kl, prior.slice(0, 2),
                  o.scale_floor, {mask[1], mask[2], mask[5], mask[6]});
  const auto [b_loc, b_rho, b_prior_loc, b_prior_scale] =
      kl_backward(kept, o.bias_kl, kBiasLoc, kBiasRho, kBiasPriorLoc, kBiasPriorScale, grad_kl, prior.slice(2, 2),
                  o.scale_floor, {mask[3], mask[4], mask[7], mask[8]});
  return {at::Tensor(), w_loc, w_rho, b_loc, b_rho, w_prior_loc, w_prior_scale, b_prior_loc, b_prior_scale};
}

inline variable_list kept_arguments(const at::Tensor& input, const at::Tensor& weight_loc,
                                    const OptionalTensor& weight_rho, const OptionalTensor& bias_loc,
                                    const OptionalTensor& bias_rho, const at::Tensor& seed,
                                    const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                                    const OptionalTensor& bias_prior_loc, const OptionalTensor& bias_prior_scale) {
  variable_list kept(kNumKept);
  kept[kInput] = input;
  kept[kWeightLoc] = weight_loc;
  kept[kWeightRho] = or_undefined(weight_rho);
  kept[kBiasLoc] = or_undefined(bias_loc);
  kept[kBiasRho] = or_undefined(bias_rho);
  kept[kSeed] = seed;
  kept[kPriorLoc] = or_undefined(prior_loc);
  kept[kPriorScale] = or_undefined(prior_scale);
  kept[kBiasPriorLoc] = or_undefined(bias_prior_loc);
  kept[kBiasPriorScale] = or_undefined(bias_prior_scale);
  return kept;
}

inline std::array<bool, 9> conv_output_mask(AutogradContext* ctx, const variable_list& kept) {
  std::vector<bool> defined(kNumArguments);
  for (size_t i = 0; i < kNumArguments; ++i) defined[i] = kept[i].defined();
  return output_mask(ctx, defined, kDifferentiable);
}

// The nine gradients in the places of their arguments.
inline variable_list gradients_by_argument(const Tensors9& g, const std::array<bool, 9>& mask) {
  variable_list out(kNumArguments + 1);
  out[kInput] = if_wanted(mask[0], std::get<0>(g));
  out[kWeightLoc] = if_wanted(mask[1], std::get<1>(g));
  out[kWeightRho] = if_wanted(mask[2], std::get<2>(g));
  out[kBiasLoc] = if_wanted(mask[3], std::get<3>(g));
  out[kBiasRho] = if_wanted(mask[4], std::get<4>(g));
  out[kPriorLoc] = if_wanted(mask[5], std::get<5>(g));
  out[kPriorScale] = if_wanted(mask[6], std::get<6>(g));
  out[kBiasPriorLoc] = if_wanted(mask[7], std::get<7>(g));
  out[kBiasPriorScale] = if_wanted(mask[8], std::get<8>(g));
  return out;
}

}  // namespace fbc
