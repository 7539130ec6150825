// What the four passes need of a normalisation over groups of channels, on a CPU.
//
// With n = (x - mean) rstd, means over the m elements of a group, and J u = rstd (u - <u> - n <u n>), every
// operator here is a few sums per channel, a few scalars made of them, and one linear combination of its
// operands with coefficients per channel. A sample stays in the cache from the sums to the combination, so
// that each tensor crosses memory once.

#include "common.h"

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>

#define WGAN_FAST_INLINE inline __attribute__((always_inline))

namespace wgan_fast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The sum over samples is made of this many parts whatever the number of threads, so that it does not depend
// on it.
constexpr int64_t kParts = 64;

enum class Kind { kForward, kVjp, kJvp, kParameters, kSecond };

// [N, C, S] in memory, or [N, S, C] where the channels come last.
struct Shape {
  int64_t N, C, S, groups;
  bool last;

  int64_t sample() const { return C * S; }
};

// One operand: where it lies, and whether in the other order than x.
struct Operand {
  const void* data = nullptr;
  bool turned = false;
};

struct Task {
  Kind kind;
  Shape shape;
  int vectors;  // how many operands besides x
  // The cotangent or the tangent; for kSecond the cotangent, the tangent and the cotangent of the output.
  std::array<Operand, 3> given;
  const void* x;
  void* out;                    // nullptr for kParameters
  double *mean, *rstd;          // [N, groups], written by kForward
  double eps;                   // for kForward
  const double *weight, *bias;  // [C], or nullptr for ones and zeros; the bias for kForward
  double* parts;                // [kParts, 2, C]: shares of the weight's and the bias's gradient, or nullptr
};

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A cache line of accumulators: the compiler may not reorder one sum, but it may vectorise many.
template <typename A>
constexpr int64_t kLanes = 64 / sizeof(A);

template <typename A>
WGAN_FAST_INLINE A total(const A* lanes) {
  A sum = 0;
  for (int64_t l = 0; l < kLanes<A>; ++l) sum += lanes[l];
  return sum;
}

// Adds sum(v) and sum(v (x - mean)) over a line of one channel.
template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void moments(const T* v, const T* x, A mean, int64_t size, A* first, A* second) {
  A a[kLanes<A>] = {}, b[kLanes<A>] = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>)
    for (int64_t l = 0; l < kLanes<A>; ++l) {
      const A value = static_cast<A>(v[i + l]);
      a[l] += value;
      b[l] += value * (static_cast<A>(x[i + l]) - mean);
    }
  for (int64_t l = 0; i < size; ++i, ++l) {
    a[l] += static_cast<A>(v[i]);
    b[l] += static_cast<A>(v[i]) * (static_cast<A>(x[i]) - mean);
  }
  *first += total(a);
  *second += total(b);
}

// Adds sum(x - mean) and sum((x - mean)^2) over a line of one channel.
template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void deviations(const T* x, A mean, int64_t size, A* first, A* second) {
  A a[kLanes<A>] = {}, b[kLanes<A>] = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>)
    for (int64_t l = 0; l < kLanes<A>; ++l) {
      const A value = static_cast<A>(x[i + l]) - mean;
      a[l] += value;
      b[l] += value * value;
    }
  for (int64_t l = 0; i < size; ++i, ++l) {
    const A value = static_cast<A>(x[i]) - mean;
    a[l] += value;
    b[l] += value * value;
  }
  *first += total(a);
  *second += total(b);
}

template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE A dot(const T* u, const T* v, int64_t size) {
  A a[kLanes<A>] = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>)
    for (int64_t l = 0; l < kLanes<A>; ++l) a[l] += static_cast<A>(u[i + l]) * static_cast<A>(v[i + l]);
  for (int64_t l = 0; i < size; ++i, ++l) a[l] += static_cast<A>(u[i]) * static_cast<A>(v[i]);
  return total(a);
}

