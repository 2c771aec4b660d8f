// From operator arguments to a checked ConvCall.
#include "conv_call.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace fbc {

namespace {

bool is_16_bit(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

// A weight without rho may come in the 16-bit dtype of the input: it was sampled before.
void check_dtypes(const at::Tensor& input, const at::Tensor& weight_loc, bool sampled) {
  const at::ScalarType type = input.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                   "input: expected dtype float32, float64, bfloat16 or float16, got ", type);
  if (sampled && is_16_bit(type) && weight_loc.scalar_type() == type) return;
  expect_parameter("weight_loc", weight_loc);
  expect_dtype("weight_loc", type == at::kDouble ? at::kDouble : at::kFloat, weight_loc);
}

constexpr int64_t kMostZeroColumns = int64_t{1} << 20;

void check_options(const ConvOptions& o) {
  for (const int64_t value : o.stride) expect_in_range("stride", 1, value);
  for (const int64_t value : o.padding) expect_in_range("padding", 0, value);
  // Rows of the image are copied with their zero columns.
  TORCH_CHECK_NOT_IMPLEMENTED(o.padding[2] + o.padding[3] <= kMostZeroColumns, "padding: expected at most ",
                              kMostZeroColumns, " zero columns, got ", o.padding[2] + o.padding[3],
                              "; crop the output of a smaller padding instead");
  for (const int64_t value : o.dilation) expect_in_range("dilation", 1, value);
  expect_in_range("groups", 1, o.groups);
  expect_in_range("num_samples", 1, o.num_samples);
  TORCH_CHECK_VALUE(o.activation >= 0 && o.activation < kNumActivations, "activation: expected an id from 0 to ",
                    kNumActivations - 1, ", got ", o.activation);
  TORCH_CHECK_VALUE(o.algorithm >= 0 && o.algorithm < kNumAlgorithms, "algorithm: expected an id from 0 to ",
                    kNumAlgorithms - 1, ", got ", o.algorithm);
  // With a negative one the sign of z cannot be read off the output, which is what backward has.
  const auto activation = static_cast<Activation>(o.activation);
  TORCH_CHECK_VALUE((activation != Activation::kLeakyRelu && activation != Activation::kElu) || o.activation_param >= 0,
                    "activation_param: expected a slope or alpha of at least 0, got ", o.activation_param);
}

void check_channels(const at::Tensor& input, const at::Tensor& weight_loc, const ConvOptions& o) {
  expect_dim("input", 4, input);
  expect_dim("weight_loc", 4, weight_loc);
  for (int64_t d = 0; d < 4; ++d) {
    TORCH_CHECK_VALUE(weight_loc.size(d) > 0, "weight_loc: expected no empty dimension, got shape ",
                      weight_loc.sizes());
  }
  expect_in_range("weight_loc", 1, std::max(weight_loc.size(2), weight_loc.size(3)));
  TORCH_CHECK_VALUE(input.size(1) == weight_loc.size(1) * o.groups, "input: expected ", weight_loc.size(1) * o.groups,
                    " channels (", weight_loc.size(1), " per group of weight_loc x ", o.groups, " groups), got ",
                    input.size(1));
  TORCH_CHECK_VALUE(weight_loc.size(0) % o.groups == 0, "groups: expected a divisor of the number of filters ",
                    weight_loc.size(0), ", got ", o.groups);
  TORCH_CHECK_VALUE(o.share_input || input.size(0) % o.num_samples == 0,
                    "num_samples: expected a divisor of the batch size ", input.size(0), ", got ", o.num_samples);
}

int64_t checked_extent(const char* side, int64_t extent, int64_t before, int64_t after, int64_t filter, int64_t stride,
                       int64_t dilation) {
  const int64_t outputs = output_extent(extent, before, after, filter, stride, dilation);
  TORCH_CHECK_VALUE(outputs >= 0, "input: expected a ", side, " of at least ",
                    (filter - 1) * dilation + 1 - stride - before - after, " for a filter of ", filter,
                    " with dilation ", dilation, " and padding ", before, " + ", after, ", got ", extent);
  return outputs;
}

ConvShape conv_shape(const at::Tensor& input, const at::Tensor& weight, const ConvOptions& o) {
  ConvShape s = {};
  s.N = input.size(0);
  s.C = input.size(1);
  s.H = input.size(2);
  s.W = input.size(3);
  s.K = weight.size(0);
  s.R = weight.size(2);
  s.S = weight.size(3);
  s.stride_h = o.stride[0];
  s.stride_w = o.stride[1];
  s.pad_top = o.padding[0];
  s.pad_bottom = o.padding[1];
  s.pad_left = o.padding[2];
  s.pad_right = o.padding[3];
  s.dilation_h = o.dilation[0];
  s.dilation_w = o.dilation[1];
  s.groups = o.groups;
  s.num_samples = o.num_samples;
  s.share_input = o.share_input;
  s.P = checked_extent("height", s.H, s.pad_top, s.pad_bottom, s.R, s.stride_h, s.dilation_h);
  s.Q = checked_extent("width", s.W, s.pad_left, s.pad_right, s.S, s.stride_w, s.dilation_w);
  return s;
}

void check_bias(const PosteriorTensors& weight, const PosteriorTensors& bias) {
  TORCH_CHECK_VALUE(bias.loc != nullptr || bias.rho == nullptr,
                    "bias_rho: expected none without bias_loc, got a tensor");
  if (bias.loc == nullptr) return;
  expect_shape("bias_loc", {weight.loc->size(0)}, bias.loc->sizes());
  expect_device("bias_loc", weight.loc->device(), *bias.loc);
  const bool sampled = weight.loc->scalar_type() != weight.dtype() && bias.rho == nullptr;
  if (!sampled || bias.loc->scalar_type() != weight.loc->scalar_type())
    expect_dtype("bias_loc", weight.dtype(), *bias.loc);
  check_posterior(bias, "bias_rho", "bias_prior_loc", "bias_prior_scale");
}

}  // namespace

