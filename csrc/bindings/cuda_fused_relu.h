// cuDNN's convolution with bias and relu in one kernel, where it can be had.
#pragma once

#include "cuda_conv.h"

namespace fbc::device {

// Worth a try: relu and a bias, one draw, no pre-activation wanted, and no demand for deterministic
// algorithms, which this call does not pass on.
bool can_fuse_relu(const ConvCall& call, const Forward& out);

// relu(convolution + bias), bias (K) in the dtype of the input; undefined where cuDNN has no kernel
// for it. What it has refused once is not tried again.
at::Tensor fused_relu(const ConvCall& call, const at::Tensor& input, const at::Tensor& filters, const at::Tensor& bias,
                      std::array<int64_t, 2> padding);

}  // namespace fbc::device
