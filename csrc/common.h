// What operators share: how they are compiled for a CPU, the range that values are clipped to, and a tensor
// list as flat memory.
//
// LibTorch's stable ABI only, so that one build serves every torch from the targeted version on.
#pragma once

// Here rather than on the command line: torch's copy of pybind11 refuses to be included where it is defined.
#define TORCH_TARGET_VERSION WGAN_FAST_TORCH_ABI

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

// One function body compiled for three instruction sets, chosen when the library is loaded: a wheel cannot
// assume more than SSE2, which halves the rate from the cache. Other compilers and machines build the body
// once.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define WGAN_FAST_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WGAN_FAST_CPU_CLONES
#endif

namespace wgan_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// at::internal::GRAIN_SIZE: below it, waking a thread costs more than it saves.
constexpr int64_t kGrainSize = 32768;

inline void check_range(double low, double high) {
  STD_TORCH_CHECK(low <= high, "low must be at most high, got low=", low, " and high=", high);
}

// torch.clamp for low <= high: NaN compares false with both bounds and so stays as it is, payload included.
template <typename T>
struct Clip {
  using value_type = T;

  T low, high;

  C10_HOST_DEVICE T operator()(T value) const { return value < low ? low : value > high ? high : value; }
};

// The same for 16-bit floats on their bit patterns: integers compare twice as many lanes as a conversion to
// float would, and need no F16C or AVX512-BF16.
struct Clip16 {
  using value_type = int16_t;

  int16_t low, high;          // what is stored
  int16_t low_key, high_key;  // what is compared
  int16_t infinity;           // a greater magnitude is NaN

  Clip16(uint16_t low_bits, uint16_t high_bits, uint16_t infinity_bits)
      : low(static_cast<int16_t>(low_bits)),
        high(static_cast<int16_t>(high_bits)),
        // A zero is in range whatever its sign, so the bound moves to the zero that includes both.
        low_key(low == 0 ? key(INT16_MIN) : key(low)),
        high_key(high == INT16_MIN ? key(0) : key(high)),
        infinity(static_cast<int16_t>(infinity_bits)) {}

  // Sign-magnitude to two's complement: orders the patterns as the floats they are, -0 just below +0.
  C10_HOST_DEVICE static int16_t key(int16_t bits) {
    return static_cast<int16_t>(bits ^ ((bits >> 15) & INT16_MAX));
  }

  C10_HOST_DEVICE int16_t operator()(int16_t bits) const {
    const int16_t at = key(bits);
    const int16_t clipped = at < low_key ? low : at > high_key ? high : bits;
    return static_cast<int16_t>(bits & INT16_MAX) > infinity ? bits : clipped;
  }
};

// The bounds rounded to every supported dtype, as torch.clamp rounds them.
struct ClipRange {
  Clip<double> float64;
  Clip<float> float32;
  Clip16 float16;
  Clip16 bfloat16;

  ClipRange(double low, double high)
      : float64{low, high},
        float32{static_cast<float>(low), static_cast<float>(high)},
        float16(torch::headeronly::Half(float32.low).x, torch::headeronly::Half(float32.high).x, 0x7C00),
        bfloat16(torch::headeronly::BFloat16(float32.low).x, torch::headeronly::BFloat16(float32.high).x,
                 0x7F80) {
    check_range(low, high);
  }
};

// The elements that N tensors of one shape and dtype hold for one another, each tensor's as a line of memory;
// null for an operand that is absent.
template <size_t N>
struct Span {
  std::array<void*, N> data;
  int64_t numel;
  int64_t element_size;
  ScalarType dtype;
};

enum class Memory { kDense, kGaps, kOverlapping };

// Whether a tensor covers its stretch of memory exactly once, skips some of it, or may cover some of it
// twice.
inline Memory memory_of(const Tensor& tensor) {
  if (tensor.is_contiguous()) return Memory::kDense;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1) dims.emplace_back(strides[i], sizes[i]);
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;  // elements from the first to the last of the dims so far
  Memory memory = Memory::kDense;
  for (const auto& [stride, size] : dims) {
    if (stride < extent) return Memory::kOverlapping;
    if (stride > extent) memory = Memory::kGaps;
    extent += stride * (size - 1);
  }
  return memory;
}

// The stable ABI does not reach the version counter. Copying a tensor to itself returns before it touches
// data, but on its way it passes the dispatcher's in-place bookkeeping, which counts the write.
inline void bump_version(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_copy_(tensor.get(), tensor.get(), /*non_blocking=*/0) == TORCH_SUCCESS,
                  "a tensor may not be modified in place here: an inference tensor outside inference mode?");
}

