// What the autograd formulas of this folder share.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_unsafe_view.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <initializer_list>
#include <vector>

#include "checks.h"

namespace fbc {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline at::Tensor or_undefined(const OptionalTensor& tensor) { return tensor.has_value() ? *tensor : at::Tensor(); }
inline OptionalTensor or_nullopt(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const OptionalTensor& tensor) { return tensor.has_value() && has_tangent(*tensor); }

// Without this check forward mode would go on with zeros.
template <typename... Tensors>
void refuse_forward_mode(const char* op, const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(tensors) || ...), op,
                              ": expected reverse-mode differentiation, got a dual tensor; forward-mode "
                              "derivatives are not implemented, use torch.autograd.grad or torch.func.grad");
}

// An operator's result in another shape. No view as autograd sees it, for FSDP2 warns of modules that return
// one; but the operator may have saved its result, so that what changes one in place has to show in the other.
inline at::Tensor reshaped(const at::Tensor& output, at::IntArrayRef shape) {
  at::Tensor result = at::_unsafe_view(output, shape);
  if (!output.is_inference()) {
    torch::autograd::impl::set_version_counter(result, torch::autograd::impl::version_counter(output));
  }
  return result;
}

inline bool wants_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool wants_grad(const OptionalTensor& tensor) { return tensor.has_value() && wants_grad(*tensor); }
template <typename... Tensors>
bool records_graph(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (wants_grad(tensors) || ...);
}

// ctx->needs_input_grad() counts defined tensor arguments only. `defined` tells, per tensor
// argument, whether it was there; `differentiable` names the arguments that have a gradient.
template <size_t kCount>
std::array<bool, kCount> output_mask(AutogradContext* ctx, const std::vector<bool>& defined,
                                     const std::array<size_t, kCount>& differentiable) {
  std::vector<size_t> edge(defined.size(), 0);
  for (size_t i = 1; i < defined.size(); ++i) edge[i] = edge[i - 1] + (defined[i - 1] ? 1 : 0);
  std::array<bool, kCount> mask = {};
  for (size_t i = 0; i < kCount; ++i) {
    const size_t argument = differentiable[i];
    mask[i] = defined[argument] && ctx->needs_input_grad(edge[argument]);
  }
  return mask;
}

inline at::Tensor if_wanted(bool wanted, const at::Tensor& grad) { return wanted ? grad : at::Tensor(); }

}  // namespace fbc
