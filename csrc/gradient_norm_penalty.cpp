// The input gradient's norms, the penalty and the tangent seed v on a CPU, and the second derivative: the
// gradient is read from memory once, and again from the cache.

#include <cmath>
#include <tuple>

#include "penalty.h"
#include "samples.h"

namespace wgan_fast {
namespace {

// Sums are kept in this many lanes, as many as fill four vectors, for one block, and in float64 from block to
// block: whatever the number of threads, they add up in one order.
constexpr int64_t kLanes = 64;
constexpr int64_t kBlock = kBufferSize;
// Blocks that a thread takes at a time where a row is shared.
constexpr int64_t kBlocks = kGrainSize / kBlock;

template <typename C>
inline __attribute__((always_inline)) double dot(const C* __restrict__ a, const C* __restrict__ b,
                                                 int64_t count) {
  if (count < kLanes) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
  }
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
  for (int64_t l = 0; i < count; ++i, ++l) lanes[l] += a[i] * b[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}
template <typename C>
inline __attribute__((always_inline)) void scale(const C* __restrict__ a, C* __restrict__ out, int64_t count,
                                                 C s) {
  for (int64_t i = 0; i < count; ++i) out[i] = s * a[i];
}
template <typename C>
inline __attribute__((always_inline)) void combine(const C* __restrict__ a, const C* __restrict__ b,
                                                   C* __restrict__ out, int64_t count, C s, C q) {
  for (int64_t i = 0; i < count; ++i) out[i] = s * a[i] + q * b[i];
}

#define WGAN_FAST_LOOPS(C)                                                                                 \
  WGAN_FAST_CPU_CLONES double run_dot(const C* a, const C* b, int64_t count) { return dot(a, b, count); }  \
  WGAN_FAST_CPU_CLONES void run_scale(const C* a, C* out, int64_t count, C s) { scale(a, out, count, s); } \
  WGAN_FAST_CPU_CLONES void run_combine(const C* a, const C* b, C* out, int64_t count, C s, C q) {         \
    combine(a, b, out, count, s, q);                                                                       \
  }

WGAN_FAST_LOOPS(float)
WGAN_FAST_LOOPS(double)

#undef WGAN_FAST_LOOPS

// Sums every row of `size` elements with `reduce(at, count) -> double` and writes it with `apply(row, sum,
// at, count)`, a block at a time. While a row is written the next one is read: a processor that does one
// after the other leaves half of its memory bandwidth unused. Blocks are shared out one by one where there
// are too few rows for the threads.
template <typename Reduce, typename Apply>
void reduce_rows(int64_t rows, int64_t size, const Reduce& reduce, const Apply& apply) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  const auto block = [&](int64_t row, int64_t b, const auto& call) {
    return call(row * size + b * kBlock, std::min(kBlock, size - b * kBlock));
  };
  if (blocks <= kBlocks || rows >= 4 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_grains(rows, std::max<int64_t>(1, kGrainSize / size), [&](int64_t begin, int64_t end) {
      double sum = 0, next = 0;
      for (int64_t row = begin - 1; row < end; ++row, sum = next, next = 0)
        for (int64_t b = 0; b < blocks; ++b) {
          if (row >= begin) block(row, b, [&](int64_t at, int64_t count) { apply(row, sum, at, count); });
          if (row + 1 < end) next += block(row + 1, b, reduce);
        }
    });
    return;
  }
  std::vector<double> partial(rows * blocks);
  parallel_grains(rows * blocks, kBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) partial[i] = block(i / blocks, i % blocks, reduce);
  });
  std::vector<double> sums(rows, 0);
  for (int64_t i = 0; i < rows * blocks; ++i) sums[i / blocks] += partial[i];
  parallel_grains(rows * blocks, kBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / blocks;
      block(row, i % blocks, [&](int64_t at, int64_t count) { apply(row, sums[row], at, count); });
    }
  });
}

template <typename C>
void penalty_as(const Tensor& gradient, const Penalty& penalty, const Tensor& value, const Tensor& mean_norm,
                const Tensor& norm, const Tensor& seed) {
  const Source<C> g(gradient);
  const Target<C> v(seed);
  auto* const norms = static_cast<C*>(norm.mutable_data_ptr());
  const int64_t size = gradient.numel() / penalty.groups;
  reduce_rows(
      penalty.groups, size,
      [&](int64_t at, int64_t count) {
        C buffer[kBlock];
        const C* const values = g.read(at, count, buffer);
        return run_dot(values, values, count);
      },
      [&](int64_t row, double sum, int64_t at, int64_t count) {
        C in[kBlock], out[kBlock];
        C* const place = v.place(at, out);
        const C length = static_cast<C>(std::sqrt(sum));
        if (at % size == 0) norms[row] = length;  // by one of the threads that share a row
        run_scale(g.read(at, count, in), place, count, static_cast<C>(penalty.slope(length)));
        v.flush(at, count, place);
      });
  const auto [total, mean] = penalty.of(norms);
  *static_cast<C*>(value.mutable_data_ptr()) = static_cast<C>(total);
  *static_cast<C*>(mean_norm.mutable_data_ptr()) = static_cast<C>(mean);
}

