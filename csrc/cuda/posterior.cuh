// What sample.cu and posterior_backward.cu share: a table of posteriors in the launch parameters,
// and how its elements are dealt out.
//
//   table       entry 0        entry 1   ...        first_chunk[]: prefix sums; a block finds the
//   chunks      0 1 2 3        0 1                  entry of a chunk once, by bisection
//   chunk       kChunkQuads quads, a fixed set of elements, whatever the grid
//   quad        four elements of one Philox block: element numbers 4b .. 4b + 3
//   thread t    quads t and t + kThreads of the chunk
//
// Order of quads: element numbers, so that dense KRSC tensors are read 16 bytes at a time. Where
// loc is not dense along c (KCRS: the layout of a contiguous torch parameter) and C % 4 == 0, taps run
// fastest instead: the lanes of a warp then read neighbouring (r, s) of one channel, and the four loads
// of a quad share their cache lines with those of the lanes beside it.
//
// The host merges dimensions that are dense in all tensors of an entry; dense KRSC is one dimension.
#pragma once

#include "../core/posterior.h"
#include "index.cuh"
#include "kernels.h"
#include "noise_quad.cuh"

namespace fbc::cuda {

constexpr int kEntryThreads = 256;
constexpr int kQuadsPerThread = 2;
constexpr int kChunkQuads = kEntryThreads * kQuadsPerThread;

struct ElementMap {
  Radix radix;         // of an element number; of a quad's number where taps_fastest
  int64_t elements;
  int64_t quads;       // Philox blocks that hold an element
  int64_t R, S, C;     // after merging
  int32_t shift;       // element_offset % 4: the first quad begins `shift` elements before element 0
  bool one_row;        // K = R = S = 1
  bool whole;          // a quad never crosses a row
  bool taps_fastest;
};

template <typename Entry>
struct TableRow {
  Entry entry;
  ElementMap map;
  uint32_t packed;     // bit i: tensor i of the entry is read or written four elements at a time
};
template <typename Entry, int kCapacity>
struct Table {
  TableRow<Entry> row[kCapacity];
  uint32_t first_chunk[kCapacity + 1];
  int32_t count;
};

// ---- host: preparing a row ------------------------------------------------------------------------
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
  map.radix = map.taps_fastest ? make_radix(p.C / 4, p.R, p.S, narrow)
                               : make_radix(p.R, p.S, p.C, narrow);
  return map;
}

// Whether quads of this tensor are aligned, dense packs.
template <typename T>
bool is_packed(const void* data, const WeightStrides& stride, const PosteriorParams<T>& p,
               const ElementMap& map, int64_t element_bytes) {
  const int64_t alignment = element_bytes * 4 < 16 ? element_bytes * 4 : 16;
  const auto skips = [](int64_t extent, int64_t step) { return extent == 1 || step % 4 == 0; };
  return data != nullptr && map.whole && map.shift == 0 && stride.c == 1 &&
         skips(p.K, stride.k) && skips(p.R, stride.r) && skips(p.S, stride.s) &&
         reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(alignment) == 0;
}

inline int64_t chunks_of(const ElementMap& map) { return (map.quads + kChunkQuads - 1) / kChunkQuads; }
FBC_INLINE int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}
template <typename T>
constexpr Dtype kDtypeOf = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
template <typename T>
bool can_store(Dtype dtype) {
  return sizeof(T) == 8 ? dtype == Dtype::kFloat64 : dtype != Dtype::kFloat64;
}

// ---- device ---------------------------------------------------------------------------------------
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

// Four elements as one thread holds them. kDense in what follows: the row is one dimension, shift is 0
// and the whole chunk exists, so that a thread keeps nothing but a number.
struct Quad {
  int64_t first;  // number of element 0, from -shift on; of a quad that does not exist: elements
  Digits at;      // its (k, r, s, c), where map.whole and not map.one_row
};

// Whether chunk `within` of a row can be walked as kDense.
FBC_DEVICE bool is_dense_chunk(const ElementMap& map, int64_t within) {
  return map.one_row && map.shift == 0 && (within + 1) * kChunkQuads * 4 <= map.elements;
}

template <bool kDense>
FBC_DEVICE Quad quad_of(const ElementMap& map, int64_t number) {
  if (kDense) return {4 * number, {}};
  Quad quad = {map.elements, {}};
  if (number >= map.quads) return quad;
  if (map.taps_fastest) {
    const Digits d = digits_of(map.radix, number);  // (k, c / 4, r, s)
    quad.at = {d.d0, d.d2, d.d3, 4 * d.d1};
    quad.first = ((d.d0 * map.R + d.d2) * map.S + d.d3) * map.C + 4 * d.d1;
  } else {
    quad.first = 4 * number - map.shift;
    if (map.whole && !map.one_row) quad.at = digits_of(map.radix, quad.first);
  }
  return quad;
}
template <bool kDense>
FBC_DEVICE bool has_element(const ElementMap& map, const Quad& quad, int i) {
  return kDense || static_cast<uint64_t>(quad.first + i) < static_cast<uint64_t>(map.elements);
}
template <bool kDense>
FBC_DEVICE bool is_full(const ElementMap& map, const Quad& quad) {
  return kDense || (quad.first >= 0 && quad.first + 4 <= map.elements);
}

FBC_DEVICE int64_t offset_of(const Digits& at, const WeightStrides& stride) {
  return at.d0 * stride.k + at.d1 * stride.r + at.d2 * stride.s + at.d3 * stride.c;
}
// Where element 0 of a quad lies that does not cross a row; the others follow at stride.c.
template <bool kDense>
FBC_DEVICE int64_t offset_of_quad(const ElementMap& map, const Quad& quad,
                                  const WeightStrides& stride) {
  return kDense || map.one_row ? quad.first * stride.c : offset_of(quad.at, stride);
}

