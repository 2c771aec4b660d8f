// The extents of one convolution (cross-correlation) and the index maps of its three directions.
//
//   fprop  output[n,p,q,k]    = sum over r,s,c  input[n, h(p,r), w(q,s), c] * weight[k,r,s,c]
//   dgrad  grad_input[n,h,w,c]= sum over r,s,k  grad[n,p,q,k] * weight[k,r,s,c],  h(p,r) = h, w(q,s) = w
//   wgrad  grad_w[k,r,s,c]    = sum over n,p,q  grad[n,p,q,k] * input[n, h(p,r), w(q,s), c]
//   h(p,r) = p * stride_h - pad_top + r * dilation_h          (w(q,s) alike; outside the image: zero)
//
// c runs over the C/G input channels of k's group. Padding may differ on all four sides.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fbc {

struct ConvShape {
  int64_t N;        // input rows
  int64_t C, H, W;  // input channels, height, width
  int64_t K, R, S;  // output channels, filter height, width
  int64_t P, Q;     // output height, width: output_extent()
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  int64_t dilation_h, dilation_w;
  int64_t groups;
  int64_t num_samples;  // weight draws; draw s serves output rows [s, s+1) * output_rows / num_samples
  bool share_input;     // every draw reads all N input rows, output has num_samples * N rows

  FBC_INLINE int64_t output_rows() const { return share_input ? N * num_samples : N; }
  FBC_INLINE int64_t rows_per_sample() const { return share_input ? N : N / num_samples; }
  FBC_INLINE int64_t channels_per_group() const { return C / groups; }
  FBC_INLINE int64_t filters_per_group() const { return K / groups; }
};

// floor((extent + pads - effective filter) / stride) + 1, and 0 where the filter just does not fit.
// Negative means that there is no valid output at all: the caller reports it.
FBC_INLINE int64_t output_extent(int64_t extent, int64_t pad_before, int64_t pad_after, int64_t filter, int64_t stride,
                                 int64_t dilation) {
  const int64_t span = extent + pad_before + pad_after - ((filter - 1) * dilation + 1) + stride;
  return span >= 0 ? span / stride : -((-span + stride - 1) / stride);
}

// TensorFlow's 'same': ceil(extent / stride) outputs; the odd zero goes to the end.
struct SamePadding {
  int64_t before, after;
};
FBC_INLINE SamePadding same_padding(int64_t extent, int64_t filter, int64_t stride, int64_t dilation) {
  const int64_t outputs = (extent + stride - 1) / stride;
  const int64_t needed = (outputs - 1) * stride + (filter - 1) * dilation + 1 - extent;
  const int64_t total = needed > 0 ? needed : 0;
  return {total / 2, total - total / 2};
}

// The indices i in [0, count) with 0 <= i * step + start < extent, as a half-open range.
struct IndexRange {
  int64_t begin, end;
};
FBC_INLINE IndexRange valid_range(int64_t count, int64_t step, int64_t start, int64_t extent) {
  int64_t begin = start >= 0 ? 0 : (-start + step - 1) / step;
  int64_t end = extent - start <= 0 ? 0 : (extent - start + step - 1) / step;
  end = end < count ? end : count;
  begin = begin < end ? begin : end;
  return {begin, end};
}

}  // namespace fbc
