// Clipped RMSprop on a CPU.

#include "clipped_rmsprop.h"

namespace wgan_fast {
namespace {

template <typename Stored, bool kCentered, bool kMomentum>
inline __attribute__((always_inline)) void update(const RmspropSpan& span, int64_t begin, int64_t end,
                                                  ClippedRmsprop<Compute<Stored>> step) {
  using T = Compute<Stored>;
  auto* const __restrict__ params = static_cast<Stored*>(span.data[kParam]);
  auto* const __restrict__ square_avgs = static_cast<Stored*>(span.data[kSquareAvg]);
  auto* const __restrict__ grad_avgs = static_cast<Stored*>(span.data[kGradAvg]);
  auto* const __restrict__ momentum_buffers = static_cast<Stored*>(span.data[kMomentumBuffer]);
  const auto* const __restrict__ grads = static_cast<const Stored*>(span.data[kGrad]);
  for (int64_t i = begin; i < end; ++i) {
    T square_avg = static_cast<T>(square_avgs[i]), grad_avg = 0, momentum_buffer = 0;
    if constexpr (kCentered) grad_avg = static_cast<T>(grad_avgs[i]);
    if constexpr (kMomentum) momentum_buffer = static_cast<T>(momentum_buffers[i]);
    const T param = step.template operator()<kCentered, kMomentum>(
        static_cast<T>(params[i]), static_cast<T>(grads[i]), square_avg, grad_avg, momentum_buffer);
    params[i] = static_cast<Stored>(param);
    square_avgs[i] = static_cast<Stored>(square_avg);
    if constexpr (kCentered) grad_avgs[i] = static_cast<Stored>(grad_avg);
    if constexpr (kMomentum) momentum_buffers[i] = static_cast<Stored>(momentum_buffer);
  }
}

template <typename Stored>
inline __attribute__((always_inline)) void update(const RmspropSpan& span, int64_t begin, int64_t end,
                                                  const ClippedRmsprop<Compute<Stored>>& step) {
  const bool centered = span.data[kGradAvg] != nullptr, momentum = span.data[kMomentumBuffer] != nullptr;
  if (centered && momentum) return update<Stored, true, true>(span, begin, end, step);
  if (centered) return update<Stored, true, false>(span, begin, end, step);
  if (momentum) return update<Stored, false, true>(span, begin, end, step);
  return update<Stored, false, false>(span, begin, end, step);
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

struct Steps {
  ClippedRmsprop<double> float64;
  ClippedRmsprop<float> float32, float16, bfloat16;

  explicit Steps(const RmspropOptions& options)
      : float64(ClippedRmsprop<double>::for_storage<double>(options)),
        float32(ClippedRmsprop<float>::for_storage<float>(options)),
        float16(ClippedRmsprop<float>::for_storage<Half>(options)),
        bfloat16(ClippedRmsprop<float>::for_storage<BFloat16>(options)) {}
};

WGAN_FAST_CPU_CLONES void update(const RmspropSpan& span, int64_t begin, int64_t end, const Steps& steps) {
  switch (span.dtype) {
    case ScalarType::Double:
      return update<double>(span, begin, end, steps.float64);
    case ScalarType::Float:
      return update<float>(span, begin, end, steps.float32);
    case ScalarType::Half:
      return update<Half>(span, begin, end, steps.float16);
    default:
      return update<BFloat16>(span, begin, end, steps.bfloat16);
  }
}

void clipped_rmsprop_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> square_avgs,
                      std::vector<Tensor> grad_avgs, std::vector<Tensor> momentum_buffers,
                      std::optional<Tensor> device_lr, double lr, double alpha, double eps,
                      double weight_decay, double momentum, bool maximize, double low, double high) {
  STD_TORCH_CHECK(!device_lr.has_value(), "device_lr is for tensors on a GPU");
  const RmspropOptions options{lr, alpha, eps, weight_decay, momentum, maximize, low, high};
  check_range(low, high);
  const Steps steps(options);
  overwrite<kRmspropOperands>(rmsprop_operands(params, square_avgs, grad_avgs, momentum_buffers, grads),
                              kGrad, [&](const std::vector<RmspropSpan>& spans) {
                                parallel_for(spans, [&](const RmspropSpan& span, int64_t begin, int64_t end) {
                                  update(span, begin, end, steps);
                                });
                              });
}

}  // namespace
}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CPU, m) {
  m.impl("clipped_rmsprop_", TORCH_BOX(&wgan_fast::clipped_rmsprop_));
}
