// A table of posteriors in one launch: every draw of every weight, rounded once, and the KL of
// each.
//
//   scale = floor + softplus(rho)     weight[s, e] = loc[e] + scale[e] * eps[s, e]     e = element
//   kl    = sum over e of KL(N(loc, scale) | N(prior_loc, prior_scale))
//
// Who owns what (posterior.cuh): a block takes chunks blockIdx.x, + gridDim.x, ...; a thread two
// quads of a chunk. loc and rho are read once; the draws are the inner loop. No tile: data goes
// from memory to registers and back. Per element 8 bytes read and 4, or 2, written per draw; one
// Philox call serves four elements of a draw.
//
// KL, the same bits whatever the grid:
//
//   element -> quad -> thread (two quads) -> warp (butterfly) -> chunk (warps in order)  in T
//   slot[chunk] -> lane (slots l, l + 32, ...) -> warp (butterfly) -> kl              in double
//
// The second line is done by the last block to finish, one warp an entry; a ticket tells which
// block.
//
// Bounds: any strides, extents and element_offset; elements that do not exist load as 0 and are
// never stored. Aligned dense quads move as 16 (8) bytes.
//
// Sources: the formulas are those of core/posterior.h and core/noise.h. The ticket is the
// threadFenceReduction scheme of NVIDIA's CUDA samples.
#include "posterior.cuh"

namespace fbc::cuda {
namespace {

enum SampleTensor { kLoc, kRho, kPriorLoc, kPriorScale, kSample };

constexpr int kWarps = kEntryThreads / 32;
constexpr int64_t kTicketBytes = 256;
// Blocks of a launch for each block that is resident: enough for the last ones to even out, few
// enough that tickets cost nothing. More chunks than blocks are strided over.
constexpr int64_t kWaves = 4;

template <typename T, int kCapacity>
struct SampleTable {
  Table<SampleEntry<T>, kCapacity> table;
  uint32_t slot[kCapacity];  // first slot of an entry with a KL
  T* slots;
  uint32_t* ticket;  // null: no entry wants its KL
};

template <typename T>
FBC_INLINE bool has_kl(const SampleEntry<T>& e) {
  return e.kl != nullptr && e.posterior.rho != nullptr;
}

// ---- device ---------------------------------------------------------------------------------
template <typename T>
FBC_DEVICE T warp_sum(T value) {
  FBC_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) value += gpu::shuffle_xor(value, mask);
  return value;
}

// posterior.prior_scale_value holds its inverse: the host has divided.
template <bool kDense, typename T>
FBC_DEVICE T kl_of_quad(const TableRow<SampleEntry<T>>& row, const Quad& quad, const T (&loc)[4], const T (&scale)[4]) {
  const PosteriorParams<T>& p = row.entry.posterior;
  T center[4], inverse[4], kl[4];
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) center[i] = p.prior_loc_value, inverse[i] = p.prior_scale_value;
  if (p.prior_loc != nullptr) {
    load_quad<kDense>(kDtypeOf<T>, row.map, quad, p.prior_loc, p.prior_loc_stride, row.packed >> kPriorLoc & 1u,
                      center);
  }
  if (p.prior_scale != nullptr) {
    load_quad<kDense>(kDtypeOf<T>, row.map, quad, p.prior_scale, p.prior_scale_stride, row.packed >> kPriorScale & 1u,
                      inverse);
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) inverse[i] = inverse_of_scale(inverse[i]);
  }
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) {
    const T term = kl_normal_normal(loc[i], scale[i], center[i], inverse[i]);
    kl[i] = has_element<kDense>(row.map, quad, i) ? term : T(0);
  }
  return (kl[0] + kl[1]) + (kl[2] + kl[3]);
}

// All draws of kQuads quads.
template <bool kDense, int kQuads, typename T>
FBC_DEVICE void draw_quads(const TableRow<SampleEntry<T>>& row, const Quad (&quad)[kQuads], const T (&loc)[kQuads][4],
                           const T (&scale)[kQuads][4]) {
  const SampleEntry<T>& e = row.entry;
  const bool packed = row.packed >> kSample & 1u;
  NoiseKey noise = {static_cast<uint64_t>(e.seed[0]), static_cast<uint64_t>(e.seed[1]) + e.posterior.noise.offset};
  auto* to = static_cast<unsigned char*>(e.sample);
  for (int64_t s = 0; s < e.num_samples; ++s) {
    FBC_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      float eps[4];
      T weight[4];
      normals_of(noise, e.posterior.stream, e.posterior.element_offset, quad[j], eps);
      FBC_UNROLL
      for (int i = 0; i < 4; ++i) {
        weight[i] = weight_from_eps(loc[j][i], scale[j][i], static_cast<T>(eps[i]));
      }
      store_quad<kDense>(e.sample_dtype, row.map, quad[j], to, e.sample_stride, packed, weight);
    }
    to += e.sample_sample_stride * size_of(e.sample_dtype);
    ++noise.offset;
  }
}

