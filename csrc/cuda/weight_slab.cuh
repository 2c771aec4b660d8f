// Cooperative sampling: the blocks of one launch sample every weight once, into slabs that lie in
// L2, and use a slab as soon as it is complete.
//
//   slab (draw, step)   [filter k of all groups][64 bytes]: columns [step * kDepth, + kDepth)
//                       of the filters, rounded to T, zeros beyond the last column
//   task                kThreads / 4 filters of one step, for up to kTaskDraws draws: loc and
//                       rho are read once; tasks in the order the product needs them, dealt to
//                       blocks in turn
//   counter             one per (kTaskDraws draws, step): tasks that are done, added with release;
//                       complete at slab_strips()
//   KL                  of the first draws' tasks: a task's sum goes to its own slot (threads in a
//                       fixed tree, in double), and the last block adds the slots in a fixed order
//
// No block waits before all its own tasks are done, so any number of resident blocks makes
// progress, and nothing that is written depends on their number.
#pragma once

#include "conv_tile.cuh"
#include "weight_tile.cuh"

namespace fbc::cuda {

constexpr int kTaskDraws = 4;

struct KlSum {
  float* out;        // null: not wanted
  double* slot;      // one partial sum each
  uint32_t* ticket;  // zero before the launch
  int32_t slots;
};

struct SlabPlan {
  unsigned char* slabs;
  uint32_t* counters;            // zero before the launch
  int32_t steps, strips, tasks;  // tasks 0: the weights are given
};

// Sum over the threads, in thread 0 alone. `turn` alternates between calls.
template <int kThreads>
FBC_DEVICE double block_sum(double value, BlockScratch& scratch, int turn) {
  const int thread = static_cast<int>(threadIdx.x);
  FBC_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) value += gpu::shuffle_xor(value, mask);
  if (thread % 32 == 0) scratch.partial[turn & 1][thread / 32] = value;
  gpu::sync();
  double sum = 0.0;
  if (thread == 0) {
    for (int w = 0; w < kThreads / 32; ++w) sum += scratch.partial[turn & 1][w];
  }
  return sum;
}

// Called by all threads of `blocks` blocks, whose thread 0 has written its slots.
template <int kThreads>
FBC_DEVICE void finish_kl(const KlSum& kl, uint32_t blocks, BlockScratch& scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  gpu::sync();
  if (thread == 0) scratch.last = gpu::take_ticket(kl.ticket) + 1 == blocks ? 1u : 0u;
  gpu::sync();
  if (scratch.last == 0) return;
  double sum = 0.0;
  for (int32_t i = thread; i < kl.slots; i += kThreads) sum += kl.slot[i];
  sum = block_sum<kThreads>(sum, scratch, 0);
  if (thread == 0) *kl.out = static_cast<float>(sum);
}

// Where every sampled weight is written besides, for a caller that keeps it.
template <typename T>
struct KeptWeight {
  T* data;      // (num_samples, K, R, S, C/G) contiguous; null: nobody
  bool packed;  // quads are aligned

  FBC_DEVICE void store(const WeightSampler& w, int32_t draw, int32_t k, int32_t column,
                        const float (&value)[4]) const {
    if (data == nullptr) return;
    T* to = data + (static_cast<int64_t>(draw) * w.filters + k) * w.columns + column;
    if (packed && column < w.columns) {
      store_weight_quad(to, value);
    } else {
      FBC_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (column + i < w.columns) store_one(to + i, value[i]);
      }
    }
  }
};
template <typename T>
FBC_INLINE KeptWeight<T> kept_weight(void* data, const WeightSampler& w) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0;
  return {static_cast<T*>(data), aligned && w.columns % 4 == 0};
}

