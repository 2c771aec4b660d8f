// Every operator of the library on one page. The schemas are frozen: later work adds operators, and
// kernels for more keys and algorithms; it does not change a line that is here. fastbconv/ops.py
// quotes them, with what each argument means.
#include <torch/library.h>

namespace {

void define_convolution(torch::Library& m) {
  m.def(
      "bconv2d(Tensor input, Tensor weight_loc, Tensor? weight_rho, Tensor? bias_loc, "
      "Tensor? bias_rho, Tensor seed, Tensor? prior_loc, Tensor? prior_scale, "
      "Tensor? bias_prior_loc, Tensor? bias_prior_scale, *, float[] prior, bool weight_kl, "
      "bool bias_kl, float scale_floor, int[] stride, int[] padding, int[] dilation, int groups, "
      "int activation, float activation_param, int num_samples, bool share_input, int offset_add, "
      "int[] element_offset, int algorithm, bool keep_weight, bool save_pre_activation) "
      "-> (Tensor output, Tensor kl, Tensor pre_activation, Tensor weight)");

  m.def(
      "bconv2d_backward(Tensor grad_output, Tensor? grad_kl, Tensor input, Tensor? saved, "
      "Tensor? weight, Tensor weight_loc, Tensor? weight_rho, Tensor? bias_loc, Tensor? bias_rho, "
      "Tensor seed, Tensor? prior_loc, Tensor? prior_scale, Tensor? bias_prior_loc, "
      "Tensor? bias_prior_scale, *, float[] prior, bool weight_kl, bool bias_kl, "
      "float scale_floor, int[] stride, int[] padding, int[] dilation, int groups, "
      "int activation, float activation_param, int num_samples, bool share_input, int offset_add, "
      "int[] element_offset, int algorithm, bool[] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight_loc, Tensor grad_weight_rho, "
      "Tensor grad_bias_loc, Tensor grad_bias_rho, Tensor grad_prior_loc, "
      "Tensor grad_prior_scale, Tensor grad_bias_prior_loc, Tensor grad_bias_prior_scale)");
}

// Flipout (estimator 1) and local reparameterisation (2): the pre-activation is random by itself.
void define_affine(torch::Library& m) {
  m.def(
      "bconv2d_affine(Tensor input, Tensor weight_loc, Tensor weight_rho, Tensor? bias_loc, "
      "Tensor? bias_rho, Tensor seed, Tensor? prior_loc, Tensor? prior_scale, "
      "Tensor? bias_prior_loc, Tensor? bias_prior_scale, *, int estimator, float[] prior, "
      "bool weight_kl, bool bias_kl, float scale_floor, int[] stride, int[] padding, "
      "int[] dilation, int groups, int activation, float activation_param, int num_samples, "
      "bool share_input, int offset_add, int[] element_offset, int row_offset, int algorithm, "
      "bool save_pre_activation) "
      "-> (Tensor output, Tensor kl, Tensor pre_activation, Tensor deviation)");

  m.def(
      "bconv2d_affine_backward(Tensor grad_output, Tensor? grad_kl, Tensor input, Tensor? saved, "
      "Tensor? deviation, Tensor weight_loc, Tensor weight_rho, Tensor? bias_loc, "
      "Tensor? bias_rho, Tensor seed, Tensor? prior_loc, Tensor? prior_scale, "
      "Tensor? bias_prior_loc, Tensor? bias_prior_scale, *, int estimator, float[] prior, "
      "bool weight_kl, bool bias_kl, float scale_floor, int[] stride, int[] padding, "
      "int[] dilation, int groups, int activation, float activation_param, int num_samples, "
      "bool share_input, int offset_add, int[] element_offset, int row_offset, int algorithm, "
      "bool[] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight_loc, Tensor grad_weight_rho, "
      "Tensor grad_bias_loc, Tensor grad_bias_rho, Tensor grad_prior_loc, "
      "Tensor grad_prior_scale, Tensor grad_bias_prior_loc, Tensor grad_bias_prior_scale)");
}

void define_draws(torch::Library& m) {
  m.def(
      "sample_posterior(Tensor loc, Tensor? rho, Tensor seed, Tensor? prior_loc, "
      "Tensor? prior_scale, *, float[] prior, bool with_kl, float scale_floor, int stream, "
      "int num_samples, int offset_add, int element_offset, ScalarType? dtype) "
      "-> (Tensor sample, Tensor kl)");

  m.def(
      "sample_posterior_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor loc, Tensor? rho, "
      "Tensor seed, Tensor? prior_loc, Tensor? prior_scale, *, float[] prior, float scale_floor, "
      "int stream, int num_samples, int offset_add, int element_offset, bool[] output_mask) "
      "-> (Tensor grad_loc, Tensor grad_rho, Tensor grad_prior_loc, Tensor grad_prior_scale)");

  m.def(
      "sample_posterior_list(Tensor[] loc, Tensor[] rho, Tensor seed, Tensor?[] prior_loc, "
      "Tensor?[] prior_scale, *, float[] prior, bool[] with_kl, float scale_floor, int[] stream, "
      "int offset_add, int[] element_offset, bool[] cast, ScalarType? dtype) "
      "-> (Tensor[] sample, Tensor kl)");

  m.def(
      "sample_posterior_list_backward(Tensor?[] grad_sample, Tensor? grad_kl, Tensor[] loc, "
      "Tensor[] rho, Tensor seed, Tensor?[] prior_loc, Tensor?[] prior_scale, *, float[] prior, "
      "float scale_floor, int[] stream, int offset_add, int[] element_offset, bool[] output_mask) "
      "-> Tensor[]");
}

void define_divergence(torch::Library& m) {
  m.def(
      "kl_normal(Tensor loc, Tensor rho, Tensor? prior_loc, Tensor? prior_scale, *, "
      "float[] prior, float scale_floor) -> Tensor");

  m.def(
      "kl_normal_backward(Tensor grad_kl, Tensor loc, Tensor rho, Tensor? prior_loc, "
      "Tensor? prior_scale, *, float[] prior, float scale_floor, bool[] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

void define_noise(torch::Library& m) {
  m.def(
      "standard_normal(Tensor seed, SymInt numel, *, int stream, int sample, SymInt element_offset) "
      "-> Tensor");

  m.def(
      "random_signs(Tensor seed, SymInt numel, *, int stream, int sample, SymInt element_offset) "
      "-> Tensor");

  m.def("derive_seeds(Tensor seed, int first, int count) -> Tensor");

  m.def("philox4x32_10(Tensor counter, Tensor key) -> Tensor");
}

}  // namespace

TORCH_LIBRARY(fastbconv, m) {
  m.set_python_module("fastbconv.ops");  // registers the fakes
  define_convolution(m);
  define_affine(m);
  define_draws(m);
  define_divergence(m);
  define_noise(m);
}
