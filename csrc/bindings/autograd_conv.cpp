// bconv2d under the Autograd key. Backward keeps the input, the output or pre-activation, the
// parameters and the seed: noise and weight are made again.
#include <torch/library.h>

#include "../core/activation.h"
#include "autograd.h"
#include "signatures.h"

namespace fbc {

namespace {

// Tensor arguments of bconv2d, in order.
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
  kSaved = kNumArguments,  // what is kept beside them
  kKeptWeight,
  kNumKept,
};
constexpr std::array<size_t, 9> kDifferentiable = {kInput,      kWeightLoc,    kWeightRho,
                                                   kBiasLoc,    kBiasRho,      kPriorLoc,
                                                   kPriorScale, kBiasPriorLoc, kBiasPriorScale};

// The options as two flat lists: autograd's saved_data holds no structs.
std::vector<double> pack_doubles(const ConvOptions& o) {
  return {o.prior[0], o.prior[1], o.prior[2], o.prior[3], o.scale_floor, o.activation_param};
}
std::vector<int64_t> pack_ints(const ConvOptions& o) {
  return {o.weight_kl,         o.bias_kl,     o.stride[0],  o.stride[1],
          o.padding[0],        o.padding[1],  o.padding[2], o.padding[3],
          o.dilation[0],       o.dilation[1], o.groups,     o.activation,
          o.num_samples,       o.share_input, o.offset_add, o.element_offset[0],
          o.element_offset[1], o.algorithm};
}
ConvOptions unpack(const std::vector<double>& d, const std::vector<int64_t>& i) {
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
  return o;
}

// Non-tensor arguments of one call, and where its non-differentiable outputs go.
struct CallExtras {
  ConvOptions options;
  bool keep_weight, save_pre_activation;
  at::Tensor *pre_activation, *weight;
};

Tensors4 call_bconv2d(const at::Tensor& input, const at::Tensor& weight_loc,
                      const OptionalTensor& weight_rho, const OptionalTensor& bias_loc,
                      const OptionalTensor& bias_rho, const at::Tensor& seed,
                      const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                      const OptionalTensor& bias_prior_loc, const OptionalTensor& bias_prior_scale,
                      const ConvOptions& o, bool keep_weight, bool save_pre_activation) {
  static const auto op = find_op<Bconv2dSignature>("fastbconv::bconv2d");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(input, weight_loc, weight_rho, bias_loc, bias_rho, seed, prior_loc, prior_scale,
                 bias_prior_loc, bias_prior_scale, o.prior, o.weight_kl, o.bias_kl, o.scale_floor,
                 o.stride, o.padding, o.dilation, o.groups, o.activation, o.activation_param,
                 o.num_samples, o.share_input, o.offset_add, o.element_offset, o.algorithm,
                 keep_weight, save_pre_activation);
}

Tensors9 call_backward(const variable_list& kept, const at::Tensor& grad_output,
                       const at::Tensor& grad_kl, const ConvOptions& o,
                       const std::array<bool, 9>& mask) {
  static const auto op = find_op<Bconv2dBackwardSignature>("fastbconv::bconv2d_backward");
  return op.call(grad_output, or_nullopt(grad_kl), kept[kInput], or_nullopt(kept[kSaved]),
                 or_nullopt(kept[kKeptWeight]), kept[kWeightLoc], or_nullopt(kept[kWeightRho]),
                 or_nullopt(kept[kBiasLoc]), or_nullopt(kept[kBiasRho]), kept[kSeed],
                 or_nullopt(kept[kPriorLoc]), or_nullopt(kept[kPriorScale]),
                 or_nullopt(kept[kBiasPriorLoc]), or_nullopt(kept[kBiasPriorScale]), o.prior,
                 o.weight_kl, o.bias_kl, o.scale_floor, o.stride, o.padding, o.dilation, o.groups,
                 o.activation, o.activation_param, o.num_samples, o.share_input, o.offset_add,
                 o.element_offset, o.algorithm, mask);
}

// Only the KL was used: no pixel is touched. grads in the order loc, rho, prior_loc, prior_scale.
Tensors4 kl_backward(const variable_list& kept, bool with_kl, size_t loc, size_t rho,
                     size_t prior_loc, size_t prior_scale, const at::Tensor& grad_kl, Doubles prior,
                     double scale_floor, std::array<bool, 4> mask) {
  static const auto op = find_op<KlNormalBackwardSignature>("fastbconv::kl_normal_backward");
  const bool any = mask[0] || mask[1] || mask[2] || mask[3];
  if (!with_kl || !any || !kept[rho].defined()) return {};
  return op.call(grad_kl, kept[loc], kept[rho], or_nullopt(kept[prior_loc]),
                 or_nullopt(kept[prior_scale]), prior, scale_floor, mask);
}

Tensors9 call_kl_backward(const variable_list& kept, const at::Tensor& grad_kl,
                          const ConvOptions& o, const std::array<bool, 9>& mask) {
  const Doubles prior = o.prior;
  const auto [w_loc, w_rho, w_prior_loc, w_prior_scale] =
      kl_backward(kept, o.weight_kl, kWeightLoc, kWeightRho, kPriorLoc, kPriorScale, grad_kl,
                  prior.slice(0, 2), o.scale_floor, {mask[1], mask[2], mask[5], mask[6]});
  const auto [b_loc, b_rho, b_prior_loc, b_prior_scale] =
      kl_backward(kept, o.bias_kl, kBiasLoc, kBiasRho, kBiasPriorLoc, kBiasPriorScale, grad_kl,
                  prior.slice(2, 2), o.scale_floor, {mask[3], mask[4], mask[7], mask[8]});
  return {at::Tensor(), w_loc,         w_rho,       b_loc,        b_rho,
          w_prior_loc,  w_prior_scale, b_prior_loc, b_prior_scale};
}

class Bconv2dFunction : public torch::autograd::Function<Bconv2dFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input,
                               const at::Tensor& weight_loc, const OptionalTensor& weight_rho,
                               const OptionalTensor& bias_loc, const OptionalTensor& bias_rho,
                               const at::Tensor& seed, const OptionalTensor& prior_loc,
                               const OptionalTensor& prior_scale,
                               const OptionalTensor& bias_prior_loc,
                               const OptionalTensor& bias_prior_scale, const CallExtras& extras) {
    const auto activation = static_cast<Activation>(extras.options.activation);
    const bool needs_pre = needs_pre_activation(activation);
    auto [output, kl, pre_activation, weight] =
        call_bconv2d(input, weight_loc, weight_rho, bias_loc, bias_rho, seed, prior_loc,
                     prior_scale, bias_prior_loc, bias_prior_scale, extras.options,
                     extras.keep_weight, extras.save_pre_activation || needs_pre);
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
    if (activation != Activation::kLinear) kept[kSaved] = needs_pre ? pre_activation : output;
    if (extras.keep_weight) kept[kKeptWeight] = weight;
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["doubles"] = pack_doubles(extras.options);
    ctx->saved_data["ints"] = pack_ints(extras.options);
    ctx->set_materialize_grads(false);
    const bool only_saved = needs_pre && !extras.save_pre_activation;
    *extras.pre_activation = only_saved ? pre_activation.new_empty({0}) : pre_activation;
    *extras.weight = weight;
    return {output, kl};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list kept = ctx->get_saved_variables();
    const ConvOptions options =
        unpack(ctx->saved_data["doubles"].toDoubleVector(), ctx->saved_data["ints"].toIntVector());
    std::vector<bool> defined(kNumArguments);
    for (size_t i = 0; i < kNumArguments; ++i) defined[i] = kept[i].defined();
    const auto mask = output_mask(ctx, defined, kDifferentiable);
    variable_list out(kNumArguments + 1);
    if (!grads[0].defined() && !grads[1].defined()) return out;
    const Tensors9 g = grads[0].defined() ? call_backward(kept, grads[0], grads[1], options, mask)
                                          : call_kl_backward(kept, grads[1], options, mask);
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
};