template <typename C>
void backward_as(const Tensor& gradient, const Tensor& norm, const Tensor& cotangent, const Penalty& penalty,
                 const Tensor& result) {
  const Source<C> g(gradient), c(cotangent);
  const Target<C> target(result);
  const auto* const norms = static_cast<const C*>(norm.const_data_ptr());
  reduce_rows(
      penalty.groups, gradient.numel() / penalty.groups,
      [&](int64_t at, int64_t count) {
        C first[kBlock], second[kBlock];
        return run_dot(g.read(at, count, first), c.read(at, count, second), count);
      },
      [&](int64_t row, double sum, int64_t at, int64_t count) {
        C first[kBlock], second[kBlock], out[kBlock];
        C* const place = target.place(at, out);
        run_combine(c.read(at, count, first), g.read(at, count, second), place, count,
                    static_cast<C>(penalty.slope(norms[row])),
                    static_cast<C>(penalty.curvature(norms[row], sum)));
        target.flush(at, count, place);
      });
}

Tensor dense(const Tensor& batch) {
  return has_dense_samples(batch) ? batch : torch::stable::contiguous(batch);
}

void check(const Tensor& gradient, int64_t groups) {
  STD_TORCH_CHECK(gradient.dim() > 0 && gradient.numel() > 0, "expected a batch that is not empty");
  STD_TORCH_CHECK(groups > 0 && gradient.sizes()[0] % groups == 0, "expected groups of one size");
  STD_TORCH_CHECK(gradient.scalar_type() != ScalarType::Byte, "expected a floating-point gradient");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradient_norm_penalty(Tensor gradient, double weight,
                                                                 double target, bool one_sided,
                                                                 int64_t group_size) {
  STD_TORCH_CHECK(group_size > 0 && gradient.dim() > 0 && gradient.sizes()[0] % group_size == 0,
                  "expected a group_size that divides the batch, got ", group_size);
  const Penalty penalty{weight, target, one_sided, gradient.sizes()[0] / group_size};
  check(gradient, penalty.groups);
  gradient = dense(gradient);
  const bool wide = gradient.scalar_type() == ScalarType::Double;
  const auto dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor norm = empty(gradient, {penalty.groups}, {1}, dtype);
  const Tensor value = empty(gradient, {}, {}, dtype), mean_norm = empty(gradient, {}, {}, dtype);
  const Tensor seed = empty_samples(gradient, gradient.sizes()[0], gradient.scalar_type());
  (wide ? penalty_as<double> : penalty_as<float>)(gradient, penalty, value, mean_norm, norm, seed);
  return {value, mean_norm, norm, seed};
}

Tensor gradient_norm_penalty_backward(Tensor gradient, Tensor norm, Tensor cotangent, double weight,
                                      double target, bool one_sided) {
  const Penalty penalty{weight, target, one_sided, norm.numel()};
  check(gradient, penalty.groups);
  const bool wide = gradient.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      norm.is_contiguous() && norm.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
      "expected the norms that gradient_norm_penalty returned");
  STD_TORCH_CHECK(
      cotangent.sizes().equals(gradient.sizes()) && cotangent.scalar_type() == gradient.scalar_type(),
      "expected a cotangent like the gradient");
  gradient = dense(gradient);
  if (!has_dense_samples(cotangent) || !same_layout(cotangent, gradient)) {
    Tensor copy = empty_samples(gradient, gradient.sizes()[0], gradient.scalar_type());
    cotangent = torch::stable::copy_(copy, cotangent);
  }
  const Tensor result = empty_samples(gradient, gradient.sizes()[0], gradient.scalar_type());
  (wide ? backward_as<double> : backward_as<float>)(gradient, norm, cotangent, penalty, result);
  return result;
}

}  // namespace

}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CPU, m) {
  m.impl("gradient_norm_penalty", TORCH_BOX(&wgan_fast::gradient_norm_penalty));
  m.impl("gradient_norm_penalty_backward", TORCH_BOX(&wgan_fast::gradient_norm_penalty_backward));
}
