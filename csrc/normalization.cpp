// What the four passes need of a normalisation over groups of channels, on a CPU.
//
// With n = (x - mean) rstd, means over the m elements of a group, and J u = rstd (u - <u> - n <u n>), every
// operator here is a few sums per channel, a few scalars made of them, and one linear combination of its
// operands with coefficients per channel. A sample stays in the cache from the sums to the combination, so
// that each tensor crosses memory once.

#include "common.h"

#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>

#define WGAN_FAST_INLINE inline __attribute__((always_inline))
#define WGAN_FAST_INLINE_LAMBDA __attribute__((always_inline))

namespace wgan_fast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The sum over samples is made of at most so many parts, of at least so many elements each, whatever the
// number of threads, so that it does not depend on it.
constexpr int64_t kParts = 64, kGrain = kGrainSize / 2;

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

// So many floats are added one by one before their sum joins one of doubles: an error grows with the number
// of terms.
constexpr int64_t kRun = 64;

// The sums over a line of the K values that `terms` gives for an index.
template <int K, typename A, typename Terms>
WGAN_FAST_INLINE std::array<double, K> sums_over(int64_t size, const Terms& terms) {
  constexpr int64_t L = kLanes<A>;
  std::array<double, K> whole{};
  for (int64_t begin = 0; begin < size; begin += kRun * L) {
    const int64_t end = std::min(size, begin + kRun * L);
    A lanes[K][L] = {};
    int64_t i = begin;
    for (; i + L <= end; i += L) {
      // Unrolled, the lanes are no loop any more and some sums are not vectorised.
#pragma GCC unroll 1
      for (int64_t l = 0; l < L; ++l) {
        const std::array<A, K> term = terms(i + l);
        for (int k = 0; k < K; ++k) lanes[k][l] += term[k];
      }
    }
    for (int64_t l = 0; i < end; ++i, ++l) {
      const std::array<A, K> term = terms(i);
      for (int k = 0; k < K; ++k) lanes[k][l] += term[k];
    }
    for (int k = 0; k < K; ++k) whole[k] += total(lanes[k]);
  }
  return whole;
}

// The same for many channels at once: `row` adds one row of terms to `recent`, of which there are `size`.
template <typename A, typename Row>
WGAN_FAST_INLINE void sum_rows(int64_t rows, int64_t size, A* __restrict recent, double* __restrict sums,
                               const Row& row) {
  std::fill(sums, sums + size, 0.0);
  for (int64_t begin = 0; begin < rows; begin += kRun) {
    std::fill(recent, recent + size, A(0));
    for (int64_t s = begin; s < std::min(rows, begin + kRun); ++s) row(s);
    for (int64_t i = 0; i < size; ++i) sums[i] += recent[i];
  }
}

// sum(v) and sum(v (x - mean)) over a line of one channel.
template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE std::array<double, 2> moments(const T* v, const T* x, A mean, int64_t size) {
  return sums_over<2, A>(size, [=](int64_t i) WGAN_FAST_INLINE_LAMBDA {
    const A value = static_cast<A>(v[i]);
    return std::array<A, 2>{value, value * (static_cast<A>(x[i]) - mean)};
  });
}

// sum(x - mean) and sum((x - mean)^2) over a line.
template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE std::array<double, 2> deviations(const T* x, A mean, int64_t size) {
  return sums_over<2, A>(size, [=](int64_t i) WGAN_FAST_INLINE_LAMBDA {
    const A value = static_cast<A>(x[i]) - mean;
    return std::array<A, 2>{value, value * value};
  });
}

template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE double dot(const T* u, const T* v, int64_t size) {
  return sums_over<1, A>(size, [=](int64_t i) WGAN_FAST_INLINE_LAMBDA {
    return std::array<A, 1>{static_cast<A>(u[i]) * static_cast<A>(v[i])};
  })[0];
}

