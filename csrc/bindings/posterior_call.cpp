#include "posterior_call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <tuple>

namespace fbc {

at::Tensor merge_taps(const at::Tensor& parameter, at::IntArrayRef sizes) {
  const at::Tensor full = parameter.expand(sizes);
  return full.reshape({sizes[0], sizes[1], -1, sizes.back()});
}
OptionalTensor merge_taps(const OptionalTensor& parameter, at::IntArrayRef sizes) {
  const at::Tensor* tensor = get_if_defined(parameter);
  return tensor == nullptr ? OptionalTensor() : OptionalTensor(merge_taps(*tensor, sizes));
}

at::Tensor split_taps(const at::Tensor& grad, const at::Tensor* parameter) {
  if (parameter == nullptr || grad.dim() != 4) return grad;
  return at::empty_like(*parameter).copy_(grad.reshape(parameter->sizes()));
}

PosteriorTensors posterior_tensors(const at::Tensor& loc, const at::Tensor* rho, const OptionalTensor& prior_loc,
                                   const OptionalTensor& prior_scale, Doubles prior, double scale_floor) {
  expect_length("prior", 2, prior.size());
  expect_parameter("loc", loc);
  PosteriorTensors t = {};
  t.loc = &loc;
  t.rho = rho;
  t.prior_loc = get_if_defined(prior_loc);
  t.prior_scale = get_if_defined(prior_scale);
  t.prior_loc_value = prior[0];
  t.prior_scale_value = prior[1];
  t.scale_floor = scale_floor;
  check_posterior(t, "rho", "prior_loc", "prior_scale");
  return t;
}

Stream checked_stream(int64_t stream) {
  TORCH_CHECK_VALUE(stream >= 0 && stream < 16, "stream: expected a number from 0 to 15, got ", stream);
  return static_cast<Stream>(stream);
}

void set_noise(PosteriorTensors* t, const at::Tensor& seed, int64_t stream, int64_t offset_add,
               int64_t element_offset) {
  expect_seed(t->loc->device(), seed);
  TORCH_CHECK_VALUE(element_offset >= 0, "element_offset: expected a value of at least 0, got ", element_offset);
  t->seed = &seed;
  t->offset_add = offset_add;
  t->stream = checked_stream(stream);
  t->element_offset = element_offset;
}

std::vector<int64_t> sample_sizes(const at::Tensor& loc, int64_t num_samples) {
  expect_in_range("num_samples", 1, num_samples);
  std::vector<int64_t> sizes = {num_samples};
  sizes.insert(sizes.end(), loc.sizes().begin(), loc.sizes().end());
  return sizes;
}

at::ScalarType checked_sample_dtype(const at::Tensor& loc, std::optional<at::ScalarType> dtype) {
  const at::ScalarType type = dtype.value_or(loc.scalar_type());
  const bool is_double = loc.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE(is_double ? type == at::kDouble : type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                   "dtype: expected ", is_double ? "float64" : "float32, bfloat16 or float16", " for a parameter of ",
                   loc.scalar_type(), ", got ", type);
  return type;
}

Stream check_draw(const at::Tensor& seed, int64_t numel, int64_t stream, int64_t element_offset) {
  expect_seed(seed.device(), seed);
  TORCH_CHECK_VALUE(numel >= 0, "numel: expected a value of at least 0, got ", numel);
  TORCH_CHECK_VALUE(element_offset >= 0, "element_offset: expected a value of at least 0, got ", element_offset);
  return checked_stream(stream);
}

void check_philox(const at::Tensor& counter, const at::Tensor& key) {
  for (const auto& [name, tensor, words] :
       {std::tuple<const char*, const at::Tensor*, int64_t>("counter", &counter, 4), {"key", &key, 2}}) {
    expect_defined(name, *tensor);
    expect_dtype(name, at::kLong, *tensor);
    expect_device(name, counter.device(), *tensor);
    TORCH_CHECK_VALUE(tensor->dim() > 0 && tensor->size(-1) == words, name, ": expected ", words,
                      " words in the last dimension, got shape ", tensor->sizes());
  }
  const at::IntArrayRef batch = counter.sizes().slice(0, counter.dim() - 1);
  TORCH_CHECK_VALUE(key.sizes().slice(0, key.dim() - 1) == batch, "key: expected shape ", batch,
                    " before its last dimension, as counter, got ", key.sizes());
}

void check_derive(const at::Tensor& seed, int64_t first, int64_t count) {
  expect_defined("seed", seed);
  expect_seed(seed.device(), seed);
  TORCH_CHECK_VALUE(first >= 0, "first: expected a value of at least 0, got ", first);
  TORCH_CHECK_VALUE(count >= 0, "count: expected a value of at least 0, got ", count);
}

namespace {

void check_lengths(at::TensorList loc, at::TensorList rho, const at::Tensor& seed, const OptionalTensors& prior_loc,
                   const OptionalTensors& prior_scale, const ListOptions& o) {
  const size_t count = loc.size();
  TORCH_CHECK_VALUE(count > 0, "loc: expected at least one tensor, got none");
  expect_length("rho", count, rho.size());
  expect_length("prior_loc", count, prior_loc.size());
  expect_length("prior_scale", count, prior_scale.size());
  expect_length("prior", 2 * count, o.prior.size());
  expect_length("stream", count, o.stream.size());
  expect_length("element_offset", count, o.element_offset.size());
  expect_defined("seed", seed);
  expect_dtype("seed", at::kLong, seed);
  expect_shape("seed", {static_cast<int64_t>(count), 2}, seed.sizes());
}

// Keeps a tensor of an entry, with merged taps where the entry has them.
const at::Tensor* hold(std::vector<at::Tensor>* held, const OptionalTensor& tensor, const at::Tensor& loc) {
  const at::Tensor* given = get_if_defined(tensor);
  if (given == nullptr) return nullptr;
  held->push_back(loc.dim() > 4 ? merge_taps(*given, loc.sizes()) : *given);
  return &held->back();
}

}  // namespace

PosteriorList checked_list(at::TensorList loc, at::TensorList rho, const at::Tensor& seed,
                           const OptionalTensors& prior_loc, const OptionalTensors& prior_scale, const ListOptions& o) {
  check_lengths(loc, rho, seed, prior_loc, prior_scale, o);
  PosteriorList list(loc);
  list.held.reserve(5 * loc.size());
  for (size_t i = 0; i < loc.size(); ++i) {
    expect_dtype("loc", loc[0].scalar_type(), loc[i]);
    expect_device("loc", loc[0].device(), loc[i]);
    const OptionalTensor p_loc = prior_loc.get(i), p_scale = prior_scale.get(i);
    posterior_tensors(loc[i], &rho[i], p_loc, p_scale, o.prior.slice(2 * i, 2), o.scale_floor);
    PosteriorTensors entry = {};
    entry.loc = hold(&list.held, loc[i], loc[i]);
    entry.rho = hold(&list.held, rho[i], loc[i]);
    entry.prior_loc = hold(&list.held, p_loc, loc[i]);
    entry.prior_scale = hold(&list.held, p_scale, loc[i]);
    entry.prior_loc_value = o.prior[2 * i];
    entry.prior_scale_value = o.prior[2 * i + 1];
    entry.scale_floor = o.scale_floor;
    list.held.push_back(seed.select(0, static_cast<int64_t>(i)));
    set_noise(&entry, list.held.back(), o.stream[i], o.offset_add, o.element_offset[i]);
    list.entries.push_back(entry);
  }
  return list;
}

at::Tensor empty_sample(const at::Tensor& loc, at::ScalarType dtype) {
  const auto format = loc.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return at::empty(loc.sizes(), loc.options().dtype(dtype).memory_format(format));
}

at::Tensor in_entry_shape(const at::Tensor& sample, const PosteriorTensors& entry) {
  return sample.dim() > 4 ? sample.reshape(entry.loc->sizes()) : sample;
}

std::vector<at::Tensor> checked_list_gradients(const PosteriorList& list, const OptionalTensors& grad_sample,
                                               const at::Tensor* grad_kl) {
  expect_length("grad_sample", list.size(), grad_sample.size());
  if (grad_kl != nullptr) {
    expect_shape("grad_kl", {static_cast<int64_t>(list.size())}, grad_kl->sizes());
    expect_device("grad_kl", list.loc[0].device(), *grad_kl);
  }
  std::vector<at::Tensor> grads(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const OptionalTensor given = grad_sample.get(i);
    const at::Tensor* grad = get_if_defined(given);
    if (grad == nullptr) continue;
    expect_shape("grad_sample", list.loc[i].sizes(), grad->sizes());
    expect_device("grad_sample", list.loc[i].device(), *grad);
    expect_gradient_dtype("grad_sample", *grad);
    grads[i] = in_entry_shape(*grad, list.entries[i]);
  }
  return grads;
}

std::array<bool, 4> wanted_of(const c10::List<bool>& output_mask, size_t entry, size_t count) {
  expect_length("output_mask", 4 * count, output_mask.size());
  return {output_mask.get(entry), output_mask.get(count + entry), output_mask.get(2 * count + entry),
          output_mask.get(3 * count + entry)};
}

}  // namespace fbc
