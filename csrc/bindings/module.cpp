// The pybind11 module fastbconv._C: what the library is, what this processor can do, and probes for
// tests. Importing it registers the operators.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <chrono>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../core/activation.h"
#include "../cpu/capability.h"
#include "../cpu/huge_pages.h"
#include "../cpu/kernels.h"
#include "../cpu/select.h"
#include "device.h"
#include "fbc_build_stamp.h"
#include "layer_call.h"
#if defined(FBC_HAS_CUDA)
#include "../cuda/candidates.h"
#endif

namespace py = pybind11;

namespace fbc {

namespace {

// Found in the file by the loader, which must know a library before it loads it.
extern const char kBuildStamp[];
const char kBuildStamp[] = FBC_BUILD_STAMP;

constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa isa : kIsas)
    if (isa <= detected_isa()) names.emplace_back(isa_name(isa));
  return names;
}

py::dict build_info() {
  py::dict info;
  info["source_hash"] = FBC_SOURCE_HASH;
  info["stamp"] = kBuildStamp;
  info["compiler"] = compiler();
  info["built_for_torch"] = TORCH_VERSION;
  info["isa"] = isa_name(current_isa());
  info["isas"] = available_isas();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(FBC_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#if defined(FBC_SIMT_HOST)
  info["interpreter"] = true;  // a library for tests: CUDA kernels on CPU tensors
#endif
  return info;
}

void limit_isa_by_name(const std::string& name) {
  for (const Isa isa : kIsas) {
    if (name == isa_name(isa)) return limit_isa(isa);
  }
  throw py::value_error("isa: expected 'baseline', 'avx2' or 'avx512', got '" + name + "'");
}

// How many threads at::parallel_for really used for `tasks` tasks. Compiled without the OpenMP flag
// it would be one, without any other sign.
int64_t threads_used(int64_t tasks) {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  at::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return static_cast<int64_t>(seen.size());
}

#if !defined(FBC_SIMT_HOST)
// float32 operations a second by all threads at once, a multiply-add being two, on registers alone.
// Of the best instruction set, whatever the limit: it is the processor that is measured.
double multiply_add_rate(int64_t iterations) {
  if (iterations < 1) {
    throw py::value_error("iterations: expected at least 1, got " + std::to_string(iterations));
  }
  const py::gil_scoped_release released;
  const ProbeKernels& probe = probe_kernels(detected_isa());
  const int64_t threads = at::get_num_threads();
  std::vector<float> kept(static_cast<size_t>(threads));
  const auto start = std::chrono::steady_clock::now();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kept[i] = probe.multiply_adds(iterations, -1.0f, 3.0f);
  });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return static_cast<double>(threads * iterations * probe.operations) / took.count();
}
#endif

Dtype dtype_by_name(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float64") return Dtype::kFloat64;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw py::value_error("dtype: expected 'float32', 'float64', 'bfloat16' or 'float16', got '" + name + "'");
}

template <size_t kLength>
std::array<int64_t, kLength> expect_values(const char* name, const std::vector<int64_t>& values) {
  if (values.size() != kLength) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(kLength) + " values, got " +
                          std::to_string(values.size()));
  }
  std::array<int64_t, kLength> out = {};
  std::copy(values.begin(), values.end(), out.begin());
  return out;
}

// One row per direction and candidate.
template <typename Problem, typename Candidate, typename Select>
py::list rows_of(const Problem& problem, const Candidate* candidates, int count, Select&& select) {
  py::list rows;
  for (const Direction direction : {Direction::kFprop, Direction::kDgrad, Direction::kWgrad}) {
    const Choice choice = select(problem, direction, Algorithm::kAuto);
    for (int i = 0; i < count; ++i) {
      const Candidate& candidate = candidates[i];
      const char* cannot = candidate.cannot(problem, direction);
      const char* passed_over = candidate.not_chosen(problem, direction);
      py::dict row;
      row["direction"] = direction_name(direction);
      row["algorithm"] = candidate.name;
      row["id"] = static_cast<int>(candidate.algorithm);
      row["available"] = cannot == nullptr;
      row["chosen"] = candidate.algorithm == choice.algorithm;
      const char* reason = cannot != nullptr ? cannot : passed_over;
      row["reason"] = reason != nullptr ? py::object(py::str(reason)) : py::object(py::none());
      rows.append(row);
    }
  }
  return rows;
}

