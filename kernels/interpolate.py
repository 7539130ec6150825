"""Interpolates x̂ = αx + (1−α)x̃ on a GPU: one read of real and fake, one write.

``reference.interpolate`` is the plain form.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialisation import Specialisation

_TILE_BYTES = 8192
"""What one program reads of the wider input: 4 loads of 16 bytes a thread, of each input."""


# N stays an argument where it is 1: a constant cannot be widened to 64 bits.
@triton.jit(do_not_specialize=["N"])
def interpolate_fwd_kernel(
    p_real,  # [N, D]
    p_fake,  # [N, D]
    p_alpha,  # [N // group_size]
    p_out,  # [N, D]
    N,
    D,
    group_size,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program mixes a tile of BLOCK_N samples and BLOCK_D of their elements."""
    columns = tl.cdiv(D, BLOCK_D)
    i_n = tl.program_id(0) // columns
    i_d = tl.program_id(0) % columns
    # 64 bits from here: a batch may pass 2^31 elements.
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_n = o_n < N
    group = o_n // group_size

    b_alpha = tl.load(p_alpha + group, mask=m_n, other=0)
    b_alpha = b_alpha.to(COMPUTE)[:, None]  # [BLOCK_N, 1]

    o = o_n[:, None] * D + o_d[None, :]  # [BLOCK_N, BLOCK_D]
    m = m_n[:, None] & (o_d[None, :] < D)
    b_real = tl.load(p_real + o, mask=m).to(COMPUTE)
    b_fake = tl.load(p_fake + o, mask=m).to(COMPUTE)

    # From the nearer end, as torch.lerp: both ends come out bit for bit.
    near_fake = b_alpha < 0.5
    b_step = tl.where(near_fake, b_alpha, b_alpha - 1) * (b_real - b_fake)
    b_mixed = tl.where(near_fake, b_fake, b_real) + b_step

    tl.store(p_out + o, b_mixed.to(p_out.dtype.element_ty), mask=m)


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor, out: Tensor) -> None:
    """Write x̂ = αx + (1−α)x̃, computed in the dtype of ``alpha``.

    Args:
        real: x ``[N, *D]``, floating point; each sample dense in memory, one after another.
        fake: x̃ ``[N, *D]``, floating point, with the strides of ``real``.
        alpha: α ``[N // group_size]``, float32 or float64.
        out: x̂ ``[N, *D]``, floating point, laid out as ``real``.
    """
    N = real.shape[0]
    D = real.numel() // N
    tile = _TILE_BYTES // max(real.element_size(), fake.element_size())
    BLOCK_D = min(triton.next_power_of_2(D), tile)
    BLOCK_N = tile // BLOCK_D
    alpha = alpha.contiguous()
    grid = (triton.cdiv(N, BLOCK_N) * triton.cdiv(D, BLOCK_D),)
    interpolate_fwd_kernel[grid](
        real,
        fake,
        alpha,
        out,
        N,
        D,
        N // alpha.shape[0],
        COMPUTE=tl.float64 if alpha.dtype == torch.float64 else tl.float32,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
    )


def _specialisation(name: str, real: str, fake: str, D: str, block: tuple[int, int]) -> Specialisation:
    return Specialisation(
        name,
        interpolate_fwd_kernel,
        {
            "p_real": f"*{real}",
            "p_fake": f"*{fake}",
            "p_alpha": "*fp32",
            "p_out": f"*{fake}",
            "N": "i32",
            **({} if D == "1" else {"D": D}),
        },
        {
            **({"D": 1} if D == "1" else {}),
            "group_size": 1,
            "COMPUTE": tl.float32,
            "BLOCK_N": block[0],
            "BLOCK_D": block[1],
        },
    )


SPECIALISATIONS = [
    _specialisation("float32", "fp32", "fp32", "i32:16", (1, 2048)),
    _specialisation("bfloat16", "bf16", "bf16", "i32:16", (1, 4096)),
    _specialisation("float32, narrow", "fp32", "fp32", "i32", (1024, 2)),
    _specialisation("float32, one column", "fp32", "fp32", "1", (2048, 1)),
]