// Per channel: sum(x - mean), then sum((x - mean)^2).
template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void spread(const Shape& shape, const T* x, const A* mean, A* sums) {
  const int64_t C = shape.C, S = shape.S;
  A* __restrict first = sums, * __restrict second = sums + C;
  std::fill(sums, sums + 2 * C, A(0));
  if (!shape.last) {
    for (int64_t c = 0; c < C; ++c) deviations(x + c * S, mean[c], S, first + c, second + c);
    return;
  }
  for (int64_t s = 0; s < S; ++s)
    for (int64_t c = 0; c < C; ++c) {
      const A value = static_cast<A>(x[s * C + c]) - mean[c];
      first[c] += value;
      second[c] += value * value;
    }
}

// Per channel: sum(v) and sum(v (x - mean)) for every operand, then sum(v0 v1) where there are two.
template <int V, typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void measure(const Shape& shape, const std::array<const T*, 3>& v, const T* x, const A* mean,
                              A* sums) {
  const int64_t C = shape.C, S = shape.S;
  std::fill(sums, sums + (2 * V + 1) * C, A(0));
  if (!shape.last) {
    for (int64_t c = 0; c < C; ++c) {
      for (int k = 0; k < V; ++k)
        moments(v[k] + c * S, x + c * S, mean[c], S, sums + 2 * k * C + c, sums + (2 * k + 1) * C + c);
      if (V > 1) sums[2 * V * C + c] = dot(v[0] + c * S, v[1] + c * S, S);
    }
    return;
  }
  for (int64_t s = 0; s < S; ++s) {
    const T* row = x + s * C;
    for (int k = 0; k < V; ++k) {
      const T* u = v[k] + s * C;
      A* __restrict first = sums + 2 * k * C, * __restrict second = first + C;
      for (int64_t c = 0; c < C; ++c) {
        const A value = static_cast<A>(u[c]);
        first[c] += value;
        second[c] += value * (static_cast<A>(row[c]) - mean[c]);
      }
    }
    if (V > 1) {
      const T *u = v[0] + s * C, *w = v[1] + s * C;
      A* __restrict both = sums + 2 * V * C;
      for (int64_t c = 0; c < C; ++c) both[c] += static_cast<A>(u[c]) * static_cast<A>(w[c]);
    }
  }
}

// out = sum over k of factors[k] v_k, plus factors[V] (x - mean) + factors[V + 1], with a factor per channel.
template <int V, typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void combine(const Shape& shape, const std::array<const T*, 3>& v, const T* x, const A* mean,
                              const A* factors, T* __restrict out) {
  const int64_t C = shape.C, S = shape.S, lines = shape.last ? S : C, size = shape.last ? C : S;
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t at = line * size;
    const T* given[V + 1];
    for (int k = 0; k < V; ++k) given[k] = v[k] + at;
    if (shape.last) {
      for (int64_t c = 0; c < C; ++c) {
        A sum = factors[V * C + c] * (static_cast<A>(x[at + c]) - mean[c]) + factors[(V + 1) * C + c];
        for (int k = 0; k < V; ++k) sum += factors[k * C + c] * static_cast<A>(given[k][c]);
        out[at + c] = static_cast<T>(sum);
      }
      continue;
    }
    A own[V + 2];
    for (int k = 0; k < V + 2; ++k) own[k] = factors[k * C + line];
    for (int64_t s = 0; s < S; ++s) {
      A sum = own[V] * (static_cast<A>(x[at + s]) - mean[line]) + own[V + 1];
      for (int k = 0; k < V; ++k) sum += own[k] * static_cast<A>(given[k][s]);
      out[at + s] = static_cast<T>(sum);
    }
  }
}

