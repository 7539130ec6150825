"""The plain-PyTorch truth of every operation and of the whole critic step.

Everything here is written for reading: autograd differentiates it, nothing is fused, nothing is cached. Tests
compare against these functions in float64 and benchmarks use them as the well-written naive baseline. They
assume valid input; the public functions check theirs.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .precision import accumulation_dtype

DRAGAN_NOISE = 0.5
"""Width of the DRAGAN perturbation in standard deviations of the batch (Kodali et al. 2017, reference code)."""


def per_sample(values: Tensor, samples: Tensor) -> Tensor:
    """Reshape ``values`` ``[N]`` to ``[N, 1, ...]`` so that they broadcast against ``samples`` ``[N, *D]``."""
    return values.reshape(-1, *[1] * (samples.dim() - 1))


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """x̂ = αx + (1−α)x̃ with ``alpha`` ``[N]``, computed in the accumulation dtype, returned in that of ``real``."""
    compute = accumulation_dtype(real.dtype)
    alpha = per_sample(alpha.to(compute), real)
    return (alpha * real.to(compute) + (1 - alpha) * fake.to(compute)).to(real.dtype)


def perturb(real: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
    """DRAGAN's points x + α·0.5·σ(x)·u with u = ``noise`` ~ U[0, 1] like ``real`` and one σ over the batch."""
    compute = accumulation_dtype(real.dtype)
    x = real.to(compute)
    step = DRAGAN_NOISE * x.std(correction=0) * noise.to(compute)
    alpha = alpha.to(compute)
    return (x + (per_sample(alpha, real) if alpha.shape == real.shape[:1] else alpha) * step).to(real.dtype)


def gradient_norm(gradient: Tensor, group_size: int = 1) -> Tensor:
    """‖g_i‖₂ per sample (or group of consecutive samples), ``[N // group_size]``, with derivative 0 at g_i = 0."""
    flat = gradient.to(accumulation_dtype(gradient.dtype)).reshape(gradient.shape[0] // group_size, -1)
    squared = flat.square().sum(dim=1)
    # The square root has no derivative at 0: take it of 1 there and put the 0 back. NaN compares unequal to 0,
    # so it passes through.
    zero = squared == 0
    return torch.where(zero, 1, squared).sqrt().masked_fill(zero, 0)


def penalty_from_norm(norm: Tensor, *, weight: float, target: float, one_sided: bool) -> Tensor:
    """(w/N) Σ ψ(r_i) with ψ(r) = (r − target)², or max(0, r − target)² when ``one_sided``."""
    excess = norm - target
    if one_sided:
        excess = excess.clamp(min=0)
    return weight * excess.square().mean()


def input_gradient(scores: Tensor, x: Tensor, *, create_graph: bool = True) -> Tensor:
    """∇ₓ Σᵢ D(x)ᵢ at ``x`` ``[N, *D]``, differentiable again when ``create_graph``."""
    (gradient,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=create_graph)
    return gradient


def gradient_penalty(
    critic: Callable[..., Tensor],
    points: Iterable[Tensor],
    *,
    weight: float = 10.0,
    target: float = 1.0,
    one_sided: bool = False,
    group_size: int = 1,
    critic_args: tuple[Any, ...] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Penalty summed over sets of points, and the mean gradient norm, by plain double backward.

    Args:
        critic: Maps ``[N, *D]`` to one score per group of ``group_size`` samples.
        points: Where the gradient is penalised: [x̂], [real], [fake] or [real, fake], each ``[N, *D]``.
        weight: w, the penalty's factor.
        target: The norm that costs nothing.
        one_sided: Whether only norms above the target cost.
        group_size: Samples that share one norm.
        critic_args: Further positional arguments of the critic.
        critic_kwargs: Keyword arguments of the critic.

    Returns:
        The penalty and the mean gradient norm, both 0-dim and differentiable in the critic's parameters.
    """
    penalties, norms = [], []
    for x in points:
        x = x.detach().requires_grad_()
        scores = critic(x, *critic_args, **(critic_kwargs or {}))
        norm = gradient_norm(input_gradient(scores, x), group_size)
        penalties.append(penalty_from_norm(norm, weight=weight, target=target, one_sided=one_sided))
        norms.append(norm.mean())
    return torch.stack(penalties).sum(), torch.stack(norms).mean()


class StepTruth(NamedTuple):
    """Value, parts and parameter gradients of one critic step."""

    loss: Tensor
    penalty: Tensor
    gradient_norm: Tensor
    real_scores: Tensor
    fake_scores: Tensor
    gradients: tuple[Tensor | None, ...]


def critic_step(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    points: Iterable[Tensor],
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    critic_args: tuple[Any, ...] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    **penalty: Any,
) -> StepTruth:
    """Compute the whole critic objective and its gradient for every trainable parameter: one backward over it all."""
    real_scores = critic(real, *critic_args, **(critic_kwargs or {}))
    fake_scores = critic(fake.detach(), *critic_args, **(critic_kwargs or {}))
    value, norm = gradient_penalty(critic, points, critic_args=critic_args, critic_kwargs=critic_kwargs, **penalty)
    total = loss(real_scores, fake_scores) + value
    parameters = [p for p in critic.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return StepTruth(
        total.detach(), value.detach(), norm.detach(), real_scores.detach(), fake_scores.detach(), gradients
    )
