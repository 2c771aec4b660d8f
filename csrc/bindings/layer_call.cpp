// A layer's call as one function of its tensors. What never changes between calls is parsed once: for a small
// layer the thirty arguments of bconv2d and their checks in Python cost several times the convolution.
//
// It serves the common call and no other, and says so by None: the caller then goes the long way, whose
// messages name what is wrong. Dispatch is that of any call: autograd, autocast and modes come after it.
#include "layer_call.h"

#include <ATen/ops/randint.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <limits>

#include "autograd.h"
#include "signatures.h"

namespace py = pybind11;

namespace fbc {

namespace {

// A tensor or parameter of no other class, which may have a say in what is called; null: something else.
const at::Tensor* exact_tensor(py::handle object) {
  if (!THPVariable_CheckTypeExact(Py_TYPE(object.ptr()))) return nullptr;
  return &THPVariable_Unpack(object.ptr());
}

// A Python argument that may be None.
struct Optional {
  explicit Optional(py::handle object) : absent(object.is_none()) {
    const at::Tensor* found = absent ? nullptr : exact_tensor(object);
    if (found != nullptr) tensor = *found;
  }
  bool is_unknown() const { return !absent && !tensor.has_value(); }

  bool absent;
  OptionalTensor tensor;  // held: another thread may give the Python object another tensor meanwhile
};

bool is_like(const at::Tensor& tensor, const at::Tensor& other) {
  return tensor.scalar_type() == other.scalar_type() && tensor.device() == other.device() &&
         tensor.layout() == at::kStrided;
}

class LayerCall {
 public:
  // rank 0: input (N, C), weight (K, C); 1: (N, C, W), (K, C/G, S); 2: (N, C, H, W), (K, C/G, R, S). The geometry
  // is that of an image, of one row below rank 2. cuda: whether there are kernels.
  LayerCall(std::array<double, 4> prior, double scale_floor, std::array<int64_t, 2> stride,
            std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, int64_t groups, int64_t activation,
            double activation_param, int64_t rank, bool cuda)
      : prior_(prior),
        scale_floor_(scale_floor),
        stride_(stride),
        padding_(padding),
        dilation_(dilation),
        groups_(groups),
        activation_(activation),
        activation_param_(activation_param),
        rank_(rank),
        cuda_(cuda) {}

  // The output, or (output, kl) with with_kl; None: not served. seed None: drawn from torch's generator.
  py::object call(py::handle input, py::handle weight, py::handle weight_rho, py::handle bias, py::handle bias_rho,
                  py::handle seed, bool with_kl, int64_t offset_add, int64_t algorithm, bool keep_weight) const {
    const Optional x(input), loc(weight), rho(weight_rho), bias_loc(bias), bias_scale(bias_rho), given(seed);
    if (!x.tensor || !loc.tensor || !rho.tensor || bias_loc.is_unknown() || bias_scale.is_unknown() ||
        given.is_unknown() || at::impl::torch_function_mode_enabled() ||
        !fits(*x.tensor, *loc.tensor, *rho.tensor, bias_loc.tensor, bias_scale.tensor) ||
        !is_seed(given.tensor, *x.tensor)) {
      return py::none();
    }
    Tensors4 out;
    {
      const py::gil_scoped_release release;
      out = dispatch(*x.tensor, *loc.tensor, *rho.tensor, bias_loc.tensor, bias_scale.tensor, given.tensor, with_kl,
                     offset_add, algorithm, keep_weight);
    }
    py::object output = wrap(std::get<0>(out));
    return with_kl ? py::object(py::make_tuple(output, wrap(std::get<1>(out)))) : output;
  }

 private:
  static py::object wrap(const at::Tensor& tensor) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  }

  bool fits(const at::Tensor& x, const at::Tensor& loc, const at::Tensor& rho, const OptionalTensor& bias,
            const OptionalTensor& bias_rho) const {
    const int64_t dim = rank_ + 2;
    const bool floating = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
    if (!(x.is_cpu() || (x.is_cuda() && cuda_)) || !floating || x.dim() != dim || loc.dim() != dim) return false;
    if (!is_like(x, x) || !is_like(loc, x) || !is_like(rho, x) || rho.sizes() != loc.sizes()) return false;
    if (x.size(1) != loc.size(1) * groups_ || loc.size(0) % groups_ != 0) return false;
    for (const OptionalTensor* found : {&bias, &bias_rho}) {
      const OptionalTensor& part = *found;
      if (part && (!is_like(*part, x) || part->dim() != 1 || part->size(0) != loc.size(0))) return false;
    }
    if (!bias && bias_rho) return false;
    for (int64_t axis = 2 - rank_; axis < 2; ++axis) {  // the filter lies inside the padded image
      const int64_t dim_of = axis + rank_;
      const int64_t padded = x.size(dim_of) + padding_[2 * axis] + padding_[2 * axis + 1];
      if (padded < (loc.size(dim_of) - 1) * dilation_[axis] + 1) return false;
    }
    return true;
  }

