// bconv2d under the Autograd key. Backward keeps the input, the output or pre-activation, the
// parameters and the seed: noise and weight are made again.
#include <torch/library.h>

#include "../core/activation.h"
#include "autograd_conv.h"

namespace fbc {

namespace {

// Non-tensor arguments of one call, and where its non-differentiable outputs go.
struct CallExtras {
  ConvOptions options;
  bool keep_weight, save_pre_activation;
  at::Tensor *pre_activation, *weight;
};

Tensors4 call_bconv2d(const at::Tensor& input, const at::Tensor& weight_loc, const OptionalTensor& weight_rho,
                      const OptionalTensor& bias_loc, const OptionalTensor& bias_rho, const at::Tensor& seed,
                      const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                      const OptionalTensor& bias_prior_loc, const OptionalTensor& bias_prior_scale,
                      const ConvOptions& o, bool keep_weight, bool save_pre_activation) {
  static const auto op = find_op<Bconv2dSignature>("fastbconv::bconv2d");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(input, weight_loc, weight_rho, bias_loc, bias_rho, seed, prior_loc, prior_scale, bias_prior_loc,
                 bias_prior_scale, o.prior, o.weight_kl, o.bias_kl, o.scale_floor, o.stride, o.padding, o.dilation,
                 o.groups, o.activation, o.activation_param, o.num_samples, o.share_input, o.offset_add,
                 o.element_offset, o.algorithm, keep_weight, save_pre_activation);
}

Tensors9 call_backward(const variable_list& kept, const at::Tensor& grad_output, const at::Tensor& grad_kl,
                       const ConvOptions& o, const std::array<bool, 9>& mask) {
  static const auto op = find_op<Bconv2dBackwardSignature>("fastbconv::bconv2d_backward");
  return op.call(grad_output, or_nullopt(grad_kl), kept[kInput], or_nullopt(kept[kSaved]),
                 or_nullopt(kept[kKeptWeight]), kept[kWeightLoc], or_nullopt(kept[kWeightRho]),
                 or_nullopt(kept[kBiasLoc]), or_nullopt(kept[kBiasRho]), kept[kSeed], or_nullopt(kept[kPriorLoc]),
                 or_nullopt(kept[kPriorScale]), or_nullopt(kept[kBiasPriorLoc]), or_nullopt(kept[kBiasPriorScale]),
                 o.prior, o.weight_kl, o.bias_kl, o.scale_floor, o.stride, o.padding, o.dilation, o.groups,
                 o.activation, o.activation_param, o.num_samples, o.share_input, o.offset_add, o.element_offset,
                 o.algorithm, mask);
}

class Bconv2dFunction : public torch::autograd::Function<Bconv2dFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight_loc,
                               const OptionalTensor& weight_rho, const OptionalTensor& bias_loc,
                               const OptionalTensor& bias_rho, const at::Tensor& seed, const OptionalTensor& prior_loc,
                               const OptionalTensor& prior_scale, const OptionalTensor& bias_prior_loc,
                               const OptionalTensor& bias_prior_scale, const CallExtras& extras) {
    const auto activation = static_cast<Activation>(extras.options.activation);
    const bool needs_pre = needs_pre_activation(activation);
    auto [output, kl, pre_activation, weight] =
        call_bconv2d(input, weight_loc, weight_rho, bias_loc, bias_rho, seed, prior_loc, prior_scale, bias_prior_loc,
                     bias_prior_scale, extras.options, extras.keep_weight, extras.save_pre_activation || needs_pre);
    variable_list kept = kept_arguments(input, weight_loc, weight_rho, bias_loc, bias_rho, seed, prior_loc, prior_scale,
                                        bias_prior_loc, bias_prior_scale);
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
    const auto mask = conv_output_mask(ctx, kept);
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kNumArguments + 1);
    const Tensors9 g = grads[0].defined() ? call_backward(kept, grads[0], grads[1], options, mask)
                                          : call_kl_backward(kept, grads[1], options, mask);
    return gradients_by_argument(g, mask);
  }
};

Tensors4 bconv2d_autograd(const at::Tensor& input, const at::Tensor& weight_loc, const OptionalTensor& weight_rho,
                          const OptionalTensor& bias_loc, const OptionalTensor& bias_rho, const at::Tensor& seed,
                          const OptionalTensor& prior_loc, const OptionalTensor& prior_scale,
                          const OptionalTensor& bias_prior_loc, const OptionalTensor& bias_prior_scale, Doubles prior,
                          bool weight_kl, bool bias_kl, double scale_floor, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t activation,
                          double activation_param, int64_t num_samples, bool share_input, int64_t offset_add,
                          at::IntArrayRef element_offset, int64_t algorithm, bool keep_weight,
                          bool save_pre_activation) {
  refuse_forward_mode("fastbconv::bconv2d", input, weight_loc, weight_rho, bias_loc, bias_rho, prior_loc, prior_scale,
                      bias_prior_loc, bias_prior_scale);
  at::Tensor pre_activation, weight;
  const CallExtras extras = {
      conv_options(prior, weight_kl, bias_kl, scale_floor, stride, padding, dilation, groups, activation,
                   activation_param, num_samples, share_input, offset_add, element_offset, algorithm),
      keep_weight, save_pre_activation, &pre_activation, &weight};
  if (!records_graph(input, weight_loc, weight_rho, bias_loc, bias_rho, prior_loc, prior_scale, bias_prior_loc,
                     bias_prior_scale)) {
    return call_bconv2d(input, weight_loc, weight_rho, bias_loc, bias_rho, seed, prior_loc, prior_scale, bias_prior_loc,
                        bias_prior_scale, extras.options, keep_weight, save_pre_activation);
  }
  const variable_list out = Bconv2dFunction::apply(input, weight_loc, weight_rho, bias_loc, bias_rho, seed, prior_loc,
                                                   prior_scale, bias_prior_loc, bias_prior_scale, extras);
  return {out[0], out[1], pre_activation, weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, Autograd, m) { m.impl("bconv2d", bconv2d_autograd); }

}  // namespace fbc
