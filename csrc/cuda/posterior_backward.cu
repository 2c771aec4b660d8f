// Gradients of a table of posteriors in one launch, with the noise of the forward pass made again.
//
//   g_s[e]    = sum over slabs, in order, of grad_weight[slab, s, e]
//   by_loc    = sum over draws s, in order, of g_s        by_scale = the same of g_s * eps[s, e]
//   grad_loc  = by_loc + grad_kl * dKL/dloc
//   grad_rho  = (by_scale + grad_kl * dKL/dscale) * sigmoid(rho)
//   grad_prior_loc, grad_prior_scale = grad_kl * dKL/dprior_loc, dprior_scale
//
// Who owns what (posterior.cuh): block b takes chunk b of the table, a thread two of its quads, so
// every sum of an element is made by one thread: no order depends on the grid. No tile, no shared
// memory. Per element and draw 4 (2) bytes of gradient a slab, 8 of parameters, 8 written.
//
// Bounds: any strides, extents and element_offset; elements that do not exist load as 0 and are
// never stored. Aligned dense quads move as 16 (8) bytes.
//
// Sources: the formulas are those of core/posterior.h and core/noise.h.
#include "posterior.cuh"

namespace fbc::cuda {
namespace {

enum GradTensor {
  kGradLoc,
  kGradRho,
  kGradPriorLoc,
  kGradPriorScale,  // written
  kByLoc,
  kByRho,
  kByPriorLoc,
  kByPriorScale,  // parameters
  kByWeight,
  kGradTensors
};

template <typename T, int kCapacity>
using GradTable = Table<PosteriorGradEntry<T>, kCapacity>;
template <typename T>
using GradRow = TableRow<PosteriorGradEntry<T>>;

// ---- device ---------------------------------------------------------------------------------

// sum = sum over slabs, in order. Slabs come dense from the weight gradient's kernel.
template <bool kDense, bool kRare, typename T>
FBC_DEVICE void sum_slabs(const GradRow<T>& row, const Quad& quad, const void* grad, T (&sum)[4]) {
  const PosteriorGradEntry<T>& e = row.entry;
  const bool packed = row.packed >> kByWeight & 1u;
  const int64_t step = e.grad_slab_stride * size_of(e.grad_dtype);
  const auto* data = static_cast<const unsigned char*>(grad);
  load_quad<kDense, kRare>(e.grad_dtype, row.map, quad, data, e.grad_stride, packed, sum);
  FBC_UNROLL_BY(1)
  for (int slab = 1; slab < static_cast<int>(e.slabs); ++slab) {
    T value[4];
    data += step;
    load_quad<kDense, true>(e.grad_dtype, row.map, quad, data, e.grad_stride, packed, value);
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] += value[i];
  }
}

// by_loc and by_scale from the gradients of all draws.
template <bool kDense, typename T>
FBC_DEVICE void sum_draws(const GradRow<T>& row, const Quad& quad, T (&by_loc)[4], T (&by_scale)[4]) {
  const PosteriorGradEntry<T>& e = row.entry;
  const PosteriorParams<T>& p = e.posterior;
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) by_loc[i] = by_scale[i] = T(0);
  if (e.grad_weight == nullptr) return;
  const auto* data = static_cast<const unsigned char*>(e.grad_weight);
  FBC_UNROLL_BY(1)
  for (int s = 0; s < static_cast<int>(e.num_samples); ++s) {
    T grad[4];
    sum_slabs<kDense, false>(row, quad, data, grad);
    data += e.grad_sample_stride * size_of(e.grad_dtype);
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) by_loc[i] += grad[i];
    if (e.seed == nullptr) continue;
    const NoiseKey noise = {static_cast<uint64_t>(e.seed[0]),
                            static_cast<uint64_t>(e.seed[1]) + p.noise.offset + static_cast<uint64_t>(s)};
    float eps[4];
    normals_of(noise, p.stream, p.element_offset, quad, eps);
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) by_scale[i] += grad[i] * static_cast<T>(eps[i]);
  }
  if (e.grad_weight_eps != nullptr) sum_slabs<kDense, true>(row, quad, e.grad_weight_eps, by_scale);
}

// The prior of four elements. posterior.prior_scale_value holds its inverse: the host has divided.
template <bool kDense, typename T>
FBC_DEVICE void load_prior(const GradRow<T>& row, const Quad& quad, T (&center)[4], T (&inverse)[4]) {
  const PosteriorParams<T>& p = row.entry.posterior;
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) center[i] = p.prior_loc_value, inverse[i] = p.prior_scale_value;
  if (p.prior_loc != nullptr) {
    load_quad<kDense>(kDtypeOf<T>, row.map, quad, p.prior_loc, p.prior_loc_stride, row.packed >> kByPriorLoc & 1u,
                      center);
  }
  if (p.prior_scale != nullptr) {
    load_quad<kDense>(kDtypeOf<T>, row.map, quad, p.prior_scale, p.prior_scale_stride, row.packed >> kByPriorScale & 1u,
                      inverse);
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) inverse[i] = inverse_of_scale(inverse[i]);
  }
}

