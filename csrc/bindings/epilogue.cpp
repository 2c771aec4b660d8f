#include "epilogue.h"

#include <ATen/ops/abs.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mish_backward.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>

namespace fbc {

namespace {

// Two formulas that ATen has no single function for: formed in float32 and rounded once.
void softsign_in_place(at::Tensor& z) {
  const at::Tensor wide = z.scalar_type() == at::kDouble ? z : z.to(at::kFloat);
  z.copy_(wide.div(wide.abs().add_(1)));
}

void hard_sigmoid_in_place(at::Tensor& z) {
  const at::Tensor wide = z.scalar_type() == at::kDouble ? z : z.to(at::kFloat);
  z.copy_(wide.mul(0.2).add_(0.5).clamp_(0, 1));
}

}  // namespace

void activate_in_place(at::Tensor& z, Activation activation, double param) {
  using Selu = ActivationConstants<double>;
  switch (activation) {
    case Activation::kLinear: return;
    case Activation::kRelu: z.relu_(); return;
    case Activation::kRelu6: z.clamp_(0, 6); return;
    case Activation::kLeakyRelu: at::leaky_relu_(z, param); return;
    case Activation::kElu: at::elu_(z, param); return;
    case Activation::kSelu: at::elu_(z, Selu::kSeluAlpha, Selu::kSeluScale, 1); return;
    case Activation::kSigmoid: z.sigmoid_(); return;
    case Activation::kTanh: z.tanh_(); return;
    case Activation::kSoftplus: at::softplus_out(z, z, 1, 40); return;
    case Activation::kSoftsign: softsign_in_place(z); return;
    case Activation::kExponential: z.exp_(); return;
    case Activation::kHardSigmoid: hard_sigmoid_in_place(z); return;
    case Activation::kHardSigmoidTorch: at::hardsigmoid_(z); return;
    case Activation::kSilu: at::silu_(z); return;
    case Activation::kMish: at::mish_(z); return;
    case Activation::kGelu: at::gelu_(z); return;
    case Activation::kGeluTanh: at::gelu_(z, "tanh"); return;
  }
}

at::Tensor activation_gradient(const at::Tensor& grad, const at::Tensor& saved, Activation activation, double param) {
  using Selu = ActivationConstants<double>;
  const at::Tensor& y = saved;
  switch (activation) {
    case Activation::kLinear: return grad;
    case Activation::kRelu: return at::threshold_backward(grad, y, 0);
    case Activation::kRelu6: return at::hardtanh_backward(grad, y, 0, 6);
    case Activation::kLeakyRelu: return at::leaky_relu_backward(grad, y, param, true);
    case Activation::kElu: return at::elu_backward(grad, param, 1, 1, true, y);
    case Activation::kSelu: return at::elu_backward(grad, Selu::kSeluAlpha, Selu::kSeluScale, 1, true, y);
    case Activation::kSigmoid: return at::sigmoid_backward(grad, y);
    case Activation::kTanh: return at::tanh_backward(grad, y);
    case Activation::kSoftplus: return y.neg().expm1_().neg_().mul_(grad);
    case Activation::kSoftsign: return y.abs().neg_().add_(1).square_().mul_(grad);
    case Activation::kExponential: return grad.mul(y);
    case Activation::kHardSigmoid: return at::hardtanh_backward(grad, y, 0, 1).mul_(0.2);
    case Activation::kHardSigmoidTorch: return at::hardtanh_backward(grad, y, 0, 1).div_(6);
    case Activation::kSilu: return at::silu_backward(grad, saved);
    case Activation::kMish: return at::mish_backward(grad, saved);
    case Activation::kGelu: return at::gelu_backward(grad, saved);
    case Activation::kGeluTanh: return at::gelu_backward(grad, saved, "tanh");
  }
  return grad;
}

}  // namespace fbc
