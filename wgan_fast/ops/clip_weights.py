"""``wgan_fast::clip_weights_``: clip a list of tensors in place."""

import torch
from torch import Tensor

from .registry import operator, writes_only


@operator("clip_weights_(Tensor(a!)[] tensors, float low, float high) -> ()", fake=writes_only)
def clip_weights_(tensors: list[Tensor], low: float, high: float) -> None:
    """Clip with PyTorch's foreach operators; bounds are rounded to the tensors' dtypes."""
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
