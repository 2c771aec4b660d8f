// Activations of the library provider: ATen's own vectorised functions, so that it costs what the
// same layer costs in PyTorch. Formulas and ids: csrc/core/activation.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/activation.h"

namespace fbc {

// z <- activation(z)
void activate_in_place(at::Tensor& z, Activation activation, double param);

// grad * activation'(saved), saved being the output or, where needs_pre_activation(), z.
at::Tensor activation_gradient(const at::Tensor& grad, const at::Tensor& saved, Activation activation, double param);

}  // namespace fbc
