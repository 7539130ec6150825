"""Weight clipping, the Lipschitz constraint of the original WGAN."""

from collections.abc import Iterable
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import ops as ops  # defines the operator

Weights = TypeVar("Weights", bound=nn.Module | Tensor | Iterable[Tensor])

_clip_weights_ = torch.ops.wgan_fast.clip_weights_.default
DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""What weights may be."""


def clip_weights_(module_or_tensors: Weights, bound: float | tuple[float, float] = 0.01) -> Weights:
    """Clip weights to a range, in place: the critic's constraint of Arjovsky et al. 2017 (Algorithm 1, line 7).

    One pass over memory and, on a GPU, one launch for the whole list. Values are those of :func:`torch.clamp`: a NaN
    stays NaN and an infinity moves to the bound; a bound is rounded to each tensor's dtype. Not differentiable: it
    runs as under ``torch.no_grad()``, and autograd sees that the tensors were modified.

    Args:
        module_or_tensors: A module, for all its parameters, or one tensor or an iterable of them, of any shapes,
            strides and devices; float64, float32, float16 or bfloat16. Views with gaps are allowed, tensors whose
            elements overlap in memory are not.
        bound: A number c > 0 for [-c, c], or a pair (low, high) with low <= high. An infinite bound does not clip.

    Returns:
        The first argument.

    Raises:
        TypeError: If something is not a tensor, a tensor is sparse or of another dtype, or the bound is no number.
        ValueError: If the bound is not positive, not ordered or NaN, or a tensor's elements overlap in memory.
            Nothing was changed when either is raised.

    Examples:
        >>> critic = torch.nn.Linear(3, 1)
        >>> all(p.abs().max() <= 0.01 for p in clip_weights_(critic, 0.01).parameters())
        True
    """
    low, high = clip_range(bound)
    tensors = list(_tensors(module_or_tensors))
    for at, tensor in enumerate(tensors):
        if getattr(tensor, "layout", None) is not torch.strided or tensor.dtype not in DTYPES:
            raise TypeError(
                f"module_or_tensors[{at}] must be a dense float64, float32, float16 or bfloat16 tensor, "
                f"got {_describe(tensor)}"
            )
        if not tensor.is_contiguous() and _may_overlap(tensor):
            raise ValueError(
                f"module_or_tensors[{at}] must not overlap itself in memory (clone an expanded tensor first), "
                f"got shape {list(tensor.shape)} with strides {list(tensor.stride())}"
            )
    devices = {tensor.device for tensor in tensors}
    with torch.no_grad():
        for device in devices:
            on_device = tensors if len(devices) == 1 else [t for t in tensors if t.device == device]
            _clip_weights_(on_device, low, high)
    return module_or_tensors


def clip_range(bound: float | tuple[float, float], name: str = "bound") -> tuple[float, float]:
    """Return the range that ``bound`` stands for.

    Args:
        bound: A number c > 0 for [-c, c], or a pair (low, high) with low <= high.
        name: What an error calls it.

    Returns:
        The pair (low, high).

    Raises:
        TypeError: If the bound is neither.
        ValueError: If it is not positive, not ordered or NaN.
    """
    if isinstance(bound, Real):
        if not bound > 0:
            raise ValueError(f"{name} must be greater than 0, got {bound}")
        return -float(bound), float(bound)
    if not (isinstance(bound, tuple) and len(bound) == 2 and all(isinstance(end, Real) for end in bound)):
        raise TypeError(f"{name} must be a number or a pair (low, high) of numbers, got {bound!r}")
    low, high = bound
    if not low <= high:
        raise ValueError(f"{name} must be a pair (low, high) with low <= high, got {bound}")
    return float(low), float(high)


def _tensors(module_or_tensors: nn.Module | Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    if isinstance(module_or_tensors, nn.Module):
        return module_or_tensors.parameters()
    if isinstance(module_or_tensors, Tensor):
        return (module_or_tensors,)
    if isinstance(module_or_tensors, Iterable):
        return module_or_tensors
    kind = type(module_or_tensors).__name__
    raise TypeError(f"module_or_tensors must be a module, a tensor or an iterable of tensors, got {kind}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} with layout {value.layout}"
    return type(value).__name__


def _may_overlap(tensor: Tensor) -> bool:
    """Whether a dimension steps by less than the smaller-stride dimensions span together."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1 and stride < extent:
            return True
        extent += stride * (size - 1)
    return False