template <bool kDense, typename T>
FBC_DEVICE void store_gradient(const GradRow<T>& row, const Quad& quad, T* data, const WeightStrides& stride,
                               GradTensor tensor, const T (&value)[4]) {
  if (data == nullptr) return;
  store_quad<kDense>(kDtypeOf<T>, row.map, quad, data, stride, row.packed >> tensor & 1u, value);
}

// Rare: reads the parameters once more rather than keep them.
template <bool kDense, typename T>
FBC_DEVICE void store_prior_gradients(const GradRow<T>& row, const Quad& quad, T grad_kl) {
  const PosteriorGradEntry<T>& e = row.entry;
  const PosteriorParams<T>& p = e.posterior;
  T loc[4], rho[4], center[4], inverse[4];
  load_quad<kDense>(kDtypeOf<T>, row.map, quad, p.loc, p.loc_stride, row.packed >> kByLoc & 1u, loc);
  load_quad<kDense>(kDtypeOf<T>, row.map, quad, p.rho, p.rho_stride, row.packed >> kByRho & 1u, rho);
  load_prior<kDense>(row, quad, center, inverse);
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) {
    T t;
    const T scale = scale_from_rho(rho[i], p.scale_floor, &t);
    const PriorGrad<T> g = kl_prior_grad(grad_kl, loc[i], scale, center[i], inverse[i]);
    loc[i] = g.loc, rho[i] = g.scale;
  }
  store_gradient<kDense>(row, quad, e.grad_prior_loc, e.grad_prior_loc_stride, kGradPriorLoc, loc);
  store_gradient<kDense>(row, quad, e.grad_prior_scale, e.grad_prior_scale_stride, kGradPriorScale, rho);
}

// grad_loc is stored before rho is read, except where registers are plenty: the two halves of
// posterior_grad() need different parameters.
template <bool kDense, typename T>
FBC_DEVICE void finish_quad(const GradRow<T>& row, const Quad& quad, T grad_kl, T (&by_loc)[4], T (&by_scale)[4]) {
  const PosteriorGradEntry<T>& e = row.entry;
  const PosteriorParams<T>& p = e.posterior;
  if (p.rho == nullptr) {
    store_gradient<kDense>(row, quad, e.grad_loc, e.grad_loc_stride, kGradLoc, by_loc);
    return;
  }
  T loc[4], rho[4], center[4], inverse[4];
  load_quad<kDense>(kDtypeOf<T>, row.map, quad, p.loc, p.loc_stride, row.packed >> kByLoc & 1u, loc);
  const bool packed = row.packed >> kByRho & 1u;
  if (kDense) load_quad<kDense>(kDtypeOf<T>, row.map, quad, p.rho, p.rho_stride, packed, rho);
  load_prior<kDense>(row, quad, center, inverse);
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) {
    by_loc[i] = posterior_grad(by_loc[i], T(0), grad_kl, loc[i], T(0), center[i], inverse[i], p.scale_floor).loc;
  }
  store_gradient<kDense>(row, quad, e.grad_loc, e.grad_loc_stride, kGradLoc, by_loc);
  if (!kDense) load_quad<kDense>(kDtypeOf<T>, row.map, quad, p.rho, p.rho_stride, packed, rho);
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) {
    by_scale[i] = posterior_grad(T(0), by_scale[i], grad_kl, T(0), rho[i], T(0), inverse[i], p.scale_floor).rho;
  }
  store_gradient<kDense>(row, quad, e.grad_rho, e.grad_rho_stride, kGradRho, by_scale);
  if (e.grad_prior_loc != nullptr || e.grad_prior_scale != nullptr) {
    store_prior_gradients<kDense>(row, quad, grad_kl);
  }
}

// One quad at a time: many blocks to a multiprocessor keep more loads in flight than many quads to
// a thread would.
template <bool kDense, typename T>
FBC_DEVICE void backward_quad(const GradRow<T>& row, int64_t number) {
  const T grad_kl = row.entry.grad_kl != nullptr ? *row.entry.grad_kl : T(0);
  const Quad quad = quad_of<kDense>(row.map, number);
  T by_loc[4], by_scale[4];
  sum_draws<kDense>(row, quad, by_loc, by_scale);
  finish_quad<kDense>(row, quad, grad_kl, by_loc, by_scale);
}

template <typename T, int kCapacity>
FBC_KERNEL(kEntryThreads, sizeof(T) == 8 ? 2 : 4)
void posterior_backward_kernel(FBC_PARAM GradTable<T, kCapacity> table) {
  const int i = row_of_chunk(table, blockIdx.x);
  const GradRow<T>& row = table.row[i];
  const int64_t within = blockIdx.x - table.first_chunk[i];
  const int64_t number = within * kChunkQuads + threadIdx.x;
  if (is_dense_chunk(row.map, within)) {
    FBC_UNROLL_BY(1)
    for (int j = 0; j < kQuadsPerThread; ++j) {
      backward_quad<true>(row, number + j * kEntryThreads);
    }
    return;
  }
  FBC_UNROLL_BY(1)
  for (int j = 0; j < kQuadsPerThread; ++j) {
    backward_quad<false>(row, number + j * kEntryThreads);
  }
}

