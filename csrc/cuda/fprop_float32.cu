// The forward kernels (fprop_kernel.cuh) of float data.
#include "fprop_launch.cuh"

namespace fbc::cuda {

template int launch_fprop<float>(const FpropArgs&, const FpropPlan&, StreamHandle);

}  // namespace fbc::cuda
