// Weight clipping on a GPU: the whole list of tensors in one launch.

#include <cuda_runtime.h>

#include "../common.h"

namespace wgan_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int kVectorsPerThread = 4;
constexpr int kBlockVectors = kThreads * kVectorsPerThread;
constexpr int64_t kBlockBytes = kBlockVectors * kVectorBytes;

// A kernel's arguments hold 4 KiB; longer lists take more launches.
constexpr int kMaxTensors = 128;

struct Chunk {
  void* base[kMaxTensors];   // the span's address rounded down to a whole vector
  int64_t end[kMaxTensors];  // one past the span's last element, counted from base
  int32_t first_block[kMaxTensors];
  int8_t begin[kMaxTensors];  // the span's first element, counted from base
  ScalarType dtype[kMaxTensors];
  int32_t count;
};
static_assert(sizeof(Chunk) + sizeof(ClipRange) <= 4096);

template <typename T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  T lanes[kLanes];
};

// Stores only what changes: after an optimizer's step most of the weights are in range, and a store costs as
// much traffic as a load.
template <typename Clip>
__device__ __forceinline__ void clip_block(void* base, int64_t begin, int64_t end, int64_t block,
                                           Clip range) {
  using T = typename Clip::value_type;
  using V = Vector<T>;
  auto* const vectors = static_cast<V*>(base);
  auto* const values = static_cast<T*>(base);
  const int64_t first = block * kBlockVectors + threadIdx.x;

  V loaded[kVectorsPerThread];
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    const int64_t at = first + k * kThreads;
    if (at * V::kLanes >= begin && (at + 1) * V::kLanes <= end) loaded[k] = vectors[at];
  }
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    const int64_t at = first + k * kThreads;
    if (at * V::kLanes >= begin && (at + 1) * V::kLanes <= end) {
      bool changed = false;
#pragma unroll
      for (int lane = 0; lane < V::kLanes; ++lane) {
        const T clipped = range(loaded[k].lanes[lane]);
        changed |= clipped != loaded[k].lanes[lane];
        loaded[k].lanes[lane] = clipped;
      }
      if (changed) vectors[at] = loaded[k];
    } else {
      // The vectors that the span begins or ends within.
      const int64_t stop = min(end, (at + 1) * V::kLanes);
      for (int64_t i = max(begin, at * V::kLanes); i < stop; ++i) values[i] = range(values[i]);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    clip_weights_kernel(const __grid_constant__ Chunk chunk, const __grid_constant__ ClipRange range) {
  // The last tensor whose first block is not after this one.
  int at = 0;
  for (int after = chunk.count; after - at > 1;) {
    const int middle = (at + after) / 2;
    (chunk.first_block[middle] <= static_cast<int32_t>(blockIdx.x) ? at : after) = middle;
  }
  void* const base = chunk.base[at];
  const int64_t begin = chunk.begin[at], end = chunk.end[at];
  const int64_t block = blockIdx.x - chunk.first_block[at];
  switch (chunk.dtype[at]) {
    case ScalarType::Double:
      return clip_block(base, begin, end, block, range.float64);
    case ScalarType::Float:
      return clip_block(base, begin, end, block, range.float32);
    case ScalarType::Half:
      return clip_block(base, begin, end, block, range.float16);
    default:
      return clip_block(base, begin, end, block, range.bfloat16);
  }
}

void clip_weights_(std::vector<Tensor> tensors, double low, double high) {
  const ClipRange range(low, high);
  overwrite<1>({&tensors}, 1, [&](const std::vector<Span<1>>& spans) {
    const int32_t device = tensors[0].get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

    Chunk chunk;
    chunk.count = 0;
    int64_t blocks = 0;
    const auto launch = [&] {
      if (chunk.count == 0) return;
      clip_weights_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(chunk, range);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      chunk.count = 0;
      blocks = 0;
    };
    for (const auto& span : spans) {
      const auto address = reinterpret_cast<uintptr_t>(span.data[0]);
      const int64_t begin = address % kVectorBytes / span.element_size;
      const int64_t end = begin + span.numel;
      const int64_t span_blocks = (end * span.element_size + kBlockBytes - 1) / kBlockBytes;
      // 2^31 blocks are 32 TiB: the block index cannot run over.
      if (chunk.count == kMaxTensors) launch();
      chunk.base[chunk.count] = reinterpret_cast<void*>(address - address % kVectorBytes);
      chunk.begin[chunk.count] = static_cast<int8_t>(begin);
      chunk.end[chunk.count] = end;
      chunk.first_block[chunk.count] = static_cast<int32_t>(blocks);
      chunk.dtype[chunk.count] = span.dtype;
      ++chunk.count;
      blocks += span_blocks;
    }
    launch();
  });
}

}  // namespace
}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CUDA, m) {
  m.impl("clip_weights_", TORCH_BOX(&wgan_fast::clip_weights_));
}