// ---- host -----------------------------------------------------------------------------------

// What is not needed becomes null: then it is not read, and does not hinder the merging of
// dimensions.
template <typename T>
void drop_unused(PosteriorGradEntry<T>& e) {
  PosteriorParams<T>& p = e.posterior;
  if (p.rho == nullptr) {
    e.grad_kl = nullptr;
    e.grad_rho = e.grad_prior_loc = e.grad_prior_scale = nullptr;
  }
  const bool with_kl = p.rho != nullptr && e.grad_kl != nullptr;
  if (!with_kl) {  // the KL has factor 0: any prior does, and NaN must not come of it
    p.prior_loc = p.prior_scale = nullptr;
    p.prior_loc_value = T(0);
    p.prior_scale_value = T(1);
  }
  if (e.grad_loc == nullptr && e.grad_rho == nullptr) e.grad_weight = nullptr;
  if (e.grad_weight == nullptr) e.grad_weight_eps = nullptr;
  if (e.grad_rho == nullptr) e.grad_weight_eps = nullptr;
  const bool with_noise = e.grad_rho != nullptr && e.grad_weight_eps == nullptr;
  if (!with_noise) e.seed = nullptr;
  p.prior_scale_value = inverse_of_scale(p.prior_scale_value);
}

template <typename T>
TableRow<PosteriorGradEntry<T>> prepare_backward(const PosteriorGradEntry<T>& entry) {
  GradRow<T> row = {entry, {}, 0};
  PosteriorGradEntry<T>& e = row.entry;
  PosteriorParams<T>& p = e.posterior;
  drop_unused(e);
  const void* data[kGradTensors] = {e.grad_loc, e.grad_rho,  e.grad_prior_loc, e.grad_prior_scale, p.loc,
                                    p.rho,      p.prior_loc, p.prior_scale,    e.grad_weight};
  WeightStrides* stride[kGradTensors] = {&e.grad_loc_stride,         &e.grad_rho_stride,    &e.grad_prior_loc_stride,
                                         &e.grad_prior_scale_stride, &p.loc_stride,         &p.rho_stride,
                                         &p.prior_loc_stride,        &p.prior_scale_stride, &e.grad_stride};
  WeightStrides* used[kGradTensors];
  int count = 0;
  for (int t = 0; t < kGradTensors; ++t)
    if (data[t] != nullptr) used[count++] = stride[t];
  row.map = map_elements(p, used, count);
  for (int t = 0; t < kGradTensors; ++t) {
    const int64_t bytes = t == kByWeight ? size_of(e.grad_dtype) : static_cast<int64_t>(sizeof(T));
    bool packed = is_packed(data[t], *stride[t], p, row.map, bytes);
    if (t == kByWeight && packed) {
      packed = (e.num_samples <= 1 || e.grad_sample_stride % 4 == 0) && (e.slabs <= 1 || e.grad_slab_stride % 4 == 0) &&
               (e.grad_weight_eps == nullptr || is_packed(e.grad_weight_eps, *stride[t], p, row.map, bytes));
    }
    row.packed |= static_cast<uint32_t>(packed) << t;
  }
  return row;
}

template <typename T, int kCapacity>
int launch_backward(const PosteriorGradEntry<T>* entries, int count, StreamHandle stream) {
  static_assert(sizeof(GradTable<T, kCapacity>) <= gpu::kMaxParameters, "launch parameters");
  GradTable<T, kCapacity> table = {};
  table.count = count;
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) {
    if (entries[i].grad_weight != nullptr && !can_store<T>(entries[i].grad_dtype)) return 1;
    table.row[i] = prepare_backward(entries[i]);
    chunks += chunks_of(table.row[i].map);
    table.first_chunk[i + 1] = static_cast<uint32_t>(chunks);
  }
  if (chunks >= kNarrow) return 1;
  if (chunks == 0) return 0;
  return gpu::launch(posterior_backward_kernel<T, kCapacity>, dim3(static_cast<unsigned>(chunks)), kEntryThreads, 0,
                     stream, table);
}

}  // namespace

template <typename T>
int posterior_backward(const PosteriorGradEntry<T>* entries, int count, StreamHandle stream) {
  constexpr int kRows = most_rows<PosteriorGradEntry<T>>();
  int status = 0;
  for (int first = 0; first < count && status == 0; first += kRows) {
    const int left = count - first, some = left < kRows ? left : kRows;
    status = some <= kSmallTable ? launch_backward<T, kSmallTable>(entries + first, some, stream)
                                 : launch_backward<T, kRows>(entries + first, some, stream);
  }
  return status;
}

template int posterior_backward<float>(const PosteriorGradEntry<float>*, int, StreamHandle);
template int posterior_backward<double>(const PosteriorGradEntry<double>*, int, StreamHandle);

}  // namespace fbc::cuda
