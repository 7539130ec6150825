// How a gradient's norm is penalised.
#pragma once

#include <cstdint>
#include <utility>

namespace wgan_fast {

// (w/G) Σ ψ(r) with ψ(r) = (r − target)², or max(0, r − target)² when one-sided.
struct Penalty {
  double weight, target;
  bool one_sided;
  int64_t groups;

  double excess(double norm) const {
    const double excess = norm - target;
    return one_sided && excess < 0 ? 0 : excess;
  }
  // The s of v = s·g.
  double slope(double norm) const {
    const double factor = 2 * weight / groups;
    if (target == 0) return factor;
    return norm == 0 ? 0 : factor * (excess(norm) / norm);
  }
  // The q of v's derivative s·c + q·g in the direction c. In this order r³ is never formed.
  double curvature(double norm, double product) const {
    if (norm == 0 || (one_sided && norm < target)) return 0;
    return 2 * weight / groups * target * (product / norm / norm / norm);
  }
  // The penalty and the mean norm.
  template <typename C>
  std::pair<double, double> of(const C* norms) const {
    double squares = 0, sum = 0;
    for (int64_t row = 0; row < groups; ++row) {
      squares += excess(norms[row]) * excess(norms[row]);
      sum += norms[row];
    }
    return {weight * (squares / groups), sum / groups};
  }
};

}  // namespace wgan_fast