class NoGradGuard {
 public:
  NoGradGuard() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGradGuard() { aoti_torch_grad_mode_set_enabled(enabled_); }
  NoGradGuard(const NoGradGuard&) = delete;
  NoGradGuard& operator=(const NoGradGuard&) = delete;

 private:
  const bool enabled_ = aoti_torch_grad_mode_is_enabled();
};

// Whether two dense tensors of one shape hold their elements in the same order.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1 && a_strides[i] != b_strides[i]) return false;
  return true;
}

// Calls `write(spans)`, which overwrites every element of the first `written` operands from those at the same
// place in all of them, in any order. An operand is a list of tensors, one for each span, and null where it
// is absent, which the first never is.
//
// Dense tensors of one layout are used where they lie, whatever their strides, and others through copies.
// Every tensor is checked before any is touched.
template <size_t N, typename Write>
void overwrite(const std::array<const std::vector<Tensor>*, N>& operands, size_t written,
               const Write& write) {
  const auto& first = *operands[0];
  if (first.empty()) return;
  const NoGradGuard no_grad;
  std::vector<Span<N>> spans;
  spans.reserve(first.size());
  std::vector<Tensor> copies;
  std::vector<std::pair<Tensor, Tensor>> copies_back;  // (tensor, its contiguous copy)
  const bool on_gpu = first[0].is_cuda();
  const int32_t device = first[0].get_device_index();
  for (const auto* tensors : operands)
    STD_TORCH_CHECK(tensors == nullptr || tensors->size() == first.size(), "expected lists of one length");
  for (size_t i = 0; i < first.size(); ++i) {
    const auto dtype = first[i].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
                        dtype == ScalarType::BFloat16,
                    "expected float64, float32, float16 or bfloat16 tensors");
    bool in_place = true;
    for (size_t k = 0; k < N; ++k) {
      if (operands[k] == nullptr) continue;
      const auto& tensor = (*operands[k])[i];
      STD_TORCH_CHECK(tensor.is_cuda() == on_gpu && tensor.get_device_index() == device,
                      "expected all tensors on one device");
      STD_TORCH_CHECK(tensor.scalar_type() == dtype, "expected tensors of one dtype for each other");
      const auto sizes = tensor.sizes(), shape = first[i].sizes();
      STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()),
                      "expected tensors of one shape for each other");
      if (tensor.numel() == 0) continue;
      const auto memory = k < written ? memory_of(tensor) : Memory::kDense;
      STD_TORCH_CHECK(memory != Memory::kOverlapping,
                      "expected tensors that do not overlap themselves in memory");
      in_place = in_place && memory == Memory::kDense && same_layout(first[i], tensor);
    }
    if (first[i].numel() == 0) continue;
    const int64_t element_size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    spans.push_back({{}, first[i].numel(), element_size, dtype});
    for (size_t k = 0; k < N; ++k) {
      if (operands[k] == nullptr) continue;
      const auto& tensor = (*operands[k])[i];
      const bool copied = !in_place && !tensor.is_contiguous();
      if (copied) copies.push_back(torch::stable::contiguous(tensor));
      const auto& source = copied ? copies.back() : tensor;
      spans.back().data[k] =
          k < written ? source.mutable_data_ptr() : const_cast<void*>(source.const_data_ptr());
      if (copied && k < written) copies_back.emplace_back(tensor, source);
    }
  }
  for (size_t k = 0; k < written; ++k) {
    if (operands[k] == nullptr) continue;
    for (const auto& tensor : *operands[k]) bump_version(tensor);
  }
  if (spans.empty()) return;
  write(spans);
  for (auto& [tensor, copy] : copies_back) torch::stable::copy_(tensor, copy);
}

// Calls `work(span, begin, end)` for parts that cover every span, from several threads. The threads share the
// spans' elements, not the spans: one large layer would keep one thread busy.
template <size_t N, typename Work>
void parallel_for(const std::vector<Span<N>>& spans, const Work& work) {
  std::vector<int64_t> ends;
  ends.reserve(spans.size());
  int64_t total = 0;
  for (const auto& span : spans) ends.push_back(total += span.numel);
  torch::stable::parallel_for(0, total, kGrainSize, [&](int64_t begin, int64_t end) {
    size_t at = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++at) {
      const int64_t start = ends[at] - spans[at].numel;
      const int64_t stop = std::min(end, ends[at]);
      work(spans[at], begin - start, stop - start);
      begin = stop;
    }
  });
}

}  // namespace wgan_fast
