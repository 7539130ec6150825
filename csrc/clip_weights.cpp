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

void clip_span(const Span& span, int64_t begin, int64_t end, const ClipRange& range) {
  switch (span.dtype) {
    case ScalarType::Double:
      return clip_float64(span.data, begin, end, range.float64);
    case ScalarType::Float:
      return clip_float32(span.data, begin, end, range.float32);
    case ScalarType::Half:
      return clip_16_bit(span.data, begin, end, range.float16);
    default:
      return clip_16_bit(span.data, begin, end, range.bfloat16);
  }
}

void clip_weights_(std::vector<Tensor> tensors, double low, double high) {
  const ClipRange range(low, high);
  overwrite(tensors, [&](const std::vector<Span>& spans) {
    // The threads share the list's elements, not its tensors: one large layer would keep one thread busy.
    std::vector<int64_t> ends;
    ends.reserve(spans.size());
    int64_t total = 0;
    for (const auto& span : spans) ends.push_back(total += span.numel);
    torch::stable::parallel_for(0, total, kGrainSize, [&](int64_t begin, int64_t end) {
      size_t at = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
      for (; begin < end; ++at) {
        const int64_t start = ends[at] - spans[at].numel;
        const int64_t stop = std::min(end, ends[at]);
        clip_span(spans[at], begin - start, stop - start, range);
        begin = stop;
      }
    });
  });
}

}  // namespace
}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CPU, m) {
  m.impl("clip_weights_", TORCH_BOX(&wgan_fast::clip_weights_));
}
