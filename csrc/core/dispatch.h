// Run-time value -> compile-time tag: visit_activation(a, f) calls f with an ActivationTag<A>, so that
// a kernel is written once as a generic lambda. Returns false for an unknown value, whose caller
// reports it with the list of what exists.
#pragma once

#include <type_traits>

#include "activation.h"
#include "types.h"

namespace fbc {

template <Activation kValue>
using ActivationTag = std::integral_constant<Activation, kValue>;

namespace detail {
template <int32_t kIndex, typename F>
inline bool visit_activation_from(Activation a, F&& f) {
  if constexpr (kIndex < kNumActivations) {
    if (static_cast<int32_t>(a) == kIndex) {
      f(ActivationTag<static_cast<Activation>(kIndex)>{});
      return true;
    }
    return visit_activation_from<kIndex + 1>(a, f);
  } else {
    return false;
  }
}
}  // namespace detail

template <typename F>
inline bool visit_activation(Activation a, F&& f) {
  return detail::visit_activation_from<0>(a, f);
}

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename F>
inline bool visit_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32: f(TypeTag<float>{}); return true;
    case Dtype::kFloat64: f(TypeTag<double>{}); return true;
    case Dtype::kBFloat16: f(TypeTag<BFloat16>{}); return true;
    case Dtype::kFloat16: f(TypeTag<Half>{}); return true;
  }
  return false;
}

}  // namespace fbc
