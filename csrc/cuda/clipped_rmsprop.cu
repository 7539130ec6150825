// Clipped RMSprop on a GPU: one launch for the tensors of one dtype.

#include <cuda_runtime.h>

#include "../clipped_rmsprop.h"

namespace wgan_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int kVectorsPerThread = 2;

template <typename Stored>
constexpr int64_t kBlockElements = kThreads * kVectorsPerThread * (kVectorBytes / sizeof(Stored));

// A kernel's arguments hold 4 KiB; longer lists take more launches.
constexpr int kMaxTensors = 64;

struct Chunk {
  void* data[kMaxTensors][kRmspropOperands];
  int64_t numel[kMaxTensors];
  int32_t first_block[kMaxTensors];
  bool aligned[kMaxTensors];  // every operand begins at a whole vector
  int32_t count;
};

// A learning rate that a captured graph reads anew at every replay.
struct DeviceLr {
  const void* value;  // null: the options' is used
  bool is_double;
};

template <typename T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  T lanes[kLanes];
};

template <typename Stored, bool kCentered, bool kMomentum>
__global__ void __launch_bounds__(kThreads)
    clipped_rmsprop_kernel(const __grid_constant__ Chunk chunk,
                           const __grid_constant__ ClippedRmsprop<Compute<Stored>> options,
                           const DeviceLr device_lr) {
  using T = Compute<Stored>;
  using V = Vector<Stored>;
  constexpr int64_t kElements = kBlockElements<Stored>;

  ClippedRmsprop<T> step = options;
  if (device_lr.value != nullptr)
    step.minus_lr = -(device_lr.is_double ? static_cast<T>(*static_cast<const double*>(device_lr.value))
                                          : static_cast<T>(*static_cast<const float*>(device_lr.value)));

  // The last tensor whose first block is not after this one.
  int at = 0;
  for (int after = chunk.count; after - at > 1;) {
    const int middle = (at + after) / 2;
    (chunk.first_block[middle] <= static_cast<int32_t>(blockIdx.x) ? at : after) = middle;
  }
  auto* const params = static_cast<Stored*>(chunk.data[at][kParam]);
  auto* const square_avgs = static_cast<Stored*>(chunk.data[at][kSquareAvg]);
  auto* const grad_avgs = static_cast<Stored*>(chunk.data[at][kGradAvg]);
  auto* const momentum_buffers = static_cast<Stored*>(chunk.data[at][kMomentumBuffer]);
  const auto* const grads = static_cast<const Stored*>(chunk.data[at][kGrad]);
  const int64_t block_begin = (static_cast<int64_t>(blockIdx.x) - chunk.first_block[at]) * kElements;
  const int64_t end = min(chunk.numel[at], block_begin + kElements);

  const auto update = [&](Stored& param, const Stored& grad, Stored& square_avg, Stored& grad_avg,
                          Stored& momentum_buffer) {
    T s = static_cast<T>(square_avg), g = 0, b = 0;
    if constexpr (kCentered) g = static_cast<T>(grad_avg);
    if constexpr (kMomentum) b = static_cast<T>(momentum_buffer);
    param = static_cast<Stored>(
        step.template operator()<kCentered, kMomentum>(static_cast<T>(param), static_cast<T>(grad), s, g, b));
    square_avg = static_cast<Stored>(s);
    if constexpr (kCentered) grad_avg = static_cast<Stored>(g);
    if constexpr (kMomentum) momentum_buffer = static_cast<Stored>(b);
  };

  // Whole blocks of aligned tensors: every load is issued before the first use. In double precision the
  // vectors would spill, and single elements fill a warp's transactions too.
  const bool vectors_fit = sizeof(Stored) < 8 && chunk.aligned[at] && end - block_begin == kElements;
  if (vectors_fit) {
    V param[kVectorsPerThread], grad[kVectorsPerThread], square_avg[kVectorsPerThread];
    V grad_avg[kVectorsPerThread], momentum_buffer[kVectorsPerThread];
    const auto vectors = [&](auto* values) { return reinterpret_cast<V*>(values + block_begin); };
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const int i = threadIdx.x + k * kThreads;
      param[k] = vectors(params)[i];
      grad[k] = reinterpret_cast<const V*>(grads + block_begin)[i];
      square_avg[k] = vectors(square_avgs)[i];
      if constexpr (kCentered) grad_avg[k] = vectors(grad_avgs)[i];
      if constexpr (kMomentum) momentum_buffer[k] = vectors(momentum_buffers)[i];
    }
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const int i = threadIdx.x + k * kThreads;
#pragma unroll
      for (int lane = 0; lane < V::kLanes; ++lane)
        update(param[k].lanes[lane], grad[k].lanes[lane], square_avg[k].lanes[lane], grad_avg[k].lanes[lane],
               momentum_buffer[k].lanes[lane]);
      vectors(params)[i] = param[k];
      vectors(square_avgs)[i] = square_avg[k];
      if constexpr (kCentered) vectors(grad_avgs)[i] = grad_avg[k];
      if constexpr (kMomentum) vectors(momentum_buffers)[i] = momentum_buffer[k];
    }
    return;
  }
  for (int64_t i = block_begin + threadIdx.x; i < end; i += kThreads)
    update(params[i], grads[i], square_avgs[i], grad_avgs[i], momentum_buffers[i]);
}

