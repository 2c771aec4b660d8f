// The pybind11 class LayerCall of the module fastbconv._C; see layer_call.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fbc {

void define_layer_call(pybind11::module_& m);

}  // namespace fbc
