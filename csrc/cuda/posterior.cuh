// What sample.cu and posterior_backward.cu share: a table of posteriors in the launch parameters,
// and how its elements are dealt out.
//
//   table       entry 0        entry 1   ...        first_chunk[]: prefix sums; a block finds the
//   chunks      0 1 2 3        0 1                  entry of a chunk once, by bisection
//   chunk       kChunkQuads quads, a fixed set of elements, whatever the grid
//   quad        four elements of one Philox block: element numbers 4b .. 4b + 3
//   thread t    quads t and t + kEntryThreads of the chunk
//
// Order of quads: element numbers, so that dense KRSC tensors are read 16 bytes at a time. Where
// loc is not dense along c (KCRS: the layout of a contiguous torch parameter) and C % 4 == 0, taps
// run fastest instead: the lanes of a warp then read neighbouring (r, s) of one channel, and the
// four loads of a quad share their cache lines with those of the lanes beside it.
//
// The host merges dimensions that are dense in all tensors of an entry; dense KRSC is one
// dimension.
#pragma once

#include "../core/posterior.h"
#include "kernels.h"
#include "noise_quad.cuh"
#include "quad.cuh"

namespace fbc::cuda {

template <typename Entry>
struct TableRow {
  Entry entry;
  ElementMap map;
  uint32_t packed;  // bit i: tensor i of the entry is read or written four elements at a time
};
template <typename Entry, int kCapacity>
struct Table {
  TableRow<Entry> row[kCapacity];
  uint32_t first_chunk[kCapacity + 1];
  int32_t count;
};

// Rows of one launch of a list: fewer than kLargeTable where its parameters could not be passed.
template <typename Entry>
constexpr int most_rows() {
  constexpr size_t kOther = 256;  // first_chunk[0], count and what else a kernel gets, at most
  constexpr size_t kRow = sizeof(TableRow<Entry>) + 2 * sizeof(uint32_t);
  constexpr size_t kFit = (gpu::kMaxParameters - kOther) / kRow;
  return kFit < static_cast<size_t>(kLargeTable) ? static_cast<int>(kFit) : kLargeTable;
}

// ---- host: preparing a row ------------------------------------------------------------------

// Merges neighbouring dimensions that are dense in all tensors; extents of 1 move to the front.
inline void merge_dimensions(int64_t (&extent)[4], WeightStrides* const* tensors, int count) {
  const auto stride = [&](int t, int d) -> int64_t& {
    WeightStrides& s = *tensors[t];
    return d == 0 ? s.k : d == 1 ? s.r : d == 2 ? s.s : s.c;
  };
  int inner = 3;  // the dimension that is being extended
  for (int d = 2; d >= 0; --d) {
    if (extent[d] == 1) continue;
    bool dense = extent[inner] * extent[d] < kNarrow || extent[inner] == 1;
    for (int t = 0; t < count && extent[inner] != 1; ++t) {
      dense = dense && stride(t, d) == stride(t, inner) * extent[inner];
    }
    const int to = dense ? inner : inner - 1;
    const bool replaces = !dense || extent[inner] == 1;
    for (int t = 0; t < count && replaces; ++t) stride(t, to) = stride(t, d);
    const int64_t size = extent[d];
    extent[d] = 1;
    extent[to] = (dense ? extent[inner] : 1) * size;
    inner = to;
  }
}

// Merges the entry's extents and strides in place; the strides of loc decide the order.
template <typename T>
ElementMap map_elements(PosteriorParams<T>& p, WeightStrides* const* tensors, int count) {
  int64_t extent[4] = {p.K, p.R, p.S, p.C};
  ElementMap map = {};
  map.elements = p.K * p.R * p.S * p.C;
  map.shift = static_cast<int32_t>(p.element_offset % kElementsPerCounter);
  map.quads = map.elements == 0 ? 0 : (map.elements + map.shift + 3) / 4;
  if (map.elements > 0) merge_dimensions(extent, tensors, count);
  p.K = extent[0], p.R = map.R = extent[1], p.S = map.S = extent[2], p.C = map.C = extent[3];
  const bool aligned = map.shift == 0 && p.C % 4 == 0;
  map.one_row = p.K * p.R * p.S == 1;
  map.whole = map.one_row || aligned;
  map.taps_fastest = aligned && p.loc_stride.c != 1 && p.R * p.S > 1;
  const bool narrow = map.elements < kNarrow;
  map.radix = map.taps_fastest ? make_radix(p.C / 4, p.R, p.S, narrow) : make_radix(p.R, p.S, p.C, narrow);
  return map;
}

// Whether quads of this tensor are aligned, dense packs.
template <typename T>
bool is_packed(const void* data, const WeightStrides& stride, const PosteriorParams<T>& p, const ElementMap& map,
               int64_t element_bytes) {
  const int64_t alignment = element_bytes * 4 < 16 ? element_bytes * 4 : 16;
  const auto skips = [](int64_t extent, int64_t step) { return extent == 1 || step % 4 == 0; };
  return data != nullptr && map.whole && map.shift == 0 && stride.c == 1 && skips(p.K, stride.k) &&
         skips(p.R, stride.r) && skips(p.S, stride.s) &&
         reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(alignment) == 0;
}

inline int64_t chunks_of(const ElementMap& map) { return (map.quads + kChunkQuads - 1) / kChunkQuads; }
template <typename T>
bool can_store(Dtype dtype) {
  return sizeof(T) == 8 ? dtype == Dtype::kFloat64 : dtype != Dtype::kFloat64;
}

// ---- device ---------------------------------------------------------------------------------
template <typename Entry, int kCapacity>
FBC_DEVICE int row_of_chunk(const Table<Entry, kCapacity>& table, uint32_t chunk) {
  int low = 0, high = table.count;  // first_chunk[low] <= chunk < first_chunk[high]
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// eps of the quad's elements.
FBC_DEVICE void normals_of(NoiseKey noise, Stream stream, uint64_t element_offset, const Quad& quad, float (&eps)[4]) {
  // A multiple of four: one Philox call.
  const uint64_t number = element_offset + static_cast<uint64_t>(quad.first);
  normal_quad(noise, stream, number & ~uint64_t{3}, eps);
}

// 1 / scale; NaN where a prior's scale is not positive, which no divergence has: it must show.
template <typename T>
FBC_INLINE T inverse_of_scale(T scale) {
  return scale > T(0) ? T(1) / scale : T(__builtin_nanf(""));
}

}  // namespace fbc::cuda