// A point mass: every draw is loc.
template <bool kDense, typename T>
FBC_DEVICE void copy_quad(const TableRow<SampleEntry<T>>& row, const Quad& quad, const T (&loc)[4]) {
  const SampleEntry<T>& e = row.entry;
  auto* to = static_cast<unsigned char*>(e.sample);
  for (int64_t s = 0; s < e.num_samples; ++s) {
    store_quad<kDense>(e.sample_dtype, row.map, quad, to, e.sample_stride, row.packed >> kSample & 1u, loc);
    to += e.sample_sample_stride * size_of(e.sample_dtype);
  }
}

// Quads `number`, `number` + kEntryThreads, ... of a posterior; returns their KL.
template <bool kDense, int kQuads, typename T>
FBC_DEVICE T sample_quads(const TableRow<SampleEntry<T>>& row, int64_t number) {
  const PosteriorParams<T>& p = row.entry.posterior;
  Quad quad[kQuads];
  T loc[kQuads][4], scale[kQuads][4];
  FBC_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    quad[j] = quad_of<kDense>(row.map, number + j * kEntryThreads);
    load_quad<kDense>(kDtypeOf<T>, row.map, quad[j], p.loc, p.loc_stride, row.packed >> kLoc & 1u, loc[j]);
  }
  if (p.rho == nullptr) {
    FBC_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      if (row.entry.sample != nullptr) copy_quad<kDense>(row, quad[j], loc[j]);
    }
    return T(0);
  }
  FBC_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    load_quad<kDense>(kDtypeOf<T>, row.map, quad[j], p.rho, p.rho_stride, row.packed >> kRho & 1u, scale[j]);
  }
  T kl = T(0);
  FBC_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      T t;
      scale[j][i] = scale_from_rho(scale[j][i], p.scale_floor, &t);
    }
    if (row.entry.kl != nullptr) kl += kl_of_quad<kDense>(row, quad[j], loc[j], scale[j]);
  }
  if (row.entry.sample != nullptr) draw_quads<kDense>(row, quad, loc, scale);
  return kl;
}

// A thread's part of chunk `within` of a row. Both ways add the KL in the same order.
template <typename T>
FBC_DEVICE T sample_chunk(const TableRow<SampleEntry<T>>& row, int64_t within, int thread) {
  const int64_t number = within * kChunkQuads + thread;
  if (is_dense_chunk(row.map, within)) {
    return sample_quads<true, kQuadsPerThread>(row, number);
  }
  T kl = T(0);
  FBC_UNROLL_BY(1)
  for (int j = 0; j < kQuadsPerThread; ++j) {
    kl += sample_quads<false, 1>(row, number + j * kEntryThreads);
  }
  return kl;
}

// The KL of every entry from its slots. One block.
template <typename T, int kCapacity>
FBC_DEVICE void sum_slots(const SampleTable<T, kCapacity>& params) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  for (int i = warp; i < params.table.count; i += kWarps) {
    const SampleEntry<T>& e = params.table.row[i].entry;
    if (e.kl == nullptr) continue;
    double sum = 0.0;
    if (e.posterior.rho != nullptr) {
      const uint32_t chunks = params.table.first_chunk[i + 1] - params.table.first_chunk[i];
      const T* slots = params.slots + params.slot[i];
      FBC_UNROLL_BY(8)  // loads under way at once: each is a round trip to L2
      for (uint32_t j = static_cast<uint32_t>(lane); j < chunks; j += 32) {
        sum += static_cast<double>(slots[j]);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) *e.kl = static_cast<T>(sum);
  }
}