  static bool is_seed(const OptionalTensor& seed, const at::Tensor& x) {
    if (!seed) return true;
    return seed->scalar_type() == at::kLong && seed->dim() == 1 && seed->size(0) == 2 && seed->device() == x.device();
  }

  Tensors4 dispatch(const at::Tensor& x, const at::Tensor& loc, const at::Tensor& rho, const OptionalTensor& bias,
                    const OptionalTensor& bias_rho, const OptionalTensor& seed, bool with_kl, int64_t offset_add,
                    int64_t algorithm, bool keep_weight) const {
    static const auto op = find_op<Bconv2dSignature>("fastbconv::bconv2d");
    const auto call = [&](const at::Tensor& image, const at::Tensor& filter, const at::Tensor& filter_rho) {
      return op.call(image, filter, filter_rho, bias, bias_rho, seed ? *seed : drawn_seed(x), std::nullopt,
                     std::nullopt, std::nullopt, std::nullopt, prior_, with_kl, with_kl && bias_rho.has_value(),
                     scale_floor_, stride_, padding_, dilation_, groups_, activation_, activation_param_,
                     /*num_samples=*/1, /*share_input=*/false, offset_add,
                     /*element_offset=*/{0, 0}, algorithm, keep_weight, /*save_pre_activation=*/false);
    };
    if (rank_ == 2) return call(one_channel(x, loc), loc, rho);
    const at::Tensor image = as_image(x), filter = as_image(loc);
    Tensors4 out = call(rank_ == 0 ? image : one_channel(image, filter), filter, as_image(rho));
    at::Tensor& output = std::get<0>(out);
    output = rank_ == 0 ? reshaped(output, {output.size(0), output.size(1)})
                        : reshaped(output, {output.size(0), output.size(1), output.size(3)});
    return out;
  }

  // (N, C) or (N, C, W) as (N, C, 1, 1) or (N, C, 1, W).
  static at::Tensor as_image(const at::Tensor& tensor) {
    return tensor.dim() == 2 ? tensor.unsqueeze(-1).unsqueeze(-1) : tensor.unsqueeze(2);
  }

  // As one_channel() of fastbconv/_arguments.py.
  static at::Tensor one_channel(const at::Tensor& image, const at::Tensor& weight) {
    const bool one_tap = weight.size(2) * weight.size(3) == 1;
    if (image.size(1) != 1 || image.stride(1) == 1 || weight.stride(1) != 1 || one_tap) return image;
    if (!image.is_contiguous()) return image;
    return image.view({image.size(0), image.size(2), image.size(3), 1}).permute({0, 3, 1, 2});
  }

  // As noise.draw_seed() draws it.
  static at::Tensor drawn_seed(const at::Tensor& x) {
    constexpr auto kLow = std::numeric_limits<int64_t>::min(), kHigh = std::numeric_limits<int64_t>::max();
    return at::randint(kLow, kHigh, {2}, std::optional<at::Generator>(), x.options().dtype(at::kLong));
  }

  std::array<double, 4> prior_;
  double scale_floor_;
  std::array<int64_t, 2> stride_;
  std::array<int64_t, 4> padding_;
  std::array<int64_t, 2> dilation_;
  int64_t groups_, activation_;
  double activation_param_;
  int64_t rank_;
  bool cuda_;
};

}  // namespace

void define_layer_call(py::module_& m) {
  m.def(
      "reshaped", [](const at::Tensor& output, const std::vector<int64_t>& shape) { return reshaped(output, shape); },
      "The same memory and version in another shape, and no view: see reshaped() in autograd.h.");
  py::class_<LayerCall>(m, "LayerCall", "The constant arguments of a layer's calls.")
      .def(py::init<std::array<double, 4>, double, std::array<int64_t, 2>, std::array<int64_t, 4>,
                    std::array<int64_t, 2>, int64_t, int64_t, double, int64_t, bool>(),
           py::kw_only(), py::arg("prior"), py::arg("scale_floor"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("groups"), py::arg("activation"), py::arg("activation_param"), py::arg("rank"),
           py::arg("cuda"))
      .def("__call__", &LayerCall::call, "The output, (output, KL), or None: this call goes the long way.");
}

}  // namespace fbc