// One group of one sample: from its channels' sums to their factors, and to its share of the parameters'
// gradients.
template <typename A>
WGAN_FAST_INLINE void solve(const Task& task, int64_t begin, int64_t end, double rstd, const A* sums,
                            A* factors, double* share) {
  const int64_t C = task.shape.C;
  const double r = rstd, m = static_cast<double>((end - begin) * task.shape.S);
  const auto weight = [&](int64_t c) { return task.weight ? task.weight[c] : 1.0; };
  // <w v> and <w v n> of operand k, weighted or not.
  const auto means = [&](int k, bool weighted) {
    double plain = 0, normal = 0;
    for (int64_t c = begin; c < end; ++c) {
      const double w = weighted ? weight(c) : 1.0;
      plain += w * sums[2 * k * C + c];
      normal += w * sums[(2 * k + 1) * C + c];
    }
    return std::pair(plain / m, normal * r / m);
  };
  const auto gradient = [&](int k, int64_t c) {
    share[c] += r * sums[(2 * k + 1) * C + c];
    share[C + c] += sums[2 * k * C + c];
  };
  switch (task.kind) {
    case Kind::kForward:
      return;
    case Kind::kParameters:
      for (int64_t c = begin; c < end; ++c) gradient(0, c);
      return;
    case Kind::kVjp: {
      const auto [u, un] = means(0, true);
      for (int64_t c = begin; c < end; ++c) {
        factors[c] = static_cast<A>(r * weight(c));
        factors[C + c] = static_cast<A>(-r * r * un);
        factors[2 * C + c] = static_cast<A>(-r * u);
      }
      return;
    }
    case Kind::kJvp: {
      const auto [t, tn] = means(0, false);
      for (int64_t c = begin; c < end; ++c) {
        const double scale = r * weight(c);
        factors[c] = static_cast<A>(scale);
        factors[C + c] = static_cast<A>(-scale * r * tn);
        factors[2 * C + c] = static_cast<A>(-scale * t);
      }
      return;
    }
    case Kind::kSecond: {
      const bool incoming = task.vectors == 3;
      const A* both = sums + 2 * task.vectors * C;
      const auto [u, un] = means(0, true);
      const auto [t, tn] = means(1, false);
      const auto [b, bn] = incoming ? means(2, true) : std::pair(0.0, 0.0);
      double ut = 0;
      for (int64_t c = begin; c < end; ++c) ut += weight(c) * both[c];
      const double spread = ut / m - u * t - un * tn;
      A *slope = factors + task.vectors * C, *shift = slope + C;
      for (int64_t c = begin; c < end; ++c) {
        factors[c] = static_cast<A>(-r * r * tn * weight(c));
        factors[C + c] = static_cast<A>(-r * r * un);
        if (incoming) factors[2 * C + c] = static_cast<A>(r * weight(c));
        slope[c] = static_cast<A>(-r * r * (r * (spread - 2 * un * tn) + bn));
        shift[c] = static_cast<A>(r * (r * (un * t + tn * u) - b));
        share[c] += r * (both[c] - t * sums[c] - r * tn * sums[C + c]);
        if (incoming) gradient(2, c);
      }
    }
  }
}

// The forward of one sample: statistics from the deviations about a first mean, so that a large mean costs
// nothing.
template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void normalize(const Task& task, int64_t n, const T* x, A* mean, A* sums, A* factors) {
  const Shape& shape = task.shape;
  const int64_t C = shape.C, channels = C / shape.groups;
  const double m = static_cast<double>(channels * shape.S);
  const auto group_mean = [&](int64_t g, const A* values) {
    double sum = 0;
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) sum += values[c];
    return sum / m;
  };
  std::fill(mean, mean + C, A(0));
  spread(shape, x, mean, sums);
  for (int64_t g = 0; g < shape.groups; ++g)
    std::fill(mean + g * channels, mean + (g + 1) * channels, static_cast<A>(group_mean(g, sums)));
  spread(shape, x, mean, sums);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const double rest = group_mean(g, sums), variance = group_mean(g, sums + C) - rest * rest;
    const double r = 1 / std::sqrt(std::max(variance, 0.0) + task.eps);
    task.mean[n * shape.groups + g] = mean[g * channels] + rest;
    task.rstd[n * shape.groups + g] = r;
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      const double scale = task.weight ? r * task.weight[c] : r;
      factors[c] = static_cast<A>(scale);
      factors[C + c] = static_cast<A>((task.bias ? task.bias[c] : 0.0) - scale * rest);
    }
  }
}

