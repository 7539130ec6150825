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

enum class Kind { kVjp, kJvp, kParameters, kSecond };

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
  std::array<Operand, 3>
      given;  // cotangent or tangent; for kSecond: cotangent, tangent, cotangent of the output
  const void* x;
  void* out;                  // nullptr for kParameters
  const double *mean, *rstd;  // [N, groups]
  const double* weight;       // [C], or nullptr for ones
  double* parts;              // [kParts, 2, C]: shares of the weight's and the bias's gradient, or nullptr
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

template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE A dot(const T* u, const T* v, int64_t size) {
  A a[kLanes<A>] = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>)
    for (int64_t l = 0; l < kLanes<A>; ++l) a[l] += static_cast<A>(u[i + l]) * static_cast<A>(v[i + l]);
  for (int64_t l = 0; i < size; ++i, ++l) a[l] += static_cast<A>(u[i]) * static_cast<A>(v[i]);
  return total(a);
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
  const int64_t C = shape.C, S = shape.S;
  const A *f0 = factors, *f1 = factors + C, *f2 = factors + 2 * C, *slope = factors + V * C,
          *shift = slope + C;
  const auto value = [](T stored) __attribute__((always_inline)) { return static_cast<A>(stored); };
  if (!shape.last) {
    for (int64_t c = 0; c < C; ++c) {
      const A a = f0[c], b = V > 1 ? f1[c] : 0, d = V > 2 ? f2[c] : 0, m = mean[c], p = slope[c],
              q = shift[c];
      const T *u0 = v[0] + c * S, *u1 = V > 1 ? v[1] + c * S : u0, *u2 = V > 2 ? v[2] + c * S : u0,
              *row = x + c * S;
      for (int64_t s = 0; s < S; ++s) {
        A sum = p * (value(row[s]) - m) + q + a * value(u0[s]);
        if (V > 1) sum += b * value(u1[s]);
        if (V > 2) sum += d * value(u2[s]);
        out[c * S + s] = static_cast<T>(sum);
      }
    }
    return;
  }
  for (int64_t s = 0; s < S; ++s) {
    const T *u0 = v[0] + s * C, *u1 = V > 1 ? v[1] + s * C : u0, *u2 = V > 2 ? v[2] + s * C : u0,
            *row = x + s * C;
    for (int64_t c = 0; c < C; ++c) {
      A sum = slope[c] * (value(row[c]) - mean[c]) + shift[c] + f0[c] * value(u0[c]);
      if (V > 1) sum += f1[c] * value(u1[c]);
      if (V > 2) sum += f2[c] * value(u2[c]);
      out[s * C + c] = static_cast<T>(sum);
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
  std::vector<A> scratch((1 + (2 * V + 1) + (V + 2)) * C);
  A *mean = scratch.data(), *sums = mean + C, *factors = sums + (2 * V + 1) * C;
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
    for (int64_t c = 0; c < C; ++c) mean[c] = static_cast<A>(task.mean[n * shape.groups + c / channels]);
    measure<V>(shape, v, x, mean, sums);
    for (int64_t g = 0; g < shape.groups; ++g)
      solve(task, g * channels, (g + 1) * channels, task.rstd[n * shape.groups + g], sums, factors, share);
    if (task.out) combine<V>(shape, v, x, mean, factors, static_cast<T*>(task.out) + n * size);
  }
}

