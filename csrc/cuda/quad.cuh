// Quads: four elements of one Philox block of a (K, R, S, C) tensor, as one thread holds them, and
// how they are read and written in any layout and storage type. posterior.cuh says how they are
// dealt out.
//
//   element_offset % 4 = shift      quad b of a posterior holds elements 4 b - shift .. 4 b - shift
//   + 3
#pragma once

#include "../core/params.h"
#include "index.cuh"

namespace fbc::cuda {

constexpr int kEntryThreads = 256;
constexpr int kQuadsPerThread = 2;
constexpr int kChunkQuads = kEntryThreads * kQuadsPerThread;

struct ElementMap {
  Radix radix;  // of an element number; of a quad's number where taps_fastest
  int64_t elements;
  int64_t quads;    // Philox blocks that hold an element
  int64_t R, S, C;  // after merging
  int32_t shift;    // element_offset % 4: the first quad begins `shift` elements before element 0
  bool one_row;     // K = R = S = 1
  bool whole;       // a quad never crosses a row
  bool taps_fastest;
};

FBC_INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
template <typename T>
constexpr Dtype kDtypeOf = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
// Four elements as one thread holds them. kDense in what follows: the row is one dimension, shift
// is 0 and the whole chunk exists, so that a thread keeps nothing but a number.
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
FBC_DEVICE int64_t offset_of_quad(const ElementMap& map, const Quad& quad, const WeightStrides& stride) {
  return kDense || map.one_row ? quad.first * stride.c : offset_of(quad.at, stride);
}

// Where element i lies, whatever the quad.
template <bool kDense>
FBC_DEVICE int64_t offset_of_element(const ElementMap& map, const Quad& quad, int i, const WeightStrides& stride) {
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

// value[i] = element i, 0 where there is none. Addresses are formed in bytes, so that one is kept
// for all dtypes. What is rare stays a loop (quads that cross rows; with kRare all that are not
// packed): unrolled it would cost the registers of everybody.
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

}  // namespace fbc::cuda