// Shared memory: T partial[2][kWarps], then whether this block is the last.
template <typename T, int kCapacity>
FBC_KERNEL(kEntryThreads, sizeof(T) == 8 ? 2 : 4)
void sample_kernel(FBC_PARAM SampleTable<T, kCapacity> params) {
  T* const partial = reinterpret_cast<T*>(gpu::shared());
  uint32_t* const is_last = reinterpret_cast<uint32_t*>(partial + 2 * kWarps);
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t chunks = params.table.first_chunk[params.table.count];
  int phase = 0;  // partial[] is used in turns, so that one barrier a chunk is enough
  for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int i = row_of_chunk(params.table, chunk);
    const TableRow<SampleEntry<T>>& row = params.table.row[i];
    const uint32_t within = chunk - params.table.first_chunk[i];
    T kl = sample_chunk(row, static_cast<int64_t>(within), thread);
    if (!has_kl(row.entry)) continue;
    kl = warp_sum(kl);
    if ((thread & 31) == 0) partial[phase * kWarps + (thread >> 5)] = kl;
    gpu::sync();
    if (thread == 0) {
      T sum = T(0);
      for (int w = 0; w < kWarps; ++w) sum += partial[phase * kWarps + w];
      params.slots[params.slot[i] + within] = sum;
    }
    phase ^= 1;
  }
  if (params.ticket == nullptr) return;
  gpu::sync();
  if (thread == 0) *is_last = gpu::take_ticket(params.ticket) + 1 == gridDim.x;
  gpu::sync();
  if (*is_last) sum_slots(params);
}

FBC_KERNEL(kEntryThreads, 4)
void scale_kernel(FBC_PARAM TableRow<PosteriorParams<float>> row, FBC_PARAM WeightStrides stride, float* scale) {
  const PosteriorParams<float>& p = row.entry;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kEntryThreads + threadIdx.x;
  if (number < row.map.quads) {
    const Quad quad = quad_of<false>(row.map, number);
    float value[4];
    load_quad<false>(kDtypeOf<float>, row.map, quad, p.rho, p.rho_stride, row.packed & 1u, value);
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      float t;
      value[i] = scale_from_rho(value[i], p.scale_floor, &t);
    }
    store_quad<false>(kDtypeOf<float>, row.map, quad, scale, stride, row.packed >> 1 & 1u, value);
  }
}

// ---- host -----------------------------------------------------------------------------------
template <typename T>
int64_t chunks_of_entry(const SampleEntry<T>& e) {
  const PosteriorParams<T>& p = e.posterior;
  const int64_t elements = p.K * p.R * p.S * p.C;
  const int64_t shift = static_cast<int64_t>(p.element_offset % kElementsPerCounter);
  return elements == 0 ? 0 : ((elements + shift + 3) / 4 + kChunkQuads - 1) / kChunkQuads;
}

template <typename T>
TableRow<SampleEntry<T>> prepare_sample(const SampleEntry<T>& entry) {
  TableRow<SampleEntry<T>> row = {entry, {}, 0};
  SampleEntry<T>& e = row.entry;
  PosteriorParams<T>& p = e.posterior;
  if (!has_kl(e)) p.prior_loc = p.prior_scale = nullptr;
  p.prior_scale_value = inverse_of_scale(p.prior_scale_value);
  const void* data[5] = {p.loc, p.rho, p.prior_loc, p.prior_scale, e.sample};
  WeightStrides* stride[5] = {&p.loc_stride, &p.rho_stride, &p.prior_loc_stride, &p.prior_scale_stride,
                              &e.sample_stride};
  WeightStrides* used[5];
  int count = 0;
  for (int t = 0; t < 5; ++t)
    if (data[t] != nullptr) used[count++] = stride[t];
  row.map = map_elements(p, used, count);
  for (int t = 0; t < 5; ++t) {
    const int64_t bytes = t == kSample ? size_of(e.sample_dtype) : static_cast<int64_t>(sizeof(T));
    bool packed = is_packed(data[t], *stride[t], p, row.map, bytes);
    if (t == kSample) packed = packed && (e.num_samples <= 1 || e.sample_sample_stride % 4 == 0);
    row.packed |= static_cast<uint32_t>(packed) << t;
  }
  return row;
}