template <typename T>
WGAN_FAST_INLINE void samples(const Task& task, int64_t begin, int64_t end, double* share) {
  switch (task.vectors) {
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

struct Result {
  std::optional<Tensor> out;
  Tensor weight, bias;  // gradients, [C]
};

Result run(Kind kind, const std::vector<Tensor>& given, const Tensor& input, const Tensor& mean,
           const Tensor& rstd, const std::optional<Tensor>& weight, int64_t groups) {
  const auto dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  "expected float64, float32, float16 or bfloat16 tensors");
  STD_TORCH_CHECK(input.dim() >= 2 && groups > 0 && input.size(1) % groups == 0,
                  "expected [N, C, *] with C in groups");
  Task task{};
  task.kind = kind;
  task.vectors = static_cast<int>(given.size());
  Shape& shape = task.shape;
  shape.N = input.size(0), shape.C = input.size(1), shape.groups = groups, shape.S = 1;
  for (int64_t d = 2; d < input.dim(); ++d) shape.S *= input.size(d);
  STD_TORCH_CHECK(mean.numel() == shape.N * groups && rstd.numel() == shape.N * groups,
                  "expected a mean and an rstd for each sample and group");
  STD_TORCH_CHECK(!weight || weight->numel() == shape.C, "expected a weight for each channel");
  const bool first = lies(input, false);
  shape.last = !first && (input.dim() == 4 || input.dim() == 5) && lies(input, true);
  const Tensor x = first || shape.last ? input : torch::stable::contiguous(input);
  std::vector<Tensor> operands;
  for (size_t k = 0; k < given.size(); ++k) {
    STD_TORCH_CHECK(given[k].scalar_type() == dtype && given[k].numel() == x.numel(),
                    "expected operands with the input's shape and dtype");
    const bool same = lies(given[k], shape.last), turned = !same && lies(given[k], !shape.last);
    operands.push_back(same || turned ? given[k] : torch::stable::contiguous(given[k]));
    task.given[k] = {operands[k].const_data_ptr(), turned || (!same && shape.last)};
  }
  // A line of one element is no line: one position per sample is a row of channels.
  const bool channels_last = shape.last;
  shape.last |= shape.S == 1;
  const auto means = read(mean), rstds = read(rstd);
  const auto weights = weight ? read(*weight) : std::vector<double>();
  task.x = x.const_data_ptr();
  task.mean = means.data(), task.rstd = rstds.data(), task.weight = weight ? weights.data() : nullptr;
  Result result;
  if (kind != Kind::kParameters) {
    result.out = channels_last ? torch::stable::empty_like(x) : torch::stable::new_empty(x, x.sizes());
    task.out = result.out->mutable_data_ptr();
  }
  const bool parameters = kind == Kind::kParameters || kind == Kind::kSecond;
  std::vector<double> parts(parameters ? kParts * 2 * shape.C : 0);
  const int64_t count = std::min(kParts, shape.N);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t from = shape.N * part / count, to = shape.N * (part + 1) / count;
      double* share = parameters ? parts.data() + part * 2 * shape.C : nullptr;
      switch (dtype) {
        case ScalarType::Double:
          samples_float64(task, from, to, share);
          break;
        case ScalarType::Float:
          samples_float32(task, from, to, share);
          break;
        case ScalarType::BFloat16:
          samples_bfloat16(task, from, to, share);
          break;
        default:
          samples_float16(task, from, to, share);
      }
    }
  });
  if (!parameters) return result;
  const auto wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto gathered = [&](int64_t which) {
    Tensor gradient = torch::stable::new_empty(x, {shape.C}, wide);
    for (int64_t c = 0; c < shape.C; ++c) {
      double sum = 0;
      for (int64_t part = 0; part < count; ++part) sum += parts[(2 * part + which) * shape.C + c];
      if (wide == ScalarType::Double)
        static_cast<double*>(gradient.mutable_data_ptr())[c] = sum;
      else
        static_cast<float*>(gradient.mutable_data_ptr())[c] = static_cast<float>(sum);
    }
    return gradient;
  };
  result.weight = gathered(0);
  result.bias = gathered(1);
  return result;
}

Tensor norm_vjp(Tensor cotangent, Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                int64_t groups) {
  return *run(Kind::kVjp, {cotangent}, x, mean, rstd, weight, groups).out;
}

Tensor norm_jvp(Tensor tangent, Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                int64_t groups) {
  return *run(Kind::kJvp, {tangent}, x, mean, rstd, weight, groups).out;
}

std::tuple<Tensor, Tensor> norm_parameters(Tensor cotangent, Tensor x, Tensor mean, Tensor rstd,
                                           int64_t groups) {
  auto result = run(Kind::kParameters, {cotangent}, x, mean, rstd, std::nullopt, groups);
  return {result.weight, result.bias};
}

std::tuple<Tensor, Tensor, Tensor> norm_second_order(Tensor tangent, Tensor cotangent,
                                                     std::optional<Tensor> beta, Tensor x, Tensor mean,
                                                     Tensor rstd, std::optional<Tensor> weight,
                                                     int64_t groups) {
  std::vector<Tensor> given{cotangent, tangent};
  if (beta) given.push_back(*beta);
  auto result = run(Kind::kSecond, given, x, mean, rstd, weight, groups);
  return {*result.out, result.weight, result.bias};
}

}  // namespace
}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CPU, m) {
  m.impl("norm_vjp", TORCH_BOX(&wgan_fast::norm_vjp));
  m.impl("norm_jvp", TORCH_BOX(&wgan_fast::norm_jvp));
  m.impl("norm_parameters", TORCH_BOX(&wgan_fast::norm_parameters));
  m.impl("norm_second_order", TORCH_BOX(&wgan_fast::norm_second_order));
}
