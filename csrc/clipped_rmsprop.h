// One step of RMSprop and the clip after it, on one element: the same arithmetic on a CPU and on a GPU.
#pragma once

#include <cmath>
#include <optional>
#include <type_traits>

#include "common.h"

namespace wgan_fast {

// Where an operand is in a span; those before kGrad are written.
enum RmspropOperand { kParam, kSquareAvg, kGradAvg, kMomentumBuffer, kGrad, kRmspropOperands };
using RmspropSpan = Span<kRmspropOperands>;

// The operands in their order; RMSprop that is not centered has no gradient averages, and so on.
inline std::array<const std::vector<Tensor>*, kRmspropOperands> rmsprop_operands(
    const std::vector<Tensor>& params, const std::vector<Tensor>& square_avgs,
    const std::vector<Tensor>& grad_avgs, const std::vector<Tensor>& momentum_buffers,
    const std::vector<Tensor>& grads) {
  return {&params, &square_avgs, grad_avgs.empty() ? nullptr : &grad_avgs,
          momentum_buffers.empty() ? nullptr : &momentum_buffers, &grads};
}

struct RmspropOptions {
  double lr, alpha, eps, weight_decay, momentum;
  bool maximize;
  double low, high;
};

// 16-bit floats are computed with in float32, so that a step rounds each of them once.
template <typename Stored>
using Compute = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

// Options rounded and operations ordered as in torch.optim.RMSprop. Bits still differ: PyTorch's CPU kernels
// fuse a product and a sum where the processor can, and their square root is not the correctly rounded one.
template <typename T>
struct ClippedRmsprop {
  T minus_lr, alpha, one_minus_alpha, eps, weight_decay, momentum;
  bool maximize, decay, lerp_from_end;
  Clip<T> clip;

  template <typename Stored>
  static ClippedRmsprop for_storage(const RmspropOptions& options) {
    const T one_minus_alpha = static_cast<T>(1 - options.alpha);
    // A bound that the storage can hold: to clip and then to round is to round and then to clip.
    const auto bound = [](double value) {
      return static_cast<T>(static_cast<Stored>(static_cast<T>(value)));
    };
    return {static_cast<T>(-options.lr),
            static_cast<T>(options.alpha),
            one_minus_alpha,
            static_cast<T>(options.eps),
            static_cast<T>(options.weight_decay),
            static_cast<T>(options.momentum),
            options.maximize,
            options.weight_decay != 0,
            std::abs(one_minus_alpha) >= T(0.5),
            {bound(options.low), bound(options.high)}};
  }

  // Returns the parameter after the step; updates the state.
  template <bool kCentered, bool kMomentum>
  C10_HOST_DEVICE T operator()(T param, T grad, T& square_avg, T& grad_avg, T& momentum_buffer) const {
    grad = maximize ? -grad : grad;
    grad = decay ? grad + weight_decay * param : grad;
    square_avg = square_avg * alpha + one_minus_alpha * grad * grad;
    T variance = square_avg;
    if constexpr (kCentered) {
      const T difference = grad - grad_avg;
      grad_avg =
          lerp_from_end ? grad - difference * (1 - one_minus_alpha) : grad_avg + one_minus_alpha * difference;
      variance = square_avg - grad_avg * grad_avg;
    }
    const T scale = std::sqrt(variance) + eps;
    if constexpr (kMomentum) {
      momentum_buffer = momentum_buffer * momentum + grad / scale;
      return clip(param + minus_lr * momentum_buffer);
    } else {
      return clip(param + minus_lr * grad / scale);
    }
  }
};

}  // namespace wgan_fast
