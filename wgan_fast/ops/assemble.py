"""``wgan_fast::assemble``: the batch of a step, real, fake and interpolates in rows, in one pass over the samples.

Otherwise they are mixed, joined, cast and laid out one after the other, and the whole batch is written four times.
"""

import torch
from torch import Tensor

from . import samples
from .registry import kernels, operator


def _empty(
    real: Tensor, fake: Tensor, alpha: Tensor, dtype: torch.dtype, channels_last: bool, channels: int = 0
) -> Tensor:
    N, *shape = real.shape
    if channels and not (channels_last and channels >= shape[0]):
        raise ValueError(f"expected channels last, and at least the samples' {shape[0]}, got {channels}")
    size = (3 * N, channels, *shape[1:]) if channels else (3 * N, *shape)
    return torch.empty(size, dtype=dtype, device=real.device, memory_format=_layout(real, channels_last))


def _layout(batch: Tensor, channels_last: bool) -> torch.memory_format:
    last = torch.channels_last if batch.dim() == 4 else torch.channels_last_3d
    return last if channels_last else torch.contiguous_format


def _launch(
    real: Tensor, fake: Tensor, alpha: Tensor, dtype: torch.dtype, channels_last: bool, channels: int = 0
) -> Tensor:
    # Kernels take samples in the order of what they write, or the transposed one: channels first for last.
    orders = [channels_last, not channels_last] if real.dim() in (4, 5) else [channels_last]
    likes = [torch.empty(real.shape, device="meta", memory_format=_layout(real, last)) for last in orders]
    transposed = samples.layout_reason(real, likes[0]) is not None and samples.layout_reason(real, likes[-1]) is None
    real = real if transposed else real.contiguous(memory_format=_layout(real, channels_last))
    out = _empty(real, fake, alpha, dtype, channels_last, channels)
    with torch.cuda.device_of(real):  # type: ignore[no-untyped-call]
        kernels("interpolate").assemble(real, samples.arranged(fake, real), alpha, out, transposed=transposed)
    return out


@operator(
    "assemble(Tensor real, Tensor fake, Tensor alpha, ScalarType dtype, bool channels_last, int channels=0) -> Tensor",
    fake=_empty,
    launch=_launch,
)
def assemble(
    real: Tensor, fake: Tensor, alpha: Tensor, dtype: torch.dtype, channels_last: bool, channels: int = 0
) -> Tensor:
    """Write one batch after the other.

    Args:
        real: x ``[N, *D]``, floating point.
        fake: x̃ ``[N, *D]``, of the same dtype.
        alpha: α, one per group of samples, in the accumulation dtype.
        dtype: Of the result; what is mixed is rounded once.
        channels_last: How it is laid out, for images and volumes; else it is contiguous.
        channels: How many it has, with channels last: further ones are 0. 0 for those of the samples.

    Returns:
        x, x̃ and x̂ = αx + (1−α)x̃, ``[3N, *D]``.
    """
    out = _empty(real, fake, alpha, dtype, channels_last, channels)
    given = out
    if channels:
        out[:, real.shape[1] :] = 0
        given = out[:, : real.shape[1]]
    for rows, batch in zip(given.chunk(3), (real, fake)):
        rows.copy_(batch)
    torch.ops.wgan_fast.interpolate_into(given.chunk(3)[2], real, fake, alpha)
    return out