// Per channel: sum(x - mean), then sum((x - mean)^2).
template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void spread(const Shape& shape, const T* x, const A* mean, A* recent, double* sums) {
  const int64_t C = shape.C, S = shape.S;
  if (!shape.last) {
    for (int64_t c = 0; c < C; ++c) {
      const auto found = deviations(x + c * S, mean[c], S);
      sums[c] = found[0], sums[C + c] = found[1];
    }
    return;
  }
  A* __restrict first = recent, * __restrict second = recent + C;
  sum_rows(S, 2 * C, recent, sums, [=](int64_t s) WGAN_FAST_INLINE_LAMBDA {
    for (int64_t c = 0; c < C; ++c) {
      const A value = static_cast<A>(x[s * C + c]) - mean[c];
      first[c] += value;
      second[c] += value * value;
    }
  });
}

// Per channel: sum(v) and sum(v (x - mean)) for every operand, then sum(v0 v1) where there are two.
template <int V, typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void measure(const Shape& shape, const std::array<const T*, 3>& v, const T* x, const A* mean,
                              A* recent, double* sums) {
  const int64_t C = shape.C, S = shape.S;
  if (!shape.last) {
    for (int64_t c = 0; c < C; ++c) {
      for (int k = 0; k < V; ++k) {
        const auto found = moments(v[k] + c * S, x + c * S, mean[c], S);
        sums[2 * k * C + c] = found[0], sums[(2 * k + 1) * C + c] = found[1];
      }
      if (V > 1) sums[2 * V * C + c] = dot(v[0] + c * S, v[1] + c * S, S);
    }
    return;
  }
  sum_rows(S, (2 * V + (V > 1)) * C, recent, sums, [&](int64_t s) WGAN_FAST_INLINE_LAMBDA {
    const T* row = x + s * C;
    for (int k = 0; k < V; ++k) {
      const T* u = v[k] + s * C;
      A* __restrict first = recent + 2 * k * C, * __restrict second = first + C;
      for (int64_t c = 0; c < C; ++c) {
        const A value = static_cast<A>(u[c]);
        first[c] += value;
        second[c] += value * (static_cast<A>(row[c]) - mean[c]);
      }
    }
    if (V > 1) {
      const T *u = v[0] + s * C, *w = v[1] + s * C;
      A* __restrict both = recent + 2 * V * C;
      for (int64_t c = 0; c < C; ++c) both[c] += static_cast<A>(u[c]) * static_cast<A>(w[c]);
    }
  });
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

// Means over a group: of the weighted cotangent u, the tangent t and the weighted cotangent b of the output,
// of the products of each with n, and of u t.
struct Means {
  double u = 0, un = 0, t = 0, tn = 0, b = 0, bn = 0, ut = 0;
};

// out = sum over k of given[k] v_k, plus slope (x - mean) + shift. The weight of a channel multiplies the
// cotangents, and all of a JVP.
struct Combination {
  std::array<double, 3> given{};
  double slope = 0, shift = 0;
};

WGAN_FAST_INLINE Combination combination(Kind kind, double r, const Means& means) {
  const auto& [u, un, t, tn, b, bn, ut] = means;
  if (kind == Kind::kVjp) return {{r}, -r * r * un, -r * u};
  if (kind == Kind::kJvp) return {{r}, -r * r * tn, -r * t};
  const double spread = ut - u * t - un * tn;
  return {{-r * r * tn, -r * r * un, r},
          -r * r * (r * (spread - 2 * un * tn) + bn),
          r * (r * (un * t + tn * u) - b)};
}

// One group of one sample: from its channels' sums to their factors, and to its share of the parameters'
// gradients.
template <int V, typename A>
WGAN_FAST_INLINE void solve(const Task& task, int64_t begin, int64_t end, double r, const double* sums,
                            const A* weight, A* factors, double* share) {
  const int64_t C = task.shape.C;
  const double m = static_cast<double>((end - begin) * task.shape.S);
  // <w v> and <w v n> of operand k, weighted or not.
  const auto means_of = [&](int k, bool weighted, double& plain, double& normal) WGAN_FAST_INLINE_LAMBDA {
    for (int64_t c = begin; c < end; ++c) {
      const double w = weighted ? weight[c] : 1.0;
      plain += w * sums[2 * k * C + c];
      normal += w * sums[(2 * k + 1) * C + c];
    }
    plain /= m, normal *= r / m;
  };
  const auto gradient = [&](int k) WGAN_FAST_INLINE_LAMBDA {
    for (int64_t c = begin; c < end; ++c) {
      share[c] += r * sums[(2 * k + 1) * C + c];
      share[C + c] += sums[2 * k * C + c];
    }
  };
  if (task.kind == Kind::kParameters) return gradient(0);
  Means means;
  if (task.kind == Kind::kJvp)
    means_of(0, false, means.t, means.tn);
  else
    means_of(0, true, means.u, means.un);
  if (V > 1) {
    const double* both = sums + 2 * V * C;
    means_of(1, false, means.t, means.tn);
    for (int64_t c = begin; c < end; ++c) {
      means.ut += weight[c] * both[c] / m;
      share[c] += r * (both[c] - means.t * sums[c] - r * means.tn * sums[C + c]);
    }
  }
  if (V > 2) {
    means_of(2, true, means.b, means.bn);
    gradient(2);
  }
  const Combination made = combination(task.kind, r, means);
  for (int64_t c = begin; c < end; ++c) {
    const double w = weight[c], all = task.kind == Kind::kJvp ? w : 1.0;
    for (int k = 0; k < V; ++k) factors[k * C + c] = static_cast<A>(made.given[k] * (k == 1 ? 1.0 : w));
    factors[V * C + c] = static_cast<A>(made.slope * all);
    factors[(V + 1) * C + c] = static_cast<A>(made.shift * all);
  }
}

// The statistics of a group from the sums of (x - mean) and (x - mean)^2 over its m elements. Returns how far
// the true mean lies from `mean`.
WGAN_FAST_INLINE double state(const Task& task, int64_t group, double mean, double m, double first,
                              double second) {
  const double rest = first / m, variance = second / m - rest * rest;
  task.mean[group] = mean + rest;
  task.rstd[group] = 1 / std::sqrt(std::max(variance, 0.0) + task.eps);
  return rest;
}

// The forward of one sample: statistics from the deviations about a first mean, so that a large mean costs
// nothing.
template <typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void normalize(const Task& task, int64_t n, const T* x, const A* weight, const A* bias,
                                A* mean, A* recent, double* sums, A* factors) {
  const Shape& shape = task.shape;
  const int64_t C = shape.C, channels = C / shape.groups;
  const double m = static_cast<double>(channels * shape.S);
  const auto sum = [&](int64_t g, const double* values) {
    return std::accumulate(values + g * channels, values + (g + 1) * channels, 0.0);
  };
  std::fill(mean, mean + C, A(0));
  spread(shape, x, mean, recent, sums);
  for (int64_t g = 0; g < shape.groups; ++g)
    std::fill(mean + g * channels, mean + (g + 1) * channels, static_cast<A>(sum(g, sums) / m));
  spread(shape, x, mean, recent, sums);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t group = n * shape.groups + g;
    const double rest = state(task, group, mean[g * channels], m, sum(g, sums), sum(g, sums + C));
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      const double scale = task.rstd[group] * weight[c];
      factors[c] = static_cast<A>(scale);
      factors[C + c] = static_cast<A>(bias[c] - scale * rest);
    }
  }
}

