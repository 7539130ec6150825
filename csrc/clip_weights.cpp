// Weight clipping on a CPU.

#include "common.h"

namespace wgan_fast {
namespace {

// Every element is stored, changed or not: testing blocks before storing was no faster on a CPU, from the
// cache or from memory, with none, few or half of the elements out of range.
template <typename Clip>
inline __attribute__((always_inline)) void clip(void* data, int64_t begin, int64_t end, Clip range) {
  auto* const values = static_cast<typename Clip::value_type*>(data);
  for (int64_t i = begin; i < end; ++i) values[i] = range(values[i]);
}

WGAN_FAST_CPU_CLONES void clip_float64(void* data, int64_t begin, int64_t end, Clip<double> range) {
  clip(data, begin, end, range);
}
WGAN_FAST_CPU_CLONES void clip_float32(void* data, int64_t begin, int64_t end, Clip<float> range) {
  clip(data, begin, end, range);
}
WGAN_FAST_CPU_CLONES void clip_16_bit(void* data, int64_t begin, int64_t end, Clip16 range) {
  clip(data, begin, end, range);
}

void clip_span(const Span<1>& span, int64_t begin, int64_t end, const ClipRange& range) {
  void* const data = span.data[0];
  switch (span.dtype) {
    case ScalarType::Double:
      return clip_float64(data, begin, end, range.float64);
    case ScalarType::Float:
      return clip_float32(data, begin, end, range.float32);
    case ScalarType::Half:
      return clip_16_bit(data, begin, end, range.float16);
    default:
      return clip_16_bit(data, begin, end, range.bfloat16);
  }
}

void clip_weights_(std::vector<Tensor> tensors, double low, double high) {
  const ClipRange range(low, high);
  overwrite<1>({&tensors}, 1, [&](const std::vector<Span<1>>& spans) {
    parallel_for(
        spans, [&](const Span<1>& span, int64_t begin, int64_t end) { clip_span(span, begin, end, range); });
  });
}

}  // namespace
}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CPU, m) {
  m.impl("clip_weights_", TORCH_BOX(&wgan_fast::clip_weights_));
}
