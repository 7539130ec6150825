"""Every operator of the package: its schema, its fake form and what runs it.

An operator runs compiled code from ``csrc/`` where the extension has it for the tensor's device, and plain PyTorch
elsewhere; a caller sees one operator, ``torch.ops.wgan_fast.<name>``, either way.
"""

import torch
from torch import Tensor

# Loading the extension registers its operators.
from . import build as build
from . import normalization
from .engines import run_by_number
from .precision import accumulation_dtype

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


# The penalty in four passes for callers under torch.compile: opaque to the compiler, which could not plan a critic
# while it traces one. Returns the
# penalty, the gradient of every parameter and the buffers as the critic leaves them.
_library.define(  # type: ignore[no-untyped-call]
    "gradient_penalty(int number, Tensor points, Tensor[] parameters, Tensor[] buffers, Tensor[] critic_args, "
    "Tensor[] critic_kwargs, str[] names, ScalarType? autocast) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("gradient_penalty", run_by_number, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("wgan_fast::gradient_penalty", lib=_library)  # type: ignore[untyped-decorator]
def _gradient_penalty_fake(
    number: int, points: Tensor, parameters: list[Tensor], buffers: list[Tensor], *_: object
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