// The transpose of a [rows, columns] matrix, in blocks whose both sides stay in the first cache.
template <typename T>
WGAN_FAST_INLINE void turn(const T* from, int64_t rows, int64_t columns, T* __restrict to) {
  constexpr int64_t kBlock = 16;
  for (int64_t i = 0; i < rows; i += kBlock)
    for (int64_t j = 0; j < columns; j += kBlock)
      for (int64_t y = i; y < std::min(rows, i + kBlock); ++y)
        for (int64_t z = j; z < std::min(columns, j + kBlock); ++z) to[z * rows + y] = from[y * columns + z];
}

template <int V, typename T>
WGAN_FAST_INLINE void samples(const Task& task, int64_t begin, int64_t end, double* share) {
  using A = Sum<T>;
  const Shape& shape = task.shape;
  const int64_t C = shape.C, size = shape.sample(), channels = C / shape.groups;
  std::vector<A> scratch((1 + (2 * V + 2) + (V + 2)) * C);
  A *mean = scratch.data(), *sums = mean + C, *factors = sums + (2 * V + 2) * C;
  int64_t turned = 0;
  for (int k = 0; k < V; ++k) turned += task.given[k].turned;
  std::vector<T> copies(turned * size);
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(task.x) + n * size;
    std::array<const T*, 3> v{};
    T* copy = copies.data();
    for (int k = 0; k < V; ++k) {
      v[k] = static_cast<const T*>(task.given[k].data) + n * size;
      if (task.given[k].turned) {
        turn(v[k], shape.last ? C : shape.S, shape.last ? shape.S : C, copy);
        v[k] = copy;
        copy += size;
      }
    }
    if constexpr (V == 0) {
      normalize(task, n, x, mean, sums, factors);
    } else {
      for (int64_t c = 0; c < C; ++c) mean[c] = static_cast<A>(task.mean[n * shape.groups + c / channels]);
      measure<V>(shape, v, x, mean, sums);
      for (int64_t g = 0; g < shape.groups; ++g)
        solve(task, g * channels, (g + 1) * channels, task.rstd[n * shape.groups + g], sums, factors, share);
    }
    if (task.out) combine<V>(shape, v, x, mean, factors, static_cast<T*>(task.out) + n * size);
  }
}

template <typename T>
WGAN_FAST_INLINE void samples(const Task& task, int64_t begin, int64_t end, double* share) {
  switch (task.vectors) {
    case 0:
      return samples<0, T>(task, begin, end, share);
    case 1:
      return samples<1, T>(task, begin, end, share);
    case 2:
      return samples<2, T>(task, begin, end, share);
    default:
      return samples<3, T>(task, begin, end, share);
  }
}

WGAN_FAST_CPU_CLONES void samples_float64(const Task& task, int64_t begin, int64_t end, double* share) {
  samples<double>(task, begin, end, share);
}
WGAN_FAST_CPU_CLONES void samples_float32(const Task& task, int64_t begin, int64_t end, double* share) {
  samples<float>(task, begin, end, share);
}
WGAN_FAST_CPU_CLONES void samples_bfloat16(const Task& task, int64_t begin, int64_t end, double* share) {
  samples<BFloat16>(task, begin, end, share);
}
WGAN_FAST_CPU_CLONES void samples_float16(const Task& task, int64_t begin, int64_t end, double* share) {
  samples<Half>(task, begin, end, share);
}

// Whether a tensor fills its memory in the order [N, C, *] or, with the channels last, [N, *, C].
bool lies(const Tensor& tensor, bool last) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  int64_t expected = 1;
  const auto holds = [&](int64_t d) {
    const bool fits = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return fits;
  };
  if (last && !holds(1)) return false;
  for (int64_t d = dims - 1; d >= (last ? 2 : 1); --d)
    if (!holds(d)) return false;
  return holds(0);
}

