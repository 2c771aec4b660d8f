// The forward kernels (fprop_kernel.cuh) of Half data.
#include "fprop_launch.cuh"

namespace fbc::cuda {

template int launch_fprop<Half>(const FpropArgs&, const FpropPlan&, StreamHandle);

}  // namespace fbc::cuda
