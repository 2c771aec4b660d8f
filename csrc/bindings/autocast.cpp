// Under autocast only the activation is cast. Parameters, sampling and KL keep their dtype; the
// sampled weight is rounded once, to the dtype of the input, inside the kernel.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "signatures.h"

namespace fbc {

namespace {

constexpr char kBconv2d[] = "fastbconv::bconv2d";
constexpr char kBconv2dAffine[] = "fastbconv::bconv2d_affine";

template <const char* name, typename Signature>
struct CastInput;

template <const char* name, typename Result, typename... Rest>
struct CastInput<name, Result(const at::Tensor&, Rest...)> {
  static Result call(const at::Tensor& input, Rest... rest) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Result(const at::Tensor&, Rest...)>();
    const at::DeviceType device = input.device().type();
    c10::impl::ExcludeDispatchKeyGuard no_autocast(
        c10::DispatchKeySet{c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});
    const at::ScalarType type = at::autocast::get_autocast_dtype(device);
    return op.call(at::autocast::cached_cast(type, input, device), std::forward<Rest>(rest)...);
  }
};

void cast_inputs(torch::Library& m) {
  m.impl("bconv2d", CastInput<kBconv2d, Bconv2dSignature>::call);
  m.impl("bconv2d_affine", CastInput<kBconv2dAffine, Bconv2dAffineSignature>::call);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbconv, AutocastCPU, m) { cast_inputs(m); }
TORCH_LIBRARY_IMPL(fastbconv, AutocastCUDA, m) { cast_inputs(m); }

}  // namespace fbc