std::vector<double> read(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  const int64_t size = dense.numel();
  std::vector<double> values(size);
  const auto copy = [&](const auto* data) {
    for (int64_t i = 0; i < size; ++i) values[i] = static_cast<double>(data[i]);
  };
  switch (dense.scalar_type()) {
    case ScalarType::Double:
      copy(static_cast<const double*>(dense.const_data_ptr()));
      break;
    case ScalarType::Float:
      copy(static_cast<const float*>(dense.const_data_ptr()));
      break;
    case ScalarType::BFloat16:
      copy(static_cast<const BFloat16*>(dense.const_data_ptr()));
      break;
    default:
      copy(static_cast<const Half*>(dense.const_data_ptr()));
  }
  return values;
}

template <typename Values>
Tensor written(const Tensor& like, const Values& values, const std::vector<int64_t>& sizes) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  Tensor tensor = torch::stable::new_empty(like, sizes, wide ? ScalarType::Double : ScalarType::Float);
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    if (wide)
      static_cast<double*>(tensor.mutable_data_ptr())[i] = values(i);
    else
      static_cast<float*>(tensor.mutable_data_ptr())[i] = static_cast<float>(values(i));
  }
  return tensor;
}

// One call of an operator: its operands in one order of memory, and what it makes of them.
class Run {
 public:
  Run(Kind kind, const Tensor& input, int64_t groups, const std::optional<Tensor>& weight) : x_(input) {
    const auto dtype = input.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
                        dtype == ScalarType::BFloat16,
                    "expected float64, float32, float16 or bfloat16 tensors");
    STD_TORCH_CHECK(input.dim() >= 2 && groups > 0 && input.size(1) % groups == 0,
                    "expected [N, C, *] with C in groups");
    task_.kind = kind;
    Shape& shape = task_.shape;
    shape = {input.size(0), input.size(1), 1, groups, false};
    for (int64_t d = 2; d < input.dim(); ++d) shape.S *= input.size(d);
    const bool first = lies(input, false);
    last_ = !first && (input.dim() == 4 || input.dim() == 5) && lies(input, true);
    if (!first && !last_) x_ = torch::stable::contiguous(input);
    // A line of one element is no line: one position per sample is a row of channels.
    shape.last = last_ || shape.S == 1;
    task_.x = x_.const_data_ptr();
    if (weight) task_.weight = per_channel(*weight, weight_);
  }

  void statistics(const Tensor& mean, const Tensor& rstd) {
    const int64_t size = task_.shape.N * task_.shape.groups;
    STD_TORCH_CHECK(mean.numel() == size && rstd.numel() == size,
                    "expected a mean and an rstd per sample and group");
    mean_ = read(mean), rstd_ = read(rstd);
  }

  void operand(const Tensor& given) {
    STD_TORCH_CHECK(given.scalar_type() == x_.scalar_type() && given.numel() == x_.numel(),
                    "expected operands with the input's shape and dtype");
    const bool same = lies(given, last_), turned = !same && lies(given, !last_);
    operands_.push_back(same || turned ? given : torch::stable::contiguous(given));
    task_.given[task_.vectors++] = {operands_.back().const_data_ptr(), turned || (!same && last_)};
  }

  void forward(const std::optional<Tensor>& bias, double eps) {
    if (bias) task_.bias = per_channel(*bias, bias_);
    task_.eps = eps;
    mean_.resize(task_.shape.N * task_.shape.groups);
    rstd_.resize(mean_.size());
  }

  Tensor out() {
    Tensor out = last_ ? torch::stable::empty_like(x_) : torch::stable::new_empty(x_, x_.sizes());
    task_.out = out.mutable_data_ptr();
    run();
    return out;
  }

  void run() {
    const Shape& shape = task_.shape;
    task_.mean = mean_.data(), task_.rstd = rstd_.data();
    const int64_t count = std::min(kParts, shape.N);
    if (task_.kind == Kind::kParameters || task_.kind == Kind::kSecond) parts_.resize(kParts * 2 * shape.C);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t from = shape.N * part / count, to = shape.N * (part + 1) / count;
        double* share = parts_.empty() ? nullptr : parts_.data() + part * 2 * shape.C;
        switch (x_.scalar_type()) {
          case ScalarType::Double:
            samples_float64(task_, from, to, share);
            break;
          case ScalarType::Float:
            samples_float32(task_, from, to, share);
            break;
          case ScalarType::BFloat16:
            samples_bfloat16(task_, from, to, share);
            break;
          default:
            samples_float16(task_, from, to, share);
        }
      }
    });
  }

  // The gradient of the weight (0) or of the bias (1).
  Tensor gradient(int64_t which) const {
    const int64_t C = task_.shape.C;
    const auto sum = [&](int64_t c) {
      double sum = 0;
      for (int64_t part = 0; part < kParts; ++part) sum += parts_[(2 * part + which) * C + c];
      return sum;
    };
    return written(x_, sum, {C});
  }

  std::pair<Tensor, Tensor> made_statistics() const {
    const std::vector<int64_t> sizes{task_.shape.N, task_.shape.groups};
    return {written(
                x_, [&](int64_t i) { return mean_[i]; }, sizes),
            written(x_, [&](int64_t i) { return rstd_[i]; }, sizes)};
  }

 private:
  const double* per_channel(const Tensor& tensor, std::vector<double>& values) const {
    STD_TORCH_CHECK(tensor.numel() == task_.shape.C, "expected a weight and a bias for each channel");
    values = read(tensor);
    return values.data();
  }

  Task task_{};
  Tensor x_;
  bool last_;
  std::vector<Tensor> operands_;
  std::vector<double> mean_, rstd_, weight_, bias_, parts_;
};