// Where element i lies, whatever the quad.
template <bool kDense>
FBC_DEVICE int64_t offset_of_element(const ElementMap& map, const Quad& quad, int i,
                                     const WeightStrides& stride) {
  if (kDense || map.whole) return offset_of_quad<kDense>(map, quad, stride) + i * stride.c;
  return offset_of(digits_of(map.radix, quad.first + i), stride);
}

// Storage types known at run time; double goes with double only. A constant dtype folds away.
template <typename T>
FBC_DEVICE T read_as(Dtype dtype, const void* from) {
  if constexpr (sizeof(T) == 8) {
    return *static_cast<const double*>(from);
  } else {
    if (dtype == Dtype::kFloat32) return *static_cast<const float*>(from);
    if (dtype == Dtype::kBFloat16) return load_as_acc(static_cast<const BFloat16*>(from));
    return load_as_acc(static_cast<const Half*>(from));
  }
}
template <typename T>
FBC_DEVICE void read_pack_as(Dtype dtype, const void* from, T (&value)[4]) {
  if constexpr (sizeof(T) == 8) {
    load_pack(static_cast<const double*>(from), value);
  } else {
    if (dtype == Dtype::kFloat32) return load_pack(static_cast<const float*>(from), value);
    if (dtype == Dtype::kBFloat16) return load_pack(static_cast<const BFloat16*>(from), value);
    load_pack(static_cast<const Half*>(from), value);
  }
}
template <typename T>
FBC_DEVICE void write_as(Dtype dtype, void* to, T value) {
  if constexpr (sizeof(T) == 8) {
    *static_cast<double*>(to) = value;
  } else {
    if (dtype == Dtype::kFloat32) return store_one(static_cast<float*>(to), value);
    if (dtype == Dtype::kBFloat16) return store_one(static_cast<BFloat16*>(to), value);
    store_one(static_cast<Half*>(to), value);
  }
}
template <typename T>
FBC_DEVICE void write_pack_as(Dtype dtype, void* to, const T (&value)[4]) {
  if constexpr (sizeof(T) == 8) {
    store_pack(static_cast<double*>(to), value);
  } else {
    if (dtype == Dtype::kFloat32) return store_pack(static_cast<float*>(to), value);
    if (dtype == Dtype::kBFloat16) return store_pack(static_cast<BFloat16*>(to), value);
    store_pack(static_cast<Half*>(to), value);
  }
}

// value[i] = element i, 0 where there is none. Addresses are formed in bytes, so that one is kept for
// all dtypes. What is rare stays a loop (quads that cross rows; with kRare all that are not packed):
// unrolled it would cost the registers of everybody.
template <bool kDense, bool kRare = false, typename T>
FBC_DEVICE void load_quad(Dtype dtype, const ElementMap& map, const Quad& quad, const void* data,
                          const WeightStrides& stride, bool packed, T (&value)[4]) {
  const auto* const base = static_cast<const unsigned char*>(data);
  const int64_t bytes = size_of(dtype);
  if (packed && is_full<kDense>(map, quad)) {
    return read_pack_as(dtype, base + offset_of_quad<kDense>(map, quad, stride) * bytes, value);
  }
  FBC_UNROLL
  for (int i = 0; i < 4; ++i) value[i] = T(0);
  if (!kRare && (kDense || map.whole)) {
    const auto* const from = base + offset_of_quad<kDense>(map, quad, stride) * bytes;
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (has_element<kDense>(map, quad, i)) {
        value[i] = read_as<T>(dtype, from + i * stride.c * bytes);
      }
    }
    return;
  }
  if constexpr (kRare || !kDense) {
    FBC_UNROLL_BY(1)
    for (int i = 0; i < 4; ++i) {
      if (!has_element<kDense>(map, quad, i)) continue;
      const T x = read_as<T>(dtype, base + offset_of_element<kDense>(map, quad, i, stride) * bytes);
      FBC_UNROLL
      for (int j = 0; j < 4; ++j) value[j] = i == j ? x : value[j];
    }
  }
}
template <bool kDense, typename T>
FBC_DEVICE void store_quad(Dtype dtype, const ElementMap& map, const Quad& quad, void* data,
                           const WeightStrides& stride, bool packed, const T (&value)[4]) {
  auto* const base = static_cast<unsigned char*>(data);
  const int64_t bytes = size_of(dtype);
  if (kDense || map.whole) {
    auto* const to = base + offset_of_quad<kDense>(map, quad, stride) * bytes;
    if (packed && is_full<kDense>(map, quad)) return write_pack_as(dtype, to, value);
    FBC_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (has_element<kDense>(map, quad, i)) write_as(dtype, to + i * stride.c * bytes, value[i]);
    }
    return;
  }
  if constexpr (!kDense) {
    FBC_UNROLL_BY(1)
    for (int i = 0; i < 4; ++i) {
      if (!has_element<kDense>(map, quad, i)) continue;
      const int64_t at = offset_of_element<kDense>(map, quad, i, stride);
      const T x = i < 2 ? (i == 0 ? value[0] : value[1]) : (i == 2 ? value[2] : value[3]);
      write_as(dtype, base + at * bytes, x);
    }
  }
}

// eps of the quad's elements.
FBC_DEVICE void normals_of(NoiseKey noise, Stream stream, uint64_t element_offset, const Quad& quad,
                           float (&eps)[4]) {
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
