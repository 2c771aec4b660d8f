// The forward kernels (fprop_kernel.cuh) of BFloat16 data.
#include "fprop_launch.cuh"

namespace fbc::cuda {

template int launch_fprop<BFloat16>(const FpropArgs&, const FpropPlan&, StreamHandle);

}  // namespace fbc::cuda
