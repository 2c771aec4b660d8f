// sample_posterior and kl_normal under the Autograd key, the refusal of second derivatives by every
// *_backward operator, and the operators that have no derivative.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "autograd.h"
#include "signatures.h"

namespace fbc {

namespace {

class SamplePosteriorFunction : public torch::autograd::Function<SamplePosteriorFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& loc, const OptionalTensor& rho,
                               const at::Tensor& seed, const OptionalTensor& prior_loc,
                               const OptionalTensor& prior_scale, Doubles prior, bool with_kl, double scale_floor,
                               int64_t stream, int64_t num_samples, int64_t offset_add, int64_t element_offset,
                               std::optional<at::ScalarType> dtype) {
    static const auto op = find_op<SamplePosteriorSignature>("fastbconv::sample_posterior");
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [sample, kl] = op.call(loc, rho, seed, prior_loc, prior_scale, prior, with_kl, scale_floor, stream,
                                      num_samples, offset_add, element_offset, dtype);
    ctx->save_for_backward({loc, or_undefined(rho), seed, or_undefined(prior_loc), or_undefined(prior_scale)});
    ctx->saved_data["doubles"] = std::vector<double>{prior[0], prior[1], scale_floor};
    ctx->saved_data["ints"] = std::vector<int64_t>{with_kl, stream, num_samples, offset_add, element_offset};
    ctx->set_materialize_grads(false);
    return {sample, kl};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<SamplePosteriorBackwardSignature>("fastbconv::sample_posterior_backward");
    constexpr size_t kForwardArguments = 13;
    const variable_list kept = ctx->get_saved_variables();
    std::vector<bool> defined;
    for (const auto& tensor : kept) defined.push_back(tensor.defined());
    const auto mask = output_mask<4>(ctx, defined, {0, 1, 3, 4});
    const auto d = ctx->saved_data["doubles"].toDoubleVector();
    const auto i = ctx->saved_data["ints"].toIntVector();
    const at::Tensor grad_kl = i[0] != 0 ? grads[1] : at::Tensor();
    variable_list out(kForwardArguments);
    if (!grads[0].defined() && !grad_kl.defined()) return out;
    const auto g =
        op.call(or_nullopt(grads[0]), or_nullopt(grad_kl), kept[0], or_nullopt(kept[1]), kept[2], or_nullopt(kept[3]),
                or_nullopt(kept[4]), Doubles(d).slice(0, 2), d[2], i[1], i[2], i[3], i[4], mask);
    out[0] = if_wanted(mask[0], std::get<0>(g));
    out[1] = if_wanted(mask[1], std::get<1>(g));
    out[3] = if_wanted(mask[2], std::get<2>(g));
    out[4] = if_wanted(mask[3], std::get<3>(g));
    return out;
  }
};

Tensors2 sample_posterior_autograd(const at::Tensor& loc, const OptionalTensor& rho, const at::Tensor& seed,
                                   const OptionalTensor& prior_loc, const OptionalTensor& prior_scale, Doubles prior,
                                   bool with_kl, double scale_floor, int64_t stream, int64_t num_samples,
                                   int64_t offset_add, int64_t element_offset, std::optional<at::ScalarType> dtype) {
  refuse_forward_mode("fastbconv::sample_posterior", loc, rho, prior_loc, prior_scale);
  expect_length("prior", 2, prior.size());
  const auto out = SamplePosteriorFunction::apply(loc, rho, seed, prior_loc, prior_scale, prior, with_kl, scale_floor,
                                                  stream, num_samples, offset_add, element_offset, dtype);
  return {out[0], out[1]};
}