template <typename T, int kCapacity>
int launch_sample(const SampleEntry<T>* entries, int count, void* workspace, StreamHandle stream) {
  static_assert(sizeof(SampleTable<T, kCapacity>) <= gpu::kMaxParameters, "launch parameters");
  SampleTable<T, kCapacity> params = {};
  params.table.count = count;
  bool any_kl = false;
  int64_t chunks = 0, slots = 0;
  for (int i = 0; i < count; ++i) {
    if (entries[i].sample != nullptr && !can_store<T>(entries[i].sample_dtype)) return 1;
    params.table.row[i] = prepare_sample(entries[i]);
    params.slot[i] = static_cast<uint32_t>(slots);
    if (has_kl(entries[i])) slots += chunks_of_entry(entries[i]);
    any_kl = any_kl || entries[i].kl != nullptr;
    chunks += chunks_of_entry(entries[i]);
    params.table.first_chunk[i + 1] = static_cast<uint32_t>(chunks);
  }
  if (chunks >= kNarrow) return 1;
  if (chunks == 0 && !any_kl) return 0;
  if (any_kl) {
    params.ticket = static_cast<uint32_t*>(workspace);
    params.slots = reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + kTicketBytes);
    if (const int status = gpu::fill_zero(workspace, sizeof(uint32_t), stream)) return status;
  }
  const size_t shared_bytes = 2 * kWarps * sizeof(T) + sizeof(uint32_t);
  int resident = 0;
  if (const int status = gpu::resident_blocks(sample_kernel<T, kCapacity>, kEntryThreads, shared_bytes, &resident)) {
    return status;
  }
  const int64_t most = kWaves * resident, blocks = chunks < 1 ? 1 : chunks < most ? chunks : most;
  return gpu::launch(sample_kernel<T, kCapacity>, dim3(static_cast<unsigned>(blocks)), kEntryThreads, shared_bytes,
                     stream, params);
}

}  // namespace

template <typename T>
size_t sample_workspace(const SampleEntry<T>* entries, int count) {
  constexpr int kRows = most_rows<SampleEntry<T>>();
  int64_t largest = 0;  // launches of one list follow one another in the same memory
  for (int first = 0; first < count; first += kRows) {
    int64_t slots = 0;
    for (int i = first; i < count && i < first + kRows; ++i) {
      if (has_kl(entries[i])) slots += chunks_of_entry(entries[i]);
    }
    largest = slots > largest ? slots : largest;
  }
  return static_cast<size_t>(kTicketBytes + largest * static_cast<int64_t>(sizeof(T)));
}

template <typename T>
int sample(const SampleEntry<T>* entries, int count, void* workspace, StreamHandle stream) {
  constexpr int kRows = most_rows<SampleEntry<T>>();
  int status = 0;
  for (int first = 0; first < count && status == 0; first += kRows) {
    const int left = count - first, some = left < kRows ? left : kRows;
    status = some <= kSmallTable ? launch_sample<T, kSmallTable>(entries + first, some, workspace, stream)
                                 : launch_sample<T, kRows>(entries + first, some, workspace, stream);
  }
  return status;
}

template size_t sample_workspace<float>(const SampleEntry<float>*, int);
template size_t sample_workspace<double>(const SampleEntry<double>*, int);
template int sample<float>(const SampleEntry<float>*, int, void*, StreamHandle);
template int sample<double>(const SampleEntry<double>*, int, void*, StreamHandle);

int scale_of(const PosteriorParams<float>& posterior, float* scale, StreamHandle stream) {
  TableRow<PosteriorParams<float>> row = {posterior, {}, 0};
  PosteriorParams<float>& p = row.entry;
  p.element_offset = 0;
  p.loc_stride = p.rho_stride;  // the tensor that is read decides the order
  WeightStrides stride = {p.R * p.S * p.C, p.S * p.C, p.C, 1};
  WeightStrides* used[3] = {&p.rho_stride, &p.loc_stride, &stride};
  row.map = map_elements(p, used, 3);
  if (row.map.elements == 0) return 0;
  row.packed = static_cast<uint32_t>(is_packed(p.rho, p.rho_stride, p, row.map, 4)) |
               static_cast<uint32_t>(is_packed(scale, stride, p, row.map, 4)) << 1;
  const int64_t blocks = (row.map.quads + kEntryThreads - 1) / kEntryThreads;
  if (blocks >= kNarrow) return 1;
  return gpu::launch(scale_kernel, dim3(static_cast<unsigned>(blocks)), kEntryThreads, 0, stream, row, stride, scale);
}

}  // namespace fbc::cuda