py::list explain_on_cuda(const ConvShape& shape, Dtype dtype) {
#if defined(FBC_HAS_CUDA)
  const cuda::ConvProblem problem = {shape, dtype, device::tf32_convolutions()};
  return rows_of(problem, cuda::candidates(), cuda::kNumCandidates, cuda::select_algorithm);
#else
  throw py::value_error("device: expected 'cpu', got 'cuda': this library has no CUDA kernels");
#endif
}

py::list explain_conv(const std::vector<int64_t>& input, const std::vector<int64_t>& weight,
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, int64_t groups, int64_t num_samples, bool share_input,
                      const std::string& dtype, bool channels_last, const std::string& device) {
  const auto [N, C, H, W] = expect_values<4>("input", input);
  const auto [K, c, R, S] = expect_values<4>("weight", weight);
  const auto [stride_h, stride_w] = expect_values<2>("stride", stride);
  const auto [top, bottom, left, right] = expect_values<4>("padding", padding);
  const auto [dilation_h, dilation_w] = expect_values<2>("dilation", dilation);
  if (groups < 1) throw py::value_error("groups: expected at least 1, got " + std::to_string(groups));
  if (num_samples < 1) {
    throw py::value_error("num_samples: expected at least 1, got " + std::to_string(num_samples));
  }
  if (stride_h < 1 || stride_w < 1) throw py::value_error("stride: expected at least 1");
  ConvShape shape = {};
  shape.N = N, shape.C = C, shape.H = H, shape.W = W;
  shape.K = K, shape.R = R, shape.S = S;
  shape.P = output_extent(H, top, bottom, R, stride_h, dilation_h);
  shape.Q = output_extent(W, left, right, S, stride_w, dilation_w);
  shape.stride_h = stride_h, shape.stride_w = stride_w;
  shape.pad_top = top, shape.pad_bottom = bottom, shape.pad_left = left, shape.pad_right = right;
  shape.dilation_h = dilation_h, shape.dilation_w = dilation_w;
  shape.groups = groups;
  shape.num_samples = num_samples;
  shape.share_input = share_input;
  if (device == "cuda") return explain_on_cuda(shape, dtype_by_name(dtype));
  if (device != "cpu") {
    throw py::value_error("device: expected 'cpu' or 'cuda', got '" + device + "'");
  }
  const ConvProblem problem = {shape,         dtype_by_name(dtype), channels_last,
                               current_isa(), current_bf16(),       at::globalContext().deterministicAlgorithms()};
  return rows_of(problem, candidates(), kNumCandidates, select_algorithm);
}

std::vector<bool> activations_from_pre_activation() {
  std::vector<bool> flags;
  for (int32_t id = 0; id < kNumActivations; ++id) flags.push_back(needs_pre_activation(static_cast<Activation>(id)));
  return flags;
}

}  // namespace

}  // namespace fbc

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native library of fastbconv; importing it registers torch.ops.fastbconv.";
  m.def("build_info", &fbc::build_info, "What was compiled, by which compiler, for which torch.");
  m.def(
      "cpu_capability", [] { return fbc::isa_name(fbc::detected_isa()); },
      "Best instruction set of this processor that the build contains.");
  m.def(
      "current_isa", [] { return fbc::isa_name(fbc::current_isa()); },
      "Instruction set in use: cpu_capability(), or the lower limit that was set.");
  m.def("limit_isa", &fbc::limit_isa_by_name, py::arg("name"), "Use at most this instruction set.");
  m.def("use_huge_pages", &fbc::use_huge_pages, py::arg("use"),
        "Whether large fresh memory is advised to be of huge pages; on from the start.");
  m.def("threads_used", &fbc::threads_used, py::arg("tasks"), py::call_guard<py::gil_scoped_release>(),
        "Number of distinct threads that ran `tasks` parallel tasks.");
#if !defined(FBC_SIMT_HOST)  // which is compiled without the CPU kernels
  m.def("multiply_add_rate", &fbc::multiply_add_rate, py::arg("iterations"),
        "float32 operations a second of all threads, measured on registers, `iterations` long.");
#endif
  m.def("explain_conv", &fbc::explain_conv, py::arg("input"), py::arg("weight"), py::kw_only(), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("num_samples"), py::arg("share_input"),
        py::arg("dtype"), py::arg("channels_last"), py::arg("device") = "cpu",
        "Candidates of a convolution, best first, per direction, with reasons.");
  m.def("activations_from_pre_activation", &fbc::activations_from_pre_activation,
        "Per activation id: whether backward needs the pre-activation.");
  fbc::define_layer_call(m);
}
