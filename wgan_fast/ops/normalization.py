"""``wgan_fast::norm_*``: a normalisation over groups of channels, and what the four passes ask of it.

y = γ n(x) + β with n(x) = (x − μ) r, r = 1/√(σ² + ε), over the elements that share statistics. The Jacobian J of n is
symmetric, J u = r (u − ⟨u⟩ − n ⟨u n⟩) with means over those elements, so one function serves VJP and JVP. For
⟨u, J t⟩ with u = γδ the curvature is

    ∂⟨u, J t⟩/∂x = −r² n ⟨u (t − ⟨t⟩ − n ⟨t n⟩)⟩ − r (⟨u n⟩ J t + ⟨t n⟩ J u).

Samples have their statistics to themselves and their channels in groups: x is ``[N, C, *]``, μ and r are
``[N, groups]``, γ and β are ``[C]``. A layer norm over M elements is the case ``[N, M]`` with one group.
"""

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulation_dtype
from .registry import kernels, operator

aten = torch.ops.aten

_STATISTICS = "Tensor x, Tensor mean, Tensor rstd"


def jacobian(u: Tensor, n: Tensor, r: Tensor, dims: list[int]) -> Tensor:
    """Return J u.

    Args:
        u: Like ``n``.
        n: The normalised input.
        r: Broadcasts against ``n``.
        dims: The dimensions over which statistics are shared.
    """
    return r * (u - u.mean(dims, keepdim=True) - n * (u * n).mean(dims, keepdim=True))


def curvature(t: Tensor, u: Tensor, n: Tensor, r: Tensor, dims: list[int]) -> Tensor:
    """Return ∂⟨u, J t⟩/∂x; arguments as those of ``jacobian``."""
    jt, ju = jacobian(t, n, r, dims), jacobian(u, n, r, dims)
    un, tn = (u * n).mean(dims, keepdim=True), (t * n).mean(dims, keepdim=True)
    return -r * (n * (u * jt).mean(dims, keepdim=True) + un * jt + tn * ju)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _shares(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], groups, dtype=accumulation_dtype(x.dtype))
    return _like(x), statistics, torch.empty_like(statistics)


def _fake_linear(vector: Tensor, x: Tensor, *_: object) -> Tensor:
    return _like(x)


