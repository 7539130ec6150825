"""``wgan_fast::assemble``: the batch of a step, real, fake and interpolates in rows, in one pass over the samples.

Otherwise they are mixed, joined, cast and laid out one after the other, and the whole batch is written four times.
"""

import torch
from torch import Tensor

from . import samples
from .registry import kernels, operator


def _empty(real: Tensor, fake: Tensor, alpha: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if real.dim() == 4 else torch.channels_last_3d
    return torch.empty(
        (3 * real.shape[0], *real.shape[1:]),
        dtype=dtype,
        device=real.device,
        memory_format=layout if channels_last else torch.contiguous_format,
    )


def _launch(real: Tensor, fake: Tensor, alpha: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    out = _empty(real, fake, alpha, dtype, channels_last)
    # Kernels take samples in the order of what they write, or the transposed one: channels first for last.
    other = _empty(real, fake, alpha, dtype, not channels_last) if real.dim() in (4, 5) else out
    given = next((like for like in (out, other) if samples.layout_reason(real, like) is None), out)
    with torch.cuda.device_of(real):  # type: ignore[no-untyped-call]
        kernels("interpolate").assemble(
            samples.arranged(real, given), samples.arranged(fake, given), alpha, out, transposed=given is not out
        )
    return out


@operator(
    "assemble(Tensor real, Tensor fake, Tensor alpha, ScalarType dtype, bool channels_last) -> Tensor",
    fake=_empty,
    launch=_launch,
)
def assemble(real: Tensor, fake: Tensor, alpha: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Write one batch after the other.

    Args:
        real: x ``[N, *D]``, floating point.
        fake: x̃ ``[N, *D]``, of the same dtype.
        alpha: α, one per group of samples, in the accumulation dtype.
        dtype: Of the result; what is mixed is rounded once.
        channels_last: How it is laid out, for images and volumes; else it is contiguous.

    Returns:
        x, x̃ and x̂ = αx + (1−α)x̃, ``[3N, *D]``.
    """
    out = _empty(real, fake, alpha, dtype, channels_last)
    for rows, batch in zip(out.chunk(3), (real, fake)):
        rows.copy_(batch)
    torch.ops.wgan_fast.interpolate_into(out.chunk(3)[2], real, fake, alpha)
    return out
