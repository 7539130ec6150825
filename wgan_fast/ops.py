"""Every operator of the package: its schema, its fake form and what runs it.

An operator runs compiled code from ``csrc/`` where the extension has it for the tensor's device, and plain PyTorch
elsewhere; a caller sees one operator, ``torch.ops.wgan_fast.<name>``, either way.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop

# Loading the extension registers its operators.
from . import build as build
from . import normalization, philox, samples
from .engines import run_by_number
from .mlp_critic_step import four_passes
from .precision import accumulation_dtype
from .reference import per_sample

# What the dispatcher registers lasts as long as this object.
_library = torch.library.Library("wgan_fast", "FRAGMENT")  # type: ignore[no-untyped-call]

_library.define(  # type: ignore[no-untyped-call]
    "clip_weights_(Tensor(a!)[] tensors, float low, float high) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.impl(_library, "clip_weights_", "CompositeExplicitAutograd")
def _clip_weights_foreach_(tensors: list[Tensor], low: float, high: float) -> None:
    if not low <= high:
        raise ValueError(f"low must be at most high, got low={low} and high={high}")
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    with torch.no_grad():
        for dtype, group in by_dtype.items():
            # Rounded here: a foreach operator refuses a bound that overflows the dtype.
            torch._foreach_clamp_min_(group, torch.tensor(low, dtype=dtype).item())
            torch._foreach_clamp_max_(group, torch.tensor(high, dtype=dtype).item())


@torch.library.register_fake("wgan_fast::clip_weights_", lib=_library)  # type: ignore[untyped-decorator]
def _clip_weights_fake(tensors: list[Tensor], low: float, high: float) -> None:
    """Writes in place and returns nothing, so there is nothing to say."""


_library.define(  # type: ignore[no-untyped-call]
    "clipped_rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs, "
    "Tensor(d!)[] momentum_buffers, Tensor? device_lr, float lr, float alpha, float eps, float weight_decay, "
    "float momentum, bool maximize, float low, float high) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "clipped_rmsprop_", "CompositeExplicitAutograd")
def _clipped_rmsprop_foreach_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    device_lr: Tensor | None,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    low: float,
    high: float,
) -> None:
    """One step of RMSprop, centered where there are ``grad_avgs`` and with momentum where there are buffers."""
    if not low <= high:
        raise ValueError(f"low must be at most high, got low={low} and high={high}")
    with torch.no_grad():
        rmsprop(
            params,
            grads,
            square_avgs,
            grad_avgs,
            momentum_buffers,
            # It counts steps and does not use the count.
            [torch.zeros((), device=param.device) for param in params],
            foreach=True,
            maximize=maximize,
            capturable=device_lr is not None,
            lr=lr if device_lr is None else device_lr,  # type: ignore[arg-type]  # annotated as a number only
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum if momentum_buffers else 0.0,
            centered=bool(grad_avgs),
        )
        _clip_weights_foreach_(params, low, high)


@torch.library.register_fake("wgan_fast::clipped_rmsprop_", lib=_library)  # type: ignore[untyped-decorator]
def _clipped_rmsprop_fake(params: list[Tensor], *_: object) -> None:
    """Writes in place and returns nothing, so there is nothing to say."""


# The penalty in four passes for callers under torch.compile: opaque to the compiler, which could not plan a critic
# while it traces one. Returns the
# penalty, the gradient of every parameter and the buffers as the critic leaves them.
_library.define(  # type: ignore[no-untyped-call]
    "gradient_penalty(int number, float weight, float target, Tensor points, Tensor[] parameters, Tensor[] buffers, "
    "Tensor[] critic_args, Tensor[] critic_kwargs, str[] names, ScalarType? autocast) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("gradient_penalty", run_by_number, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("wgan_fast::gradient_penalty", lib=_library)  # type: ignore[untyped-decorator]
def _gradient_penalty_fake(
    number: int,
    weight: float,
    target: float,
    points: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    *_: object,
) -> list[Tensor]:
    penalty = points.new_empty((), dtype=accumulation_dtype(points.dtype))
    return [penalty, *[torch.empty_like(tensor) for tensor in (*parameters, *buffers)]]


# Normalisation over groups of channels: what the four passes ask of it. `normalization.py` has the formulas.
_STATISTICS = "Tensor x, Tensor mean, Tensor rstd"
for _schema, _plain in {
    "norm_forward(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps) -> (Tensor, Tensor, Tensor)": (
        normalization.forward
    ),
    f"norm_vjp(Tensor cotangent, {_STATISTICS}, Tensor? weight, int groups) -> Tensor": normalization.vjp,
    f"norm_jvp(Tensor tangent, {_STATISTICS}, Tensor? weight, int groups) -> Tensor": normalization.jvp,
    f"norm_parameters(Tensor cotangent, {_STATISTICS}, int groups) -> (Tensor, Tensor)": normalization.parameters,
    f"norm_second_order(Tensor tangent, Tensor cotangent, Tensor? beta, {_STATISTICS}, Tensor? weight, int groups) "
    "-> (Tensor, Tensor, Tensor)": normalization.second_order,
}.items():
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(_name, _plain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _norm_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=normalization.memory_format(x))


def _norm_shares(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


@torch.library.register_fake("wgan_fast::norm_forward", lib=_library)  # type: ignore[untyped-decorator]
def _norm_forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], groups, dtype=accumulation_dtype(x.dtype))
    return _norm_like(x), statistics, torch.empty_like(statistics)


@torch.library.register_fake("wgan_fast::norm_vjp", lib=_library)  # type: ignore[untyped-decorator]
@torch.library.register_fake("wgan_fast::norm_jvp", lib=_library)  # type: ignore[untyped-decorator]
def _norm_linear_fake(vector: Tensor, x: Tensor, *_: object) -> Tensor:
    return _norm_like(x)


@torch.library.register_fake("wgan_fast::norm_parameters", lib=_library)  # type: ignore[untyped-decorator]
def _norm_parameters_fake(cotangent: Tensor, x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _norm_shares(x)


@torch.library.register_fake("wgan_fast::norm_second_order", lib=_library)  # type: ignore[untyped-decorator]
def _norm_second_order_fake(
    tangent: Tensor, cotangent: Tensor, beta: Tensor | None, x: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_like(x), *_norm_shares(x)


def _register_norm_kernels(key: str) -> None:
    """Let Triton run them for the tensors of a dispatch key; the kernels are imported at the first call."""

    def run(
        x: Tensor, *statistics: Any, out: bool = True, shares: bool = False, **given: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        kernels, form = importlib.import_module(".kernels.normalization", __package__), normalization.memory_format(x)
        vectors = {name: v.contiguous(memory_format=form) for name, v in given.items() if v is not None}
        made = _norm_like(x) if out else None
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            x, last = x.contiguous(memory_format=form), normalization.is_channels_last(x)
            return made, kernels.second_order(x, *statistics, last=last, **vectors, out=made, shares=shares)

    @torch.library.impl(_library, "norm_forward", key)
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = importlib.import_module(".kernels.normalization", __package__)
        made: tuple[Tensor, Tensor, Tensor] = _norm_forward_fake(x, weight, bias, groups, eps)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            x, last = x.contiguous(memory_format=normalization.memory_format(x)), normalization.is_channels_last(x)
            kernels.forward(x, weight, bias, groups, eps, *made, last=last)
        return made

    @torch.library.impl(_library, "norm_vjp", key)
    def vjp(cotangent: Tensor, *arguments: Any) -> Tensor | None:
        return run(*arguments, beta=cotangent)[0]

    @torch.library.impl(_library, "norm_jvp", key)
    def jvp(tangent: Tensor, *arguments: Any) -> Tensor | None:
        return run(*arguments, tangent=tangent)[0]

    @torch.library.impl(_library, "norm_parameters", key)
    def parameters(cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        return run(x, mean, rstd, None, groups, beta=cotangent, out=False, shares=True)[1]

    @torch.library.impl(_library, "norm_second_order", key)
    def second_order(
        tangent: Tensor, cotangent: Tensor, beta: Tensor | None, *arguments: Any
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        made, shares = run(*arguments, tangent=tangent, cotangent=cotangent, beta=beta, shares=True)
        return made, *shares


if importlib.util.find_spec("triton"):
    _register_norm_kernels("CUDA")


# A whole critic step of a narrow MLP: mean scores, penalty and mean norm, the norms, every gradient.
_library.define(  # type: ignore[no-untyped-call]
    "mlp_critic_step(Tensor real, Tensor fake, Tensor alpha, Tensor[] parameters, float negative_slope, float weight, "
    "float target, bool one_sided, str precision) -> (Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("mlp_critic_step", four_passes, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("wgan_fast::mlp_critic_step", lib=_library)  # type: ignore[untyped-decorator]
def _mlp_critic_step_fake(
    real: Tensor, fake: Tensor, alpha: Tensor, parameters: list[Tensor], *_: object
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return real.new_empty(4), real.new_empty(real.shape[0]), [p.new_empty(p.shape) for p in parameters]


def _register_mlp_critic_step(key: str) -> None:
    """Let Triton run it for the tensors of a dispatch key; the kernel is imported at the first call."""

    @torch.library.impl(_library, "mlp_critic_step", key)
    def step(
        real: Tensor, fake: Tensor, alpha: Tensor, parameters: list[Tensor], *options: Any
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        kernels = importlib.import_module(".kernels.mlp_critic_step", __package__)
        given = [tensor.contiguous() for tensor in (real, fake, alpha)]
        with torch.cuda.device_of(real):  # type: ignore[no-untyped-call]
            result: tuple[Tensor, Tensor, list[Tensor]] = kernels.mlp_critic_step(*given, parameters, *options)
        return result


if importlib.util.find_spec("triton"):
    _register_mlp_critic_step("CUDA")


_below_autograd: Any = torch._C._AutoDispatchBelowAutograd
"""Calls an operator past the Python function that records it, which costs as much as a small operator itself."""


def _differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative of what follows from the tensors may be asked for, by autograd or by torch.func."""
    recording = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])
    return recording or torch._C._are_functorch_transforms_active()