Tensors4 bconv2d_autograd(const at::Tensor& input, const at::Tensor& weight_loc,
                          const OptionalTensor& weight_rho, const OptionalTensor& bias_loc,
                          const OptionalTensor& bias_rho, const at::Tensor& seed,
                          const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                          const OptionalTensor& bias_prior_loc,
                          const OptionalTensor& bias_prior_scale, Doubles prior, bool weight_kl,
                          bool bias_kl, double scale_floor, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                          int64_t activation, double activation_param, int64_t num_samples,
                          bool share_input, int64_t offset_add, at::IntArrayRef element_offset,
                          int64_t algorithm, bool keep_weight, bool save_pre_activation) {
  refuse_forward_mode("fastbconv::bconv2d", input, weight_loc, weight_rho, bias_loc, bias_rho,
                      prior_loc, prior_scale, bias_prior_loc, bias_prior_scale);
  at::Tensor pre_activation, weight;
  const CallExtras extras = {
      conv_options(prior, weight_kl, bias_kl, scale_floor, stride, padding, dilation, groups,
                   activation, activation_param, num_samples, share_input, offset_add,
                   element_offset, algorithm),
      keep_weight, save_pre_activation, &pre_activation, &weight};
  if (!records_graph(input, weight_loc, weight_rho, bias_loc, bias_rho, prior_loc, prior_scale,
                     bias_prior_loc, bias_prior_scale)) {
    return call_bconv2d(input, weight_loc, weight_rho, bias_loc, bias_rho, seed, prior_loc,
                        prior_scale, bias_prior_loc, bias_prior_scale, extras.options, keep_weight,
                        save_pre_activation);
  }
  const variable_list out =
      Bconv2dFunction::apply(input, weight_loc, weight_rho, bias_loc, bias_rho, seed, prior_loc,
                             prior_scale, bias_prior_loc, bias_prior_scale, extras);
  return {out[0], out[1], pre_activation, weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, Autograd, m) { m.impl("bconv2d", bconv2d_autograd); }

}  // namespace fbc
