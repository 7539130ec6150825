"""``wgan_fast::cast``: tensors in another dtype, all in one call."""

import torch
from torch import Tensor

from .registry import operator


def _like(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]


@operator("cast(Tensor[] tensors, ScalarType dtype) -> Tensor[]", fake=_like)
def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cast with PyTorch's foreach operator; each result is laid out as its tensor."""
    made = _like(tensors, dtype)
    torch._foreach_copy_(made, tensors)
    return made