// A group of one element per channel is a line along which the weight varies: everything about it in three
// passes. Adds its shares of the parameters' gradients to `scale` and `shift`.
template <int V, typename T, typename A = Sum<T>>
WGAN_FAST_INLINE void line(const Task& task, int64_t group, int64_t size,
                           const std::array<const T*, 3>& operands, const T* __restrict x,
                           const A* __restrict weight, const A* __restrict bias, A* __restrict scale,
                           A* __restrict shift, T* __restrict out) {
  const double m = static_cast<double>(size);
  const T* __restrict v0 = operands[0], * __restrict v1 = operands[1], * __restrict v2 = operands[2];
  if constexpr (V == 0) {
    const auto first = sums_over<1, A>(
        size, [=](int64_t c) WGAN_FAST_INLINE_LAMBDA { return std::array<A, 1>{static_cast<A>(x[c])}; });
    const A mean = static_cast<A>(first[0] / m);
    const auto [once, twice] = deviations(x, mean, size);
    const A rest = static_cast<A>(state(task, group, mean, m, once, twice));
    const A r = static_cast<A>(task.rstd[group]);
    for (int64_t c = 0; c < size; ++c)
      out[c] = static_cast<T>((static_cast<A>(x[c]) - mean - rest) * r * weight[c] + bias[c]);
    return;
  } else {
    const A mean = static_cast<A>(task.mean[group]);
    const double rstd = task.rstd[group];
    const A r = static_cast<A>(rstd);
    const auto gradient = [=](const T* __restrict v) WGAN_FAST_INLINE_LAMBDA {
      for (int64_t c = 0; c < size; ++c) {
        const A value = static_cast<A>(v[c]);
        scale[c] += r * (value * (static_cast<A>(x[c]) - mean));
        shift[c] += value;
      }
    };
    const auto means_of = [=](const T* __restrict v, bool weighted, double& plain,
                              double& normal) WGAN_FAST_INLINE_LAMBDA {
      const auto found =
          weighted ? sums_over<2, A>(size,
                                     [=](int64_t c) WGAN_FAST_INLINE_LAMBDA {
                                       const A value = weight[c] * static_cast<A>(v[c]);
                                       return std::array<A, 2>{value, value * (static_cast<A>(x[c]) - mean)};
                                     })
                   : moments(v, x, mean, size);
      plain = found[0] / m, normal = found[1] * rstd / m;
    };
    if (task.kind == Kind::kParameters) return gradient(v0);
    Means means;
    if (V == 1 && task.kind == Kind::kJvp) {
      means_of(v0, false, means.t, means.tn);
      const Combination made = combination(Kind::kJvp, rstd, means);
      const A slope = static_cast<A>(made.slope), offset = static_cast<A>(made.shift);
      for (int64_t c = 0; c < size; ++c)
        out[c] = static_cast<T>(weight[c] *
                                (r * static_cast<A>(v0[c]) + slope * (static_cast<A>(x[c]) - mean) + offset));
      return;
    }
    means_of(v0, true, means.u, means.un);
    if constexpr (V > 1) {
      means_of(v1, false, means.t, means.tn);
      means.ut = sums_over<1, A>(
                     size,
                     [=](int64_t c) WGAN_FAST_INLINE_LAMBDA {
                       return std::array<A, 1>{weight[c] * static_cast<A>(v0[c]) * static_cast<A>(v1[c])};
                     })[0] /
                 m;
      const A t = static_cast<A>(means.t), rtn = static_cast<A>(rstd * means.tn);
      for (int64_t c = 0; c < size; ++c)
        scale[c] +=
            r * (static_cast<A>(v0[c]) * (static_cast<A>(v1[c]) - t - rtn * (static_cast<A>(x[c]) - mean)));
    }
    if constexpr (V > 2) {
      means_of(v2, true, means.b, means.bn);
      gradient(v2);
    }
    const Combination made = combination(V == 1 ? Kind::kVjp : Kind::kSecond, rstd, means);
    const A slope = static_cast<A>(made.slope), offset = static_cast<A>(made.shift);
    const A g0 = static_cast<A>(made.given[0]), g1 = static_cast<A>(made.given[1]);
    for (int64_t c = 0; c < size; ++c) {
      A weighted = g0 * static_cast<A>(v0[c]);
      if (V > 2) weighted += r * static_cast<A>(v2[c]);
      A sum = weight[c] * weighted + slope * (static_cast<A>(x[c]) - mean) + offset;
      if (V > 1) sum += g1 * static_cast<A>(v1[c]);
      out[c] = static_cast<T>(sum);
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
  std::vector<double> sums((2 * V + 2) * C);
  std::vector<A> scratch((3 + (2 * V + 2) + (V + 2)) * C);
  A *mean = scratch.data(), *weight = mean + C, *bias = weight + C, *recent = bias + C,
    *factors = recent + (2 * V + 2) * C;
  for (int64_t c = 0; c < C; ++c) {
    weight[c] = task.weight ? static_cast<A>(task.weight[c]) : A(1);
    bias[c] = task.bias ? static_cast<A>(task.bias[c]) : A(0);
  }
  int64_t turned = 0;
  for (int k = 0; k < V; ++k) turned += task.given[k].turned;
  std::vector<T> copies(turned * size);
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(task.x) + n * size;
    T* out = task.out ? static_cast<T*>(task.out) + n * size : nullptr;
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
    if (shape.S == 1) {
      for (int64_t at = 0; at < C; at += channels) {
        std::array<const T*, 3> given{};
        for (int k = 0; k < V; ++k) given[k] = v[k] + at;
        line<V>(task, (n * C + at) / channels, channels, given, x + at, weight + at, bias + at, recent + at,
                recent + C + at, out ? out + at : nullptr);
      }
      if (share && ((n - begin) % kRun == kRun - 1 || n == end - 1)) {
        for (int64_t i = 0; i < 2 * C; ++i) share[i] += recent[i];
        std::fill(recent, recent + 2 * C, A(0));
      }
      continue;
    }
    if constexpr (V == 0) {
      normalize(task, n, x, weight, bias, mean, recent, sums.data(), factors);
    } else {
      const int64_t group = n * shape.groups;
      for (int64_t g = 0; g < shape.groups; ++g)
        std::fill(mean + g * channels, mean + (g + 1) * channels, static_cast<A>(task.mean[group + g]));
      measure<V>(shape, v, x, mean, recent, sums.data());
      for (int64_t g = 0; g < shape.groups; ++g)
        solve<V>(task, g * channels, (g + 1) * channels, task.rstd[group + g], sums.data(), weight, factors,
                 share);
    }
    if (out) combine<V>(shape, v, x, mean, factors, out);
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

Tensor written(const Tensor& like, const double* values, const std::vector<int64_t>& sizes) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  Tensor tensor = torch::stable::new_empty(like, sizes, wide ? ScalarType::Double : ScalarType::Float);
  if (wide)
    std::copy(values, values + tensor.numel(), static_cast<double*>(tensor.mutable_data_ptr()));
  else
    std::transform(values, values + tensor.numel(), static_cast<float*>(tensor.mutable_data_ptr()),
                   [](double value) { return static_cast<float>(value); });
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
    shape.last = last_;
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
    const int64_t grains = (shape.N * shape.sample() + kGrain - 1) / kGrain;
    const int64_t count = std::min({kParts, shape.N, grains});
    if (task_.kind == Kind::kParameters || task_.kind == Kind::kSecond) parts_.resize(count * 2 * shape.C);
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
    std::vector<double> sums(C);
    for (size_t part = which * C; part < parts_.size(); part += 2 * C)
      for (int64_t c = 0; c < C; ++c) sums[c] += parts_[part + c];
    return written(x_, sums.data(), {C});
  }

  std::pair<Tensor, Tensor> made_statistics() const {
    const std::vector<int64_t> sizes{task_.shape.N, task_.shape.groups};
    return {written(x_, mean_.data(), sizes), written(x_, rstd_.data(), sizes)};
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