def _fake_parameters(cotangent: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _shares(x)


def _fake_second_order(
    tangent: Tensor, cotangent: Tensor, beta: Tensor | None, x: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), *_shares(x)


def _launch_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    made = _fake_forward(x, weight, bias, groups, eps)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        x, last = x.contiguous(memory_format=memory_format(x)), is_channels_last(x)
        kernels("normalization").forward(x, weight, bias, groups, eps, *made, last=last)
    return made


def _launch(
    x: Tensor, *statistics: Any, out: bool = True, shares: bool = False, **given: Tensor | None
) -> tuple[Any, Any]:
    form = memory_format(x)
    vectors = {name: v.contiguous(memory_format=form) for name, v in given.items() if v is not None}
    made = _like(x) if out else None
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        x, last = x.contiguous(memory_format=form), is_channels_last(x)
        second_order = kernels("normalization").second_order
        return made, second_order(x, *statistics, last=last, **vectors, out=made, shares=shares)


def _launch_vjp(cotangent: Tensor, *arguments: Any) -> Any:
    return _launch(*arguments, beta=cotangent)[0]


def _launch_jvp(tangent: Tensor, *arguments: Any) -> Any:
    return _launch(*arguments, tangent=tangent)[0]


def _launch_parameters(cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Any:
    return _launch(x, mean, rstd, None, groups, beta=cotangent, out=False, shares=True)[1]


def _launch_second_order(tangent: Tensor, cotangent: Tensor, beta: Tensor | None, *arguments: Any) -> Any:
    made, shares = _launch(*arguments, tangent=tangent, cotangent=cotangent, beta=beta, shares=True)
    return made, *shares


@operator(
    "norm_forward(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    launch=_launch_forward,
)
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y ``[N, C, *]``, and μ and r ``[N, groups]`` in the dtype of sums, all from PyTorch's own kernels."""
    N, C = x.shape[:2]
    if x.dim() == 2 and groups == 1:
        out, mean, rstd = aten.native_layer_norm(x, [C], weight, bias, eps)
    else:
        out, mean, rstd = aten.native_group_norm(x, weight, bias, N, C, x.shape[2:].numel(), groups, eps)
    mean, rstd = (s.reshape(N, groups).to(accumulation_dtype(x.dtype)) for s in (mean, rstd))
    return out.contiguous(memory_format=memory_format(x)), mean, rstd


@operator(
    f"norm_vjp(Tensor cotangent, {_STATISTICS}, Tensor? weight, int groups) -> Tensor",
    fake=_fake_linear,
    launch=_launch_vjp,
)
def vjp(cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int) -> Tensor:
    """Return J γδ ``[N, C, *]``."""
    view = _Groups(x, mean, rstd, weight, groups)
    return view.whole(jacobian(view.split(cotangent) * view.weight, view.n, view.r, view.dims))


@operator(
    f"norm_jvp(Tensor tangent, {_STATISTICS}, Tensor? weight, int groups) -> Tensor",
    fake=_fake_linear,
    launch=_launch_jvp,
)
def jvp(tangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int) -> Tensor:
    """Return γ J t ``[N, C, *]``."""
    view = _Groups(x, mean, rstd, weight, groups)
    return view.whole(view.weight * jacobian(view.split(tangent), view.n, view.r, view.dims))


@operator(
    f"norm_parameters(Tensor cotangent, {_STATISTICS}, int groups) -> (Tensor, Tensor)",
    fake=_fake_parameters,
    launch=_launch_parameters,
)
def parameters(cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return Σ n δ and Σ δ, each ``[C]``."""
    view = _Groups(x, mean, rstd, None, groups)
    delta = view.split(cotangent)
    return view.per_channel(delta * view.n), view.per_channel(delta)


@operator(
    f"norm_second_order(Tensor tangent, Tensor cotangent, Tensor? beta, {_STATISTICS}, Tensor? weight, int groups) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_second_order,
    launch=_launch_second_order,
)
def second_order(
    tangent: Tensor,
    cotangent: Tensor,
    beta: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∂⟨δ, γ J t⟩/∂(x, γ, β), with ``beta`` as the cotangent β_y of y the VJP of that too.

    The first is ``[N, C, *]``, the others are ``[C]``.
    """
    view = _Groups(x, mean, rstd, weight, groups)
    delta, t = view.split(cotangent), view.split(tangent)
    back = curvature(t, delta * view.weight, view.n, view.r, view.dims)
    scale = view.per_channel(delta * jacobian(t, view.n, view.r, view.dims))
    if beta is None:
        return view.whole(back), scale, torch.zeros_like(scale)
    beta = view.split(beta)
    back = back + jacobian(beta * view.weight, view.n, view.r, view.dims)
    return view.whole(back), scale + view.per_channel(beta * view.n), view.per_channel(beta)


def memory_format(x: Tensor) -> torch.memory_format:
    """How the operators lay out what they return: with the channels last where x is, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether an operator sees rows of channels: where they come last in memory, or each is one element."""
    return memory_format(x) != torch.contiguous_format or x.shape[2:].numel() == 1


class _Groups:
    """An input with its channels split into groups, ``[N, groups, C / groups, *]``, in the dtype of its sums."""

    def __init__(self, x: Tensor, mean: Tensor, rstd: Tensor, given: Tensor | None, groups: int) -> None:
        self.x, self.groups, self.dtype = x, groups, accumulation_dtype(x.dtype)
        grouped = self.split(x)
        self.dims = list(range(2, grouped.dim()))
        statistics = (x.shape[0], groups, *[1] * len(self.dims))
        self.r = rstd.to(self.dtype).reshape(statistics)
        self.n = (grouped - mean.to(self.dtype).reshape(statistics)) * self.r
        weight = torch.ones((), dtype=self.dtype, device=x.device) if given is None else given.to(self.dtype)
        self.weight = weight if given is None else weight.reshape(groups, -1, *[1] * (x.dim() - 2))

    def split(self, tensor: Tensor) -> Tensor:
        channels = self.x.shape[1] // self.groups
        return tensor.to(self.dtype).unflatten(1, (self.groups, channels))  # type: ignore[no-any-return, no-untyped-call]

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(1, 2).to(self.x.dtype).contiguous(memory_format=memory_format(self.x))

    def per_channel(self, tensor: Tensor) -> Tensor:
        return tensor.sum([0, *self.dims[1:]]).flatten()
