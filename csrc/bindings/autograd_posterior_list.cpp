// sample_posterior_list under the Autograd key: one node for all its posteriors. Kept are the
// parameters, the prior tensors and the seeds.
//
// Several backward passes may come to the node, one for each part of a model that has a loss of its
// own, as they would to as many nodes. So nothing is handed to save_for_backward(), which is empty
// after the first of them: what is kept belongs to others anyway, and costs 16 bytes a posterior.
#include <ATen/ops/clone.h>
#include <torch/library.h>

#include <algorithm>

#include "autograd.h"
#include "signatures.h"

namespace fbc {

namespace {

// Non-tensor arguments of one call, and which of the 4 n tensors loc, rho, prior_loc, prior_scale
// are there.
struct ListCall {
  std::vector<double> prior;
  double scale_floor;
  std::vector<int64_t> stream, element_offset, with_kl, present;
  int64_t offset_add;
  c10::List<bool> cast;
  std::optional<at::ScalarType> dtype;

  size_t count() const { return stream.size(); }
};

// Tensors of inference mode have none.
int64_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
}

OptionalTensors optional_list(const at::Tensor* tensors, size_t count) {
  OptionalTensors out;
  out.reserve(count);
  for (size_t i = 0; i < count; ++i) out.push_back(or_nullopt(tensors[i]));
  return out;
}

// The 4 n tensors, undefined where absent, from those that are present.
variable_list spread(at::TensorList tensors, const std::vector<int64_t>& present) {
  variable_list out(present.size());
  size_t next = 0;
  for (size_t i = 0; i < present.size(); ++i)
    if (present[i] != 0) out[i] = tensors[next++];
  return out;
}

SampleListResult call_list(at::TensorList tensors, const at::Tensor& seed, const ListCall& call) {
  static const auto op = find_op<SampleListSignature>("fastbconv::sample_posterior_list");
  at::AutoDispatchBelowADInplaceOrView guard;
  const size_t n = call.count();
  const variable_list all = spread(tensors, call.present);
  c10::List<bool> with_kl;
  for (const int64_t flag : call.with_kl) with_kl.push_back(flag != 0);
  return op.call(at::TensorList(all).slice(0, n), at::TensorList(all).slice(n, n), seed,
                 optional_list(all.data() + 2 * n, n), optional_list(all.data() + 3 * n, n), call.prior, with_kl,
                 call.scale_floor, call.stream, call.offset_add, call.element_offset, call.cast, call.dtype);
}

// The gradient by the KLs, zero where no KL was asked for; undefined where none was.
at::Tensor wanted_kl_gradient(const at::Tensor& grad, at::IntArrayRef with_kl) {
  const auto wanted = std::count(with_kl.begin(), with_kl.end(), 1);
  if (!grad.defined() || wanted == 0) return {};
  if (wanted == static_cast<int64_t>(with_kl.size())) return grad;
  const at::Tensor masked = grad.clone();
  for (size_t i = 0; i < with_kl.size(); ++i)
    if (with_kl[i] == 0) masked.select(0, static_cast<int64_t>(i)).zero_();
  return masked;
}

// Outside of the graph, but with the storage and the version counter of the originals.
void keep(AutogradContext* ctx, at::TensorList tensors, const at::Tensor& seed) {
  variable_list kept;
  std::vector<int64_t> versions;
  const auto add = [&](const at::Tensor& tensor) {
    kept.push_back(tensor.detach());
    versions.push_back(version_of(tensor));
  };
  for (const at::Tensor& tensor : tensors) add(tensor);
  add(seed);
  ctx->saved_data["kept"] = kept;
  ctx->saved_data["versions"] = versions;
}
variable_list get_kept(AutogradContext* ctx) {
  const variable_list kept = ctx->saved_data["kept"].toTensorVector();
  const auto versions = ctx->saved_data["versions"].toIntVector();
  for (size_t i = 0; i < kept.size(); ++i) {
    TORCH_CHECK(version_of(kept[i]) == versions[i], "fastbconv::sample_posterior_list: expected a parameter of shape ",
                kept[i].sizes(), " as it was when the weights were drawn, got one that has been ",
                "modified in place since (version ", version_of(kept[i]), ", then ", versions[i],
                "); call backward() before the optimizer's step()");
  }
  return kept;
}

class SampleListFunction : public torch::autograd::Function<SampleListFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::TensorList& tensors, const at::Tensor& seed,
                               const ListCall& call) {
    auto [samples, kl] = call_list(tensors, seed, call);
    keep(ctx, tensors, seed);
    ctx->saved_data["prior"] = call.prior;
    ctx->saved_data["scale_floor"] = call.scale_floor;
    ctx->saved_data["stream"] = call.stream;
    ctx->saved_data["element_offset"] = call.element_offset;
    ctx->saved_data["with_kl"] = call.with_kl;
    ctx->saved_data["present"] = call.present;
    ctx->saved_data["offset_add"] = call.offset_add;
    ctx->set_materialize_grads(false);
    samples.push_back(kl);
    return samples;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<SampleListBackwardSignature>("fastbconv::sample_posterior_list_backward");
    const variable_list kept = get_kept(ctx);
    const auto present = ctx->saved_data["present"].toIntVector();
    const auto stream = ctx->saved_data["stream"].toIntVector();
    const auto element_offset = ctx->saved_data["element_offset"].toIntVector();
    const auto prior = ctx->saved_data["prior"].toDoubleVector();
    const size_t n = stream.size(), tensors = kept.size() - 1;
    const at::Tensor grad_kl = wanted_kl_gradient(grads[n], ctx->saved_data["with_kl"].toIntVector());
    variable_list out(tensors + 2);  // then the seed and the options
    bool any = grad_kl.defined();
    for (size_t i = 0; i < n; ++i) any = any || grads[i].defined();
    if (!any) return out;
    c10::List<bool> mask;
    const auto with_kl = ctx->saved_data["with_kl"].toIntVector();
    for (size_t i = 0, edge = 0; i < 4 * n; ++i) {
      // A posterior that nothing was made of has no gradient, as if it had not been drawn.
      const bool reached = grads[i % n].defined() || (grad_kl.defined() && with_kl[i % n] != 0);
      mask.push_back(present[i] != 0 && ctx->needs_input_grad(edge++) && reached);
    }
    const variable_list all = spread(at::TensorList(kept).slice(0, tensors), present);
    const auto g = op.call(optional_list(grads.data(), n), or_nullopt(grad_kl), at::TensorList(all).slice(0, n),
                           at::TensorList(all).slice(n, n), kept.back(), optional_list(all.data() + 2 * n, n),
                           optional_list(all.data() + 3 * n, n), prior, ctx->saved_data["scale_floor"].toDouble(),
                           stream, ctx->saved_data["offset_add"].toInt(), element_offset, mask);
    for (size_t i = 0, next = 0; i < 4 * n; ++i)
      if (present[i] != 0) out[next++] = if_wanted(mask.get(i), g[i]);
    return out;
  }
};

