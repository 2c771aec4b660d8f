// Checked arguments of the posterior operators, the same for every device.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "signatures.h"
#include "tensor_args.h"

namespace fbc {

// Weights of three spatial dimensions keep their element numbers when two of them are merged.
at::Tensor merge_taps(const at::Tensor& parameter, at::IntArrayRef sizes);
OptionalTensor merge_taps(const OptionalTensor& parameter, at::IntArrayRef sizes);

// A gradient of the merged view, in the shape and strides of its parameter.
at::Tensor split_taps(const at::Tensor& grad, const at::Tensor* parameter);

// One posterior without noise. The result points into the arguments. rho comes as a pointer: as an
// OptionalTensor a plain tensor would be copied into a temporary that is gone on return.
PosteriorTensors posterior_tensors(const at::Tensor& loc, const at::Tensor* rho, const OptionalTensor& prior_loc,
                                   const OptionalTensor& prior_scale, Doubles prior, double scale_floor);

Stream checked_stream(int64_t stream);

// Adds the address of the noise.
void set_noise(PosteriorTensors* t, const at::Tensor& seed, int64_t stream, int64_t offset_add, int64_t element_offset);

// (num_samples, *shape of loc)
std::vector<int64_t> sample_sizes(const at::Tensor& loc, int64_t num_samples);

// What a draw is stored in.
at::ScalarType checked_sample_dtype(const at::Tensor& loc, std::optional<at::ScalarType> dtype);

// Arguments of standard_normal and random_signs.
Stream check_draw(const at::Tensor& seed, int64_t numel, int64_t stream, int64_t element_offset);

// counter (..., 4) and key (..., 2) of philox4x32_10.
void check_philox(const at::Tensor& counter, const at::Tensor& key);

void check_derive(const at::Tensor& seed, int64_t first, int64_t count);

// The posteriors of a list, checked. `entries` point into `held`; parameters of more than four
// dimensions are there with merged taps.
struct PosteriorList {
  explicit PosteriorList(at::TensorList locs) : loc(locs) {}
  PosteriorList(PosteriorList&&) = default;  // a vector that moves keeps its elements in place

  at::TensorList loc;
  std::vector<at::Tensor> held;
  std::vector<PosteriorTensors> entries;

  size_t size() const { return entries.size(); }
};

// Arguments that the two list operators share, in schema order.
struct ListOptions {
  Doubles prior;
  double scale_floor;
  at::IntArrayRef stream;
  int64_t offset_add;
  at::IntArrayRef element_offset;
};

PosteriorList checked_list(at::TensorList loc, at::TensorList rho, const at::Tensor& seed,
                           const OptionalTensors& prior_loc, const OptionalTensors& prior_scale,
                           const ListOptions& options);

// Where entry i of a list is drawn: the shape of loc; KRSC memory for four dimensions.
at::Tensor empty_sample(const at::Tensor& loc, at::ScalarType dtype);
// The same memory under the sizes of the entry, whose taps may be merged.
at::Tensor in_entry_shape(const at::Tensor& sample, const PosteriorTensors& entry);

// grad_sample and grad_kl of a list. Returns for entry i the gradient by its sample, in the shape
// of the entry and the dtype it came in; undefined where there is none.
std::vector<at::Tensor> checked_list_gradients(const PosteriorList& list, const OptionalTensors& grad_sample,
                                               const at::Tensor* grad_kl);

// output_mask of a list, (4 n): what entry i wants, in the order loc, rho, prior_loc, prior_scale.
std::array<bool, 4> wanted_of(const c10::List<bool>& output_mask, size_t entry, size_t count);

}  // namespace fbc