# Interpolation: x̂ = α(scale·x + shift) + (1−α)x̃, with α in the accumulation dtype, one per group of samples;
# `batch` asks for [x; x̃; x̂]. Batches that `samples.layout_reason` objects to are copied first.
_OPTIONS = "float scale=1.0, float shift=0.0, ScalarType? dtype=None, bool batch=False"
for _schema in (
    "interpolate_into(Tensor(a!) out, Tensor real, Tensor fake, Tensor alpha, float scale=1.0, float shift=0.0) -> ()",
    f"interpolate(Tensor real, Tensor fake, Tensor alpha, {_OPTIONS}) -> Tensor",
    f"interpolate_drawn(Tensor real, Tensor fake, Tensor(a!) state, int group_size=1, {_OPTIONS}) -> (Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


@torch.library.impl(_library, "interpolate_into", "CompositeExplicitAutograd")
def _interpolate_into_plain(
    out: Tensor, real: Tensor, fake: Tensor, alpha: Tensor, scale: float = 1.0, shift: float = 0.0
) -> None:
    with torch.no_grad():
        alpha = per_sample(alpha.repeat_interleave(real.shape[0] // alpha.shape[0]), real)
        x, y = real.to(alpha.dtype), fake.to(alpha.dtype)
        if scale != 1 or shift != 0:
            x = x * scale + shift
        if out.shape[0] == real.shape[0] and out.dtype == alpha.dtype:
            # lerp, because it is exact at both ends.
            torch.lerp(y, x, alpha, out=out)
        else:
            mixed = torch.lerp(y, x, alpha)
            out.copy_(mixed if out.shape[0] == real.shape[0] else torch.cat([x, y, mixed]))


@torch.library.impl(_library, "interpolate", "CompositeExplicitAutograd")
def _interpolate(
    real: Tensor,
    fake: Tensor,
    alpha: Tensor,
    scale: float = 1.0,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
    batch: bool = False,
) -> Tensor:
    out = samples.empty(real, real.shape[0] * (3 if batch else 1), dtype or fake.dtype)
    torch.ops.wgan_fast.interpolate_into(out, real, fake, alpha, scale, shift)
    return out


@torch.library.impl(_library, "interpolate_drawn", "CompositeExplicitAutograd")
def _interpolate_drawn(
    real: Tensor,
    fake: Tensor,
    state: Tensor,
    group_size: int = 1,
    scale: float = 1.0,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
    batch: bool = False,
) -> tuple[Tensor, Tensor]:
    groups = real.shape[0] // group_size
    alpha = philox.uniform(state, groups).to(accumulation_dtype(fake.dtype))
    with torch.no_grad():
        state[1] += groups
        return torch.ops.wgan_fast.interpolate(real, fake, alpha, scale, shift, dtype, batch), alpha


@torch.library.register_fake("wgan_fast::interpolate_into", lib=_library)  # type: ignore[untyped-decorator]
def _interpolate_into_fake(out: Tensor, *_: object) -> None:
    """Writes in place and returns nothing, so there is nothing to say."""


@torch.library.register_fake("wgan_fast::interpolate", lib=_library)  # type: ignore[untyped-decorator]
def _interpolate_fake(
    real: Tensor,
    fake: Tensor,
    alpha: Tensor,
    scale: float = 1.0,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
    batch: bool = False,
) -> Tensor:
    return samples.empty(real, real.shape[0] * (3 if batch else 1), dtype or fake.dtype)


@torch.library.register_fake("wgan_fast::interpolate_drawn", lib=_library)  # type: ignore[untyped-decorator]
def _interpolate_drawn_fake(
    real: Tensor,
    fake: Tensor,
    state: Tensor,
    group_size: int = 1,
    scale: float = 1.0,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
    batch: bool = False,
) -> tuple[Tensor, Tensor]:
    points = samples.empty(real, real.shape[0] * (3 if batch else 1), dtype or fake.dtype)
    return points, real.new_empty(real.shape[0] // group_size, dtype=accumulation_dtype(fake.dtype))


class _Interpolate(torch.autograd.Function):
    """Differentiable to any order: its backward is written in operators that differentiate again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        out: Tensor = torch.ops.wgan_fast.interpolate(*inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        real, fake, alpha, ctx.scale, ctx.shift, _, ctx.batch = inputs
        # α's gradient alone needs the samples.
        ctx.save_for_backward(alpha, *((real, fake) if ctx.needs_input_grad[2] else ()))
        ctx.dtypes = real.dtype, fake.dtype

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        alpha, *pair = ctx.saved_tensors
        cotangent = cotangents[0].to(alpha.dtype)
        parts = cotangent.chunk(3) if ctx.batch else (cotangent,)
        mixed = parts[-1]
        weight = per_sample(alpha.repeat_interleave(mixed.shape[0] // alpha.shape[0]), mixed)
        of_real, of_fake = weight * mixed, (1 - weight) * mixed
        if ctx.batch:
            of_real, of_fake = parts[0] + of_real, parts[1] + of_fake
        of_alpha = None
        if pair:
            difference = pair[0].to(alpha.dtype) * ctx.scale + ctx.shift - pair[1].to(alpha.dtype)
            of_alpha = (mixed * difference).reshape(alpha.shape[0], -1).sum(1)
        real, fake = ctx.dtypes
        return (
            (of_real * ctx.scale).to(real) if ctx.needs_input_grad[0] else None,
            of_fake.to(fake) if ctx.needs_input_grad[1] else None,
            of_alpha,
            *[None] * 4,
        )


torch.library.register_autograd(
    "wgan_fast::interpolate", _Interpolate.backward, setup_context=_Interpolate.setup_context, lib=_library
)


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """Return x̂ with α ``[N]``, differentiable also under torch.func, whose transforms no registered formula passes."""
    if _differentiated(real, fake, alpha):
        mixed: Tensor = _Interpolate.apply(real, fake, alpha, 1.0, 0.0, None, False)  # type: ignore[no-untyped-call]
        return mixed
    with _below_autograd():
        plain: Tensor = torch.ops.wgan_fast.interpolate.default(real, fake, alpha)
        return plain


def interpolate_into(out: Tensor, real: Tensor, fake: Tensor, alpha: Tensor) -> None:
    """Write x̂ with α ``[N]`` into ``out``, which autograd does not record."""
    with _below_autograd():
        torch.ops.wgan_fast.interpolate_into.default(out, real, fake, alpha)


# The penalty at a given input gradient g, one norm per group of samples: the penalty, the mean norm, the norms and
# v = (w/G) ψ'(‖g‖) g/‖g‖ (0 where g = 0), which is the penalty's gradient. In float32, ‖g‖ overflows past 1.8e19:
# it and the penalty are then infinite and v is NaN.
for _schema in (
    "gradient_norm_penalty(Tensor gradient, float weight, float target, bool one_sided, int group_size=1) "
    "-> (Tensor penalty, Tensor mean_norm, Tensor norm, Tensor seed)",
    "gradient_norm_penalty_backward(Tensor gradient, Tensor norm, Tensor cotangent, float weight, float target, "
    "bool one_sided) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def _factor(norm: Tensor, weight: float, target: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    """The norm in excess of the target, and s of v = s·g."""
    excess = norm - target
    if one_sided:
        excess = excess.clamp(min=0)
    k = 2 * weight / norm.shape[0]
    # Where the norm is 0 so is g, unless the target is 0; threshold keeps the division finite and lets NaN pass.
    slope = torch.full_like(norm, k) if target == 0 else excess / torch.threshold(norm, 0, torch.inf) * k
    return excess, slope


@torch.library.impl(_library, "gradient_norm_penalty", "CompositeExplicitAutograd")
def _gradient_norm_penalty_plain(
    gradient: Tensor, weight: float, target: float, one_sided: bool, group_size: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = accumulation_dtype(gradient.dtype)
    flat = gradient.reshape(gradient.shape[0] // group_size, -1)
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=compute)
    excess, slope = _factor(norm, weight, target, one_sided)
    seed = samples.empty(gradient, gradient.shape[0], gradient.dtype)
    torch.mul(gradient, per_sample(slope.to(gradient.dtype).repeat_interleave(group_size), gradient), out=seed)
    return excess.square().mean() * weight, norm.mean(), norm, seed


@torch.library.impl(_library, "gradient_norm_penalty_backward", "CompositeExplicitAutograd")
def _gradient_norm_penalty_backward_plain(
    gradient: Tensor, norm: Tensor, cotangent: Tensor, weight: float, target: float, one_sided: bool
) -> Tensor:
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


@torch.library.register_fake("wgan_fast::gradient_norm_penalty", lib=_library)  # type: ignore[untyped-decorator]
def _gradient_norm_penalty_fake(
    gradient: Tensor, weight: float, target: float, one_sided: bool, group_size: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = gradient.new_empty(gradient.shape[0] // group_size, dtype=accumulation_dtype(gradient.dtype))
    seed = samples.empty(gradient, gradient.shape[0], gradient.dtype)
    return norm.new_empty(()), norm.new_empty(()), norm, seed


@torch.library.register_fake("wgan_fast::gradient_norm_penalty_backward", lib=_library)  # type: ignore[untyped-decorator]
def _gradient_norm_penalty_backward_fake(gradient: Tensor, *_: object) -> Tensor:
    return samples.empty(gradient, gradient.shape[0], gradient.dtype)


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
    lib=_library,
)
torch.library.register_autograd(
    "wgan_fast::gradient_norm_penalty_backward", _GradientNormPenaltyBackward.backward, lib=_library
)


def gradient_norm_penalty(gradient: Tensor, weight: float, target: float, one_sided: bool) -> Tensor:
    """Return the penalty, twice differentiable also under torch.func."""
    if _differentiated(gradient):
        outputs = _GradientNormPenalty.apply(gradient, weight, target, one_sided, 1)  # type: ignore[no-untyped-call]
    else:
        with _below_autograd():
            outputs = torch.ops.wgan_fast.gradient_norm_penalty.default(gradient, weight, target, one_sided)
    penalty: Tensor = outputs[0]
    return penalty


def _clash(out: Tensor, given: Tensor) -> bool:
    """Whether writing ``out`` may change ``given`` other than element for element; neither has gaps in memory."""
    start, other = out.data_ptr(), given.data_ptr()
    if start == other and out.dtype == given.dtype and out.numel() == given.numel():
        return False
    return start < other + given.nbytes and other < start + out.nbytes


def _register_triton() -> None:
    """Let Triton run the operators for CUDA tensors; the kernels are imported as the first of them is called."""

    def kernels(operator: str) -> Any:
        return importlib.import_module(f".kernels.{operator}", __package__)

    @torch.library.impl(_library, "interpolate_into", "CUDA")
    def interpolate_into(
        out: Tensor, real: Tensor, fake: Tensor, alpha: Tensor, scale: float = 1.0, shift: float = 0.0
    ) -> None:
        real = real if samples.is_dense(real) else real.contiguous()
        fake = samples.arranged(fake, real)
        target = samples.arranged(out, real, copy=False)
        if target is out and any(_clash(out, given) for given in (real, fake, alpha)):
            target = samples.empty(real, out.shape[0], out.dtype)
        with torch.cuda.device(out.device):
            kernels("interpolate").interpolate(real, fake, alpha, target, scale=scale, shift=shift)
        if target is out:
            torch.autograd.graph.increment_version(out)
        else:
            out.copy_(target)

    @torch.library.impl(_library, "interpolate_drawn", "CUDA")
    def interpolate_drawn(
        real: Tensor,
        fake: Tensor,
        state: Tensor,
        group_size: int = 1,
        scale: float = 1.0,
        shift: float = 0.0,
        dtype: torch.dtype | None = None,
        batch: bool = False,
    ) -> tuple[Tensor, Tensor]:
        real = real if samples.is_dense(real) else real.contiguous()
        fake = samples.arranged(fake, real)
        out, alpha = _interpolate_drawn_fake(real, fake, state, group_size, scale, shift, dtype, batch)
        torch.autograd.graph.increment_version(state)
        with torch.cuda.device(out.device):
            kernels("interpolate").interpolate(real, fake, alpha, out, scale=scale, shift=shift, state=state)
        return out, alpha

    @torch.library.impl(_library, "gradient_norm_penalty", "CUDA")
    def gradient_norm_penalty(
        gradient: Tensor, weight: float, target: float, one_sided: bool, group_size: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradient = gradient if samples.is_dense(gradient) else gradient.contiguous()
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _gradient_norm_penalty_fake(
            gradient, weight, target, one_sided, group_size
        )
        with torch.cuda.device(gradient.device):
            kernels("gradient_norm_penalty").gradient_norm_penalty(
                gradient, *outputs, weight=weight, target=target, one_sided=one_sided
            )
        return outputs

    @torch.library.impl(_library, "gradient_norm_penalty_backward", "CUDA")
    def gradient_norm_penalty_backward(
        gradient: Tensor, norm: Tensor, cotangent: Tensor, weight: float, target: float, one_sided: bool
    ) -> Tensor:
        gradient = gradient if samples.is_dense(gradient) else gradient.contiguous()
        out = torch.empty_like(gradient)
        cotangent = samples.arranged(cotangent, gradient)
        with torch.cuda.device(gradient.device):
            kernels("gradient_norm_penalty").gradient_norm_penalty_backward(
                gradient, norm, cotangent, out, weight=weight, target=target, one_sided=one_sided
            )
        return out


if importlib.util.find_spec("triton"):
    _register_triton()
