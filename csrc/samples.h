// A batch of samples as flat memory, read and written in the type that is computed in.
#pragma once

#include <atomic>

#include "common.h"

namespace wgan_fast {

// Elements that pass through a buffer at a time, where they are not of the type that is computed in.
constexpr int64_t kBufferSize = 1024;

// Whether memory holds one sample `[*D]` after another, each without gaps, its elements in any order.
inline bool has_dense_samples(const Tensor& batch) {
  return memory_of(batch) == Memory::kDense &&
         (batch.sizes()[0] <= 1 || batch.strides()[0] * batch.sizes()[0] == batch.numel());
}

// New memory on the device of `like`. Not new_empty, which looks itself up by its name at every call.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes,
                    const std::vector<int64_t>& strides, ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// New memory for `rows` samples in the layout of `like`, which has dense ones.
inline Tensor empty_samples(const Tensor& like, int64_t rows, ScalarType dtype) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  std::vector<int64_t> strides(like.strides().begin(), like.strides().end());
  strides[0] = like.numel() / sizes[0];
  sizes[0] = rows;
  return empty(like, sizes, strides, dtype);
}

// Converts `count` elements; null where there is nothing to convert.
using Conversion = void (*)(const void* from, void* to, int64_t count);
Conversion conversion(ScalarType from, ScalarType to);

template <typename C>
constexpr ScalarType kScalarType = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;

inline int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    default:
      return 2;
  }
}

// Memory of any supported dtype as numbers of type C.
template <typename C>
class Source {
 public:
  Source(const Tensor& tensor)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        size_(element_size(tensor.scalar_type())),
        convert_(conversion(tensor.scalar_type(), kScalarType<C>)) {}

  bool direct() const { return convert_ == nullptr; }

  // Elements `at` to `at + count`: where they lie, or, for at most kBufferSize of them, in `buffer`.
  const C* read(int64_t at, int64_t count, C* buffer) const {
    const void* const from = data_ + at * size_;
    if (direct()) return static_cast<const C*>(from);
    convert_(from, buffer, count);
    return buffer;
  }

 private:
  const char* data_;
  int64_t size_;
  Conversion convert_;
};

// The same to write to.
template <typename C>
class Target {
 public:
  Target(const Tensor& tensor)
      : data_(static_cast<char*>(tensor.mutable_data_ptr())),
        size_(element_size(tensor.scalar_type())),
        convert_(conversion(kScalarType<C>, tensor.scalar_type())) {}

  bool direct() const { return convert_ == nullptr; }

  // Where to put elements from `at` on: their own place, or `buffer`, for `flush` to write.
  C* place(int64_t at, C* buffer) const {
    return direct() ? reinterpret_cast<C*>(data_ + at * size_) : buffer;
  }
  void flush(int64_t at, int64_t count, const C* buffer) const {
    if (!direct()) convert_(buffer, data_ + at * size_, count);
  }

 private:
  char* data_;
  int64_t size_;
  Conversion convert_;
};

// Calls `run(begin, end)` for all of [0, total), at least `least` at a time. A thread takes the next grain
// when it has done one: a thread that was asleep joins late, and the first to work does not wait for it.
template <typename Run>
void parallel_grains(int64_t total, int64_t least, const Run& run) {
  const int64_t grain = std::max<int64_t>(least, total / (4 * torch::stable::get_num_threads()));
  const int64_t grains = (total + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(grains, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < grains;) run(i * grain, std::min(total, (i + 1) * grain));
  });
}

}  // namespace wgan_fast