// One 16-byte chunk of a slab row, for draws [first, end). Returns its KL where wanted.
template <typename T>
FBC_DEVICE float sample_chunk(const WeightSampler& w, const KeptWeight<T>& kept, unsigned char* row, int64_t draw_bytes,
                              int32_t k, int32_t column, int32_t first, int32_t end, bool with_kl) {
  constexpr int kQuads = kChunkElements<T> / 4;
  WeightQuad quad[kQuads];
  float kl = 0.0f;
  FBC_UNROLL
  for (int q = 0; q < kQuads; ++q) {
    quad[q] = load_weight_quad(w, k, column + 4 * q, w.columns);
    if (with_kl) kl += kl_of_quad(w, quad[q], k, column + 4 * q);
  }
  for (int32_t draw = first; draw < end; ++draw) {
    const NoiseKey key = draw_key(w, draw);
    T* to = reinterpret_cast<T*>(row + draw * draw_bytes);
    FBC_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      float value[4];
      draw_weight_quad(w, quad[q], key, k, column + 4 * q, value);
      store_weight_quad(to + 4 * q, value);
      kept.store(w, draw, k, column + 4 * q, value);
    }
  }
  return kl;
}

// This block's share of all tasks.
template <typename T, int kThreads>
FBC_DEVICE void sample_slabs(const SlabPlan& plan, const WeightSampler& w, int32_t num_samples,
                             const KeptWeight<T>& kept, const KlSum& kl, BlockScratch& scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t slab_bytes = static_cast<int64_t>(w.filters) * kRowBytes;
  int turn = 0;
  for (int32_t task = static_cast<int32_t>(blockIdx.x); task < plan.tasks;
       task += static_cast<int32_t>(gridDim.x), ++turn) {
    const int32_t slab = task / plan.strips, strip = task % plan.strips;  // of a group of draws
    const int32_t step = slab % plan.steps, first = slab / plan.steps * kTaskDraws;
    const int32_t end = first + kTaskDraws < num_samples ? first + kTaskDraws : num_samples;
    const int32_t k = strip * (kThreads / kRowChunks) + thread / kRowChunks;
    const int32_t chunk = thread % kRowChunks;
    const bool with_kl = kl.out != nullptr && first == 0;
    double sum = 0.0;
    if (k < w.filters) {
      unsigned char* row = plan.slabs + step * slab_bytes + int64_t{k} * kRowBytes + chunk * 16;
      sum = sample_chunk<T>(w, kept, row, plan.steps * slab_bytes, k, step * kDepth<T> + chunk * kChunkElements<T>,
                            first, end, with_kl);
    }
    sum = block_sum<kThreads>(sum, scratch, turn);  // synchronises: the whole strip is written
    if (thread == 0) {
      if (with_kl) kl.slot[task] = sum;
      gpu::add_release(plan.counters + slab, 1);
    }
  }
  if (kl.out != nullptr) finish_kl<kThreads>(kl, gridDim.x, scratch);
}

// Slabs are met in rising order, so one number tells which are complete; tiles whose steps are
// split are met in any order, and each asks for its own.
struct SlabWatch {
  int32_t ready;  // every slab (of a group of draws) below has been waited for, or is never needed
  int32_t first;  // that of step 0 of the present tile

  FBC_DEVICE void begin_tile(const SlabPlan& plan, int32_t draw, bool split) {
    first = draw / kTaskDraws * plan.steps;
    if (split && plan.tasks > 0) ready = 0;
  }
  // A thread for each of the next slabs: asking takes a way to L2 and back, so not at every step.
  FBC_DEVICE void wait(const SlabPlan& plan, int32_t step, int32_t end) {
    constexpr int32_t kAtOnce = 16;
    const int32_t slab = first + step;
    if (slab < ready) return;
    const int32_t count = end - step < kAtOnce ? end - step : kAtOnce;
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    if (thread < count) {
      gpu::wait_at_least(plan.counters + slab + thread, static_cast<uint32_t>(plan.strips));
    }
    gpu::sync();
    ready = slab + count;
  }
};

}  // namespace fbc::cuda
