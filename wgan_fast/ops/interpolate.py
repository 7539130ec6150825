"""``wgan_fast::interpolate`` and ``interpolate_into``: mix real and fake samples.

x̂ = αx + (1−α)x̃, with α in the accumulation dtype, one per group of samples. Batches whose samples are not dense in
memory are copied first.
"""

from typing import Any

import torch
from torch import Tensor

from ..reference import per_sample
from . import samples
from .registry import below_autograd, differentiated, kernels, library, operator, writes_only


def _clash(out: Tensor, given: Tensor) -> bool:
    """Whether writing ``out`` may change ``given`` other than element for element; neither has gaps in memory."""
    start, other = out.data_ptr(), given.data_ptr()
    if start == other and out.dtype == given.dtype and out.numel() == given.numel():
        return False
    return start < other + given.nbytes and other < start + out.nbytes


def _launch_into(out: Tensor, real: Tensor, fake: Tensor, alpha: Tensor) -> None:
    real = real if samples.is_dense(real) else real.contiguous()
    fake = samples.arranged(fake, real)
    target = samples.arranged(out, real, copy=False)
    if target is out and any(_clash(out, given) for given in (real, fake, alpha)):
        target = samples.empty(real, out.shape[0], out.dtype)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        kernels("interpolate").interpolate(real, fake, alpha, target)
    if target is out:
        torch.autograd.graph.increment_version(out)
    else:
        out.copy_(target)


@operator(
    "interpolate_into(Tensor(a!) out, Tensor real, Tensor fake, Tensor alpha) -> ()",
    fake=writes_only,
    launch=_launch_into,
)
def interpolate_into_plain(out: Tensor, real: Tensor, fake: Tensor, alpha: Tensor) -> None:
    """Write with ``torch.lerp``, which is exact at both ends."""
    with torch.no_grad():
        alpha = per_sample(alpha.repeat_interleave(real.shape[0] // alpha.shape[0]), real)
        x, y = real.to(alpha.dtype), fake.to(alpha.dtype)
        if out.dtype == alpha.dtype:
            torch.lerp(y, x, alpha, out=out)
        else:
            out.copy_(torch.lerp(y, x, alpha))


def _empty(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    return samples.empty(real, real.shape[0], fake.dtype)


@operator("interpolate(Tensor real, Tensor fake, Tensor alpha) -> Tensor", fake=_empty)
def _interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    out = _empty(real, fake, alpha)
    torch.ops.wgan_fast.interpolate_into(out, real, fake, alpha)
    return out


class _Interpolate(torch.autograd.Function):
    """Differentiable to any order: its backward is written in operators that differentiate again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        out: Tensor = torch.ops.wgan_fast.interpolate(*inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        real, fake, alpha = inputs
        # α's gradient alone needs the samples.
        ctx.save_for_backward(alpha, *((real, fake) if ctx.needs_input_grad[2] else ()))
        ctx.dtypes = real.dtype, fake.dtype

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        alpha, *pair = ctx.saved_tensors
        mixed = cotangents[0].to(alpha.dtype)
        weight = per_sample(alpha.repeat_interleave(mixed.shape[0] // alpha.shape[0]), mixed)
        of_alpha = None
        if pair:
            difference = pair[0].to(alpha.dtype) - pair[1].to(alpha.dtype)
            of_alpha = (mixed * difference).reshape(alpha.shape[0], -1).sum(1)
        real, fake = ctx.dtypes
        return (
            (weight * mixed).to(real) if ctx.needs_input_grad[0] else None,
            ((1 - weight) * mixed).to(fake) if ctx.needs_input_grad[1] else None,
            of_alpha,
        )


torch.library.register_autograd(
    "wgan_fast::interpolate", _Interpolate.backward, setup_context=_Interpolate.setup_context, lib=library
)


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """Return x̂ with α ``[N]``, differentiable also under torch.func, whose transforms no registered formula passes."""
    if differentiated(real, fake, alpha):
        mixed: Tensor = _Interpolate.apply(real, fake, alpha)  # type: ignore[no-untyped-call]
        return mixed
    with below_autograd():
        plain: Tensor = torch.ops.wgan_fast.interpolate.default(real, fake, alpha)
        return plain


def interpolate_into(out: Tensor, real: Tensor, fake: Tensor, alpha: Tensor) -> None:
    """Write x̂ with α ``[N]`` into ``out``, which autograd does not record."""
    with below_autograd():
        torch.ops.wgan_fast.interpolate_into.default(out, real, fake, alpha)