using Weight = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> norm_forward(Tensor x, Weight weight, Weight bias, int64_t groups,
                                                double eps) {
  Run run(Kind::kForward, x, groups, weight);
  run.forward(bias, eps);
  const Tensor out = run.out();
  const auto [mean, rstd] = run.made_statistics();
  return {out, mean, rstd};
}

Tensor norm_vjp(Tensor cotangent, Tensor x, Tensor mean, Tensor rstd, Weight weight, int64_t groups) {
  Run run(Kind::kVjp, x, groups, weight);
  run.statistics(mean, rstd);
  run.operand(cotangent);
  return run.out();
}

Tensor norm_jvp(Tensor tangent, Tensor x, Tensor mean, Tensor rstd, Weight weight, int64_t groups) {
  Run run(Kind::kJvp, x, groups, weight);
  run.statistics(mean, rstd);
  run.operand(tangent);
  return run.out();
}

std::tuple<Tensor, Tensor> norm_parameters(Tensor cotangent, Tensor x, Tensor mean, Tensor rstd,
                                           int64_t groups) {
  Run run(Kind::kParameters, x, groups, std::nullopt);
  run.statistics(mean, rstd);
  run.operand(cotangent);
  run.run();
  return {run.gradient(0), run.gradient(1)};
}

std::tuple<Tensor, Tensor, Tensor> norm_second_order(Tensor tangent, Tensor cotangent,
                                                     std::optional<Tensor> beta, Tensor x, Tensor mean,
                                                     Tensor rstd, Weight weight, int64_t groups) {
  Run run(Kind::kSecond, x, groups, weight);
  run.statistics(mean, rstd);
  run.operand(cotangent);
  run.operand(tangent);
  if (beta) run.operand(*beta);
  const Tensor out = run.out();
  return {out, run.gradient(0), run.gradient(1)};
}

}  // namespace
}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&wgan_fast::norm_forward));
  m.impl("norm_vjp", TORCH_BOX(&wgan_fast::norm_vjp));
  m.impl("norm_jvp", TORCH_BOX(&wgan_fast::norm_jvp));
  m.impl("norm_parameters", TORCH_BOX(&wgan_fast::norm_parameters));
  m.impl("norm_second_order", TORCH_BOX(&wgan_fast::norm_second_order));
}