template <typename Stored, bool kCentered, bool kMomentum>
void launch(const std::vector<RmspropSpan>& spans, ScalarType dtype, const RmspropOptions& options,
            const DeviceLr& device_lr, cudaStream_t stream) {
  constexpr int64_t kElements = kBlockElements<Stored>;
  const auto step = ClippedRmsprop<Compute<Stored>>::template for_storage<Stored>(options);
  Chunk chunk;
  chunk.count = 0;
  int64_t blocks = 0;
  const auto flush = [&] {
    if (chunk.count == 0) return;
    clipped_rmsprop_kernel<Stored, kCentered, kMomentum>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(chunk, step, device_lr);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    chunk.count = 0;
    blocks = 0;
  };
  for (const auto& span : spans) {
    if (span.dtype != dtype) continue;
    if (chunk.count == kMaxTensors) flush();
    bool aligned = true;
    for (int k = 0; k < kRmspropOperands; ++k) {
      chunk.data[chunk.count][k] = span.data[k];
      aligned = aligned && reinterpret_cast<uintptr_t>(span.data[k]) % kVectorBytes == 0;
    }
    chunk.numel[chunk.count] = span.numel;
    chunk.aligned[chunk.count] = aligned;
    // 2^31 blocks are terabytes: the block index cannot run over.
    chunk.first_block[chunk.count] = static_cast<int32_t>(blocks);
    ++chunk.count;
    blocks += (span.numel + kElements - 1) / kElements;
  }
  flush();
}

template <typename Stored>
void launch(const std::vector<RmspropSpan>& spans, ScalarType dtype, const RmspropOptions& options,
            const DeviceLr& device_lr, cudaStream_t stream) {
  const bool centered = spans[0].data[kGradAvg] != nullptr;
  const bool momentum = spans[0].data[kMomentumBuffer] != nullptr;
  if (centered && momentum) return launch<Stored, true, true>(spans, dtype, options, device_lr, stream);
  if (centered) return launch<Stored, true, false>(spans, dtype, options, device_lr, stream);
  if (momentum) return launch<Stored, false, true>(spans, dtype, options, device_lr, stream);
  return launch<Stored, false, false>(spans, dtype, options, device_lr, stream);
}

void clipped_rmsprop_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> square_avgs,
                      std::vector<Tensor> grad_avgs, std::vector<Tensor> momentum_buffers,
                      std::optional<Tensor> device_lr, double lr, double alpha, double eps,
                      double weight_decay, double momentum, bool maximize, double low, double high) {
  const RmspropOptions options{lr, alpha, eps, weight_decay, momentum, maximize, low, high};
  check_range(low, high);
  if (params.empty()) return;
  const int32_t device = params[0].get_device_index();
  DeviceLr lr_source{nullptr, false};
  if (device_lr.has_value()) {
    const auto dtype = device_lr->scalar_type();
    STD_TORCH_CHECK(device_lr->numel() == 1 && device_lr->is_cuda() &&
                        device_lr->get_device_index() == device &&
                        (dtype == ScalarType::Float || dtype == ScalarType::Double),
                    "device_lr must be one float32 or float64 element on the tensors' device");
    lr_source = {device_lr->const_data_ptr(), dtype == ScalarType::Double};
  }
  overwrite<kRmspropOperands>(
      rmsprop_operands(params, square_avgs, grad_avgs, momentum_buffers, grads), kGrad,
      [&](const std::vector<RmspropSpan>& spans) {
        const torch::stable::accelerator::DeviceGuard guard(device);
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
        auto* const cuda_stream = static_cast<cudaStream_t>(stream);
        launch<double>(spans, ScalarType::Double, options, lr_source, cuda_stream);
        launch<float>(spans, ScalarType::Float, options, lr_source, cuda_stream);
        launch<torch::headeronly::Half>(spans, ScalarType::Half, options, lr_source, cuda_stream);
        launch<torch::headeronly::BFloat16>(spans, ScalarType::BFloat16, options, lr_source, cuda_stream);
      });
}

}  // namespace
}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CUDA, m) {
  m.impl("clipped_rmsprop_", TORCH_BOX(&wgan_fast::clipped_rmsprop_));
}
