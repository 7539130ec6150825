"""Every operator of the package: its schema, its fake form and what runs it.

An operator runs compiled code from ``csrc/`` where the extension has it for the tensor's device, and plain PyTorch
elsewhere; a caller sees one operator, ``torch.ops.wgan_fast.<name>``, either way.
"""

import torch
from torch import Tensor

# Loading the extension registers its operators.
from . import build as build

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