SampleListResult sample_list_autograd(at::TensorList loc, at::TensorList rho, const at::Tensor& seed,
                                      const OptionalTensors& prior_loc, const OptionalTensors& prior_scale,
                                      Doubles prior, c10::List<bool> with_kl, double scale_floor,
                                      at::IntArrayRef stream, int64_t offset_add, at::IntArrayRef element_offset,
                                      c10::List<bool> cast, std::optional<at::ScalarType> dtype) {
  const size_t n = loc.size();
  expect_length("rho", n, rho.size());
  expect_length("prior_loc", n, prior_loc.size());
  expect_length("prior_scale", n, prior_scale.size());
  expect_length("stream", n, stream.size());
  ListCall call = {prior.vec(), scale_floor, stream.vec(), element_offset.vec(), {}, {}, offset_add, cast, dtype};
  for (size_t i = 0; i < with_kl.size(); ++i) call.with_kl.push_back(with_kl.get(i) ? 1 : 0);
  variable_list tensors;
  const auto append = [&](const OptionalTensor& tensor) {
    const at::Tensor* given = get_if_defined(tensor);
    call.present.push_back(given != nullptr ? 1 : 0);
    if (given != nullptr) tensors.push_back(*given);
  };
  for (const at::Tensor& tensor : loc) append(tensor);
  for (const at::Tensor& tensor : rho) append(tensor);
  for (size_t i = 0; i < n; ++i) append(prior_loc.get(i));
  for (size_t i = 0; i < n; ++i) append(prior_scale.get(i));
  bool records = false;
  for (const at::Tensor& tensor : tensors) {
    refuse_forward_mode("fastbconv::sample_posterior_list", tensor);
    records = records || records_graph(tensor);
  }
  const at::TensorList list(tensors);
  if (!records) return call_list(list, seed, call);
  variable_list out = SampleListFunction::apply(list, seed, call);
  const at::Tensor kl = out.back();
  out.pop_back();
  return {std::move(out), kl};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, Autograd, m) { m.impl("sample_posterior_list", sample_list_autograd); }

}  // namespace fbc