class KlNormalFunction : public torch::autograd::Function<KlNormalFunction> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& loc, const at::Tensor& rho,
                            const OptionalTensor& prior_loc, const OptionalTensor& prior_scale, Doubles prior,
                            double scale_floor) {
    static const auto op = find_op<KlNormalSignature>("fastbconv::kl_normal");
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({loc, rho, or_undefined(prior_loc), or_undefined(prior_scale)});
    ctx->saved_data["doubles"] = std::vector<double>{prior[0], prior[1], scale_floor};
    ctx->set_materialize_grads(false);
    return op.call(loc, rho, prior_loc, prior_scale, prior, scale_floor);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<KlNormalBackwardSignature>("fastbconv::kl_normal_backward");
    constexpr size_t kForwardArguments = 6;
    variable_list out(kForwardArguments);
    if (!grads[0].defined()) return out;
    const variable_list kept = ctx->get_saved_variables();
    std::vector<bool> defined;
    for (const auto& tensor : kept) defined.push_back(tensor.defined());
    const auto mask = output_mask<4>(ctx, defined, {0, 1, 2, 3});
    const auto d = ctx->saved_data["doubles"].toDoubleVector();
    const auto g = op.call(grads[0], kept[0], kept[1], or_nullopt(kept[2]), or_nullopt(kept[3]), Doubles(d).slice(0, 2),
                           d[2], mask);
    out[0] = if_wanted(mask[0], std::get<0>(g));
    out[1] = if_wanted(mask[1], std::get<1>(g));
    out[2] = if_wanted(mask[2], std::get<2>(g));
    out[3] = if_wanted(mask[3], std::get<3>(g));
    return out;
  }
};

at::Tensor kl_normal_autograd(const at::Tensor& loc, const at::Tensor& rho, const OptionalTensor& prior_loc,
                              const OptionalTensor& prior_scale, Doubles prior, double scale_floor) {
  refuse_forward_mode("fastbconv::kl_normal", loc, rho, prior_loc, prior_scale);
  expect_length("prior", 2, prior.size());
  return KlNormalFunction::apply(loc, rho, prior_loc, prior_scale, prior, scale_floor);
}

// The node behind the outputs of a *_backward operator.
struct RefuseDoubleBackward : torch::autograd::Node {
  explicit RefuseDoubleBackward(std::string op) : op_(std::move(op)) {}
  variable_list apply(variable_list&&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, op_,
                                ": expected a first derivative, got a second one; double "
                                "backward is not implemented, use algorithm 'reference' for it");
  }
  std::string name() const override { return "RefuseDoubleBackward"; }

 private:
  std::string op_;
};

// Nodes are held by shared_ptr up to torch 2.11 and by intrusive_ptr since; the type of an edge
// tells.
template <typename NodeType, typename Pointer = decltype(torch::autograd::Edge::function)>
Pointer make_node(const std::string& op) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return Pointer(new NodeType(op));
  } else {
    return c10::make_intrusive<NodeType>(op);
  }
}

void append_tensors(const c10::IValue& value, variable_list* out) {
  if (value.isTensor()) {
    out->push_back(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) out->push_back(tensor);
  } else if (value.isList()) {
    for (const c10::IValue& entry : value.toListRef()) append_tensors(entry, out);
  }
}

// Boxed: one kernel for all of them. It is passed on the way only where a graph is recorded or
// traced.
void backward_op_autograd(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = op.schema().name();
  variable_list inputs;
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  for (const c10::IValue& argument : arguments) append_tensors(argument, &inputs);
  for (const at::Tensor& input : inputs) refuse_forward_mode(name.c_str(), input);
  const bool record = torch::autograd::compute_requires_grad(inputs);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  if (!record) return;
  const auto node = make_node<RefuseDoubleBackward>(name);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  variable_list grads;
  for (const c10::IValue& result : torch::jit::last(*stack, op.schema().returns().size()))
    append_tensors(result, &grads);
  for (at::Tensor& grad : grads)
    if (grad.numel() > 0) torch::autograd::set_history(grad, node);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, Autograd, m) {
  m.impl("sample_posterior", sample_posterior_autograd);
  m.impl("kl_normal", kl_normal_autograd);
  m.impl("bconv2d_backward", torch::CppFunction::makeFromBoxedFunction<&backward_op_autograd>());
  m.impl("bconv2d_affine_backward", torch::CppFunction::makeFromBoxedFunction<&backward_op_autograd>());
  m.impl("sample_posterior_backward", torch::CppFunction::makeFromBoxedFunction<&backward_op_autograd>());
  m.impl("sample_posterior_list_backward", torch::CppFunction::makeFromBoxedFunction<&backward_op_autograd>());
  m.impl("kl_normal_backward", torch::CppFunction::makeFromBoxedFunction<&backward_op_autograd>());
  m.impl("random_signs", torch::CppFunction::makeFallthrough());
  m.impl("standard_normal", torch::CppFunction::makeFallthrough());  // integers in, no derivative
  m.impl("derive_seeds", torch::CppFunction::makeFallthrough());
  m.impl("philox4x32_10", torch::CppFunction::makeFallthrough());
}

}  // namespace fbc
