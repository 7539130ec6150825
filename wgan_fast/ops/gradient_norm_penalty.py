"""``wgan_fast::gradient_norm_penalty``: the penalty at a given input gradient g, one norm per group of samples.

Returns the penalty, the mean norm, the norms and v = (w/G) ψ'(‖g‖) g/‖g‖ (0 where g = 0), which is the penalty's
gradient. In float32, ‖g‖ overflows past 1.8e19: it and the penalty are then infinite and v is NaN.
"""

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulation_dtype
from ..reference import per_sample
from . import samples
from .registry import below_autograd, differentiated, kernels, library, operator


def _factor(norm: Tensor, weight: float, target: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    """Return the norm in excess of the target, and s of v = s·g."""
    excess = norm - target
    if one_sided:
        excess = excess.clamp(min=0)
    k = 2 * weight / norm.shape[0]
    # Where the norm is 0 so is g, unless the target is 0; threshold keeps the division finite and lets NaN pass.
    slope = torch.full_like(norm, k) if target == 0 else excess / torch.threshold(norm, 0, torch.inf) * k
    return excess, slope


def _fake(
    gradient: Tensor, weight: float, target: float, one_sided: bool, group_size: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = gradient.new_empty(gradient.shape[0] // group_size, dtype=accumulation_dtype(gradient.dtype))
    seed = samples.empty(gradient, gradient.shape[0], gradient.dtype)
    return norm.new_empty(()), norm.new_empty(()), norm, seed


def _fake_backward(gradient: Tensor, *_: object) -> Tensor:
    return samples.empty(gradient, gradient.shape[0], gradient.dtype)


def _launch(
    gradient: Tensor, weight: float, target: float, one_sided: bool, group_size: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = gradient if samples.is_dense(gradient) else gradient.contiguous()
    outputs = _fake(gradient, weight, target, one_sided, group_size)
    with torch.cuda.device_of(gradient):  # type: ignore[no-untyped-call]
        kernels("gradient_norm_penalty").gradient_norm_penalty(
            gradient, *outputs, weight=weight, target=target, one_sided=one_sided
        )
    return outputs


def _launch_backward(
    gradient: Tensor, norm: Tensor, cotangent: Tensor, weight: float, target: float, one_sided: bool
) -> Tensor:
    gradient = gradient if samples.is_dense(gradient) else gradient.contiguous()
    out = torch.empty_like(gradient)
    cotangent = samples.arranged(cotangent, gradient)
    with torch.cuda.device_of(gradient):  # type: ignore[no-untyped-call]
        kernels("gradient_norm_penalty").gradient_norm_penalty_backward(
            gradient, norm, cotangent, out, weight=weight, target=target, one_sided=one_sided
        )
    return out


@operator(
    "gradient_norm_penalty(Tensor gradient, float weight, float target, bool one_sided, int group_size=1) "
    "-> (Tensor penalty, Tensor mean_norm, Tensor norm, Tensor seed)",
    fake=_fake,
    launch=_launch,
)
def gradient_norm_penalty_plain(
    gradient: Tensor, weight: float, target: float, one_sided: bool, group_size: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute it with PyTorch's own operators."""
    compute = accumulation_dtype(gradient.dtype)
    flat = gradient.reshape(gradient.shape[0] // group_size, -1)
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=compute)
    excess, slope = _factor(norm, weight, target, one_sided)
    seed = samples.empty(gradient, gradient.shape[0], gradient.dtype)
    torch.mul(gradient, per_sample(slope.repeat_interleave(group_size), gradient), out=seed)
    return excess.square().mean() * weight, norm.mean(), norm, seed


@operator(
    "gradient_norm_penalty_backward(Tensor gradient, Tensor norm, Tensor cotangent, float weight, float target, "
    "bool one_sided) -> Tensor",
    fake=_fake_backward,
    launch=_launch_backward,
)
def gradient_norm_penalty_backward_plain(
    gradient: Tensor, norm: Tensor, cotangent: Tensor, weight: float, target: float, one_sided: bool
) -> Tensor:
    """Compute ∂⟨v, c⟩/∂g for a cotangent c."""
    G = norm.shape[0]
    g, c = (t.to(norm.dtype).reshape(G, -1) for t in (gradient, cotangent))
    _, slope = _factor(norm, weight, target, one_sided)
    curved = norm != 0
    if one_sided:
        curved &= norm.ge(target) | norm.isnan()
    r = torch.where(curved, norm, 1)
    curvature = torch.where(curved, 2 * weight / G * target * ((g * c).sum(1) / r / r / r), 0)
    out = samples.empty(gradient, gradient.shape[0], gradient.dtype)
    return out.copy_((slope[:, None] * c + curvature[:, None] * g).view(gradient.shape))


class _GradientNormPenalty(torch.autograd.Function):
    """Twice differentiable in the gradient, by way of the penalty and of v; the norms are constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.wgan_fast.gradient_norm_penalty(*inputs)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gradient, *ctx.settings, _ = inputs
        _, mean_norm, norm, seed = output
        ctx.mark_non_differentiable(mean_norm, norm)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, norm, seed)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        of_penalty, _, _, of_seed = cotangents
        gradient, norm, seed = ctx.saved_tensors
        total = None
        if of_penalty is not None:
            # v is an output of this function: differentiated again, the product sends v's cotangent here.
            total = of_penalty.to(seed.dtype) * seed
        if of_seed is not None:
            second = _GradientNormPenaltyBackward.apply(gradient, norm, of_seed, *ctx.settings)  # type: ignore[no-untyped-call]
            total = second if total is None else total + second
        return total, *[None] * 4


class _GradientNormPenaltyBackward(torch.autograd.Function):
    """The end of the chain."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        out: Tensor = torch.ops.wgan_fast.gradient_norm_penalty_backward(*inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to save."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise RuntimeError("the penalty of a gradient is twice differentiable, not three times")


torch.library.register_autograd(
    "wgan_fast::gradient_norm_penalty",
    _GradientNormPenalty.backward,
    setup_context=_GradientNormPenalty.setup_context,
    lib=library,
)
torch.library.register_autograd(
    "wgan_fast::gradient_norm_penalty_backward", _GradientNormPenaltyBackward.backward, lib=library
)


def gradient_norm_penalty(gradient: Tensor, weight: float, target: float, one_sided: bool) -> Tensor:
    """Return the penalty, twice differentiable also under torch.func."""
    if differentiated(gradient):
        outputs = _GradientNormPenalty.apply(gradient, weight, target, one_sided, 1)  # type: ignore[no-untyped-call]
    else:
        with below_autograd():
            outputs = torch.ops.wgan_fast.gradient_norm_penalty.default(gradient, weight, target, one_sided)
    penalty: Tensor = outputs[0]
    return penalty