ConvProblem ConvCall::problem() const {
  return {shape,         dtype_of(compute_dtype), format == at::MemoryFormat::ChannelsLast,
          current_isa(), current_bf16(),          at::globalContext().deterministicAlgorithms()};
}

at::Tensor empty_output(const ConvCall& call) {
  const ConvShape& s = call.shape;
  return advised(at::empty({s.output_rows(), s.K, s.P, s.Q}, call.input->options().memory_format(call.format)));
}

at::Tensor with_canonical_strides(const at::Tensor& tensor, at::ScalarType dtype, at::MemoryFormat format) {
  if (tensor.scalar_type() == dtype && tensor.is_contiguous(format)) {
    const int64_t c = std::max<int64_t>(tensor.size(1), 1), h = std::max<int64_t>(tensor.size(2), 1),
                  w = std::max<int64_t>(tensor.size(3), 1);
    const std::array<int64_t, 4> wanted = format == at::MemoryFormat::ChannelsLast
                                              ? std::array<int64_t, 4>{h * w * c, 1, w * c, c}
                                              : std::array<int64_t, 4>{c * h * w, h * w, w, 1};
    return tensor.strides() == at::IntArrayRef(wanted) ? tensor : tensor.as_strided(tensor.sizes(), wanted);
  }
  const at::Tensor out = at::empty(tensor.sizes(), tensor.options().dtype(dtype).memory_format(format));
  return out.copy_(tensor);
}

ConvCall make_conv_call(const ConvTensors& t, const ConvOptions& o) {
  expect_defined("input", *t.input);
  expect_defined("weight_loc", *t.weight_loc);
  check_dtypes(*t.input, *t.weight_loc, t.weight_rho == nullptr);
  expect_device("weight_loc", t.input->device(), *t.weight_loc);
  expect_seed(t.input->device(), *t.seed);
  check_options(o);
  check_channels(*t.input, *t.weight_loc, o);
  ConvCall call = {};
  call.options = o;
  call.activation = static_cast<Activation>(o.activation);
  call.input = t.input;
  call.weight = {t.weight_loc,  t.weight_rho, t.prior_loc,  t.prior_scale,   o.prior[0],         o.prior[1],
                 o.scale_floor, t.seed,       o.offset_add, Stream::kWeight, o.element_offset[0]};
  call.bias = {t.bias_loc,    t.bias_rho, t.bias_prior_loc, t.bias_prior_scale, o.prior[2],         o.prior[3],
               o.scale_floor, t.seed,     o.offset_add,     Stream::kBias,      o.element_offset[1]};
  check_posterior(call.weight, "weight_rho", "prior_loc", "prior_scale");
  check_bias(call.weight, call.bias);
  call.shape = conv_shape(*t.input, *t.weight_loc, o);
  call.format = t.input->suggest_memory_format();
  call.compute_dtype = t.input->scalar_type();
  return call;
}

void check_conv_backward(const ConvCall& call, const ConvBackward& back) {
  const ConvShape& s = call.shape;
  const at::Device device = call.input->device();
  const std::array<int64_t, 4> image = {s.output_rows(), s.K, s.P, s.Q};
  expect_defined("grad_output", *back.grad_output);
  expect_dtype("grad_output", call.compute_dtype, *back.grad_output);
  expect_shape("grad_output", image, back.grad_output->sizes());
  expect_device("grad_output", device, *back.grad_output);
  const bool linear = call.activation == Activation::kLinear;
  TORCH_CHECK_VALUE(linear || back.saved != nullptr,
                    "saved: expected the output or the pre-activation of "
                    "a convolution with an activation, got None");
  if (back.saved != nullptr) {
    expect_dtype("saved", call.compute_dtype, *back.saved);
    expect_shape("saved", image, back.saved->sizes());
    expect_device("saved", device, *back.saved);
  }
  if (back.weight != nullptr) {
    expect_dtype("weight", call.compute_dtype, *back.weight);
    expect_shape("weight", {s.num_samples, s.K, s.channels_per_group(), s.R, s.S}, back.weight->sizes());
    expect_device("weight", device, *back.weight);
  }
}

}  // namespace fbc
