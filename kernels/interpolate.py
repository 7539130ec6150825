"""Interpolates x̂ = αx + (1−α)x̃ on a GPU, alone or behind real and fake: one read of these, one write.

``reference.interpolate`` is the plain form, and ``wgan_fast.ops.assemble`` that of the whole batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialisation import Specialisation

_TILE_BYTES = 8192
"""What one program reads of the wider input: 4 loads of 16 bytes a thread, of each input."""


@triton.jit
def _mix(b_real, b_fake, b_alpha):
    # From the nearer end, as torch.lerp: both ends come out bit for bit.
    near_fake = b_alpha < 0.5
    b_step = tl.where(near_fake, b_alpha, b_alpha - 1) * (b_real - b_fake)
    return tl.where(near_fake, b_fake, b_real) + b_step


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

    b_mixed = _mix(b_real, b_fake, b_alpha)
    tl.store(p_out + o, b_mixed.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N"])
def assemble_kernel(
    p_real,  # [N, D]
    p_fake,  # [N, D]
    p_alpha,  # [N // group_size]
    p_out,  # [3N, D_out]
    N,
    D,
    D_out,
    group_size,
    inner,  # elements of a sample that lie side by side in the output: of the input these are `stride_inner` apart,
    stride_inner,
    stride_outer,  # and this far from the next
    filled,  # how many of them the input has; the others are 0
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program copies and mixes a tile of BLOCK_N samples and BLOCK_D of their elements, in the output's order."""
    columns = tl.cdiv(D_out, BLOCK_D)
    i_n = tl.program_id(0) // columns
    i_d = tl.program_id(0) % columns
    # 64 bits from here: a batch may pass 2^31 elements.
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_n = o_n < N
    m = m_n[:, None] & (o_d[None, :] < D_out)
    m_in = m & (o_d % inner < filled)[None, :]
    o_in = o_n[:, None] * D + (o_d % inner * stride_inner + o_d // inner * stride_outer)[None, :]  # [BLOCK_N, BLOCK_D]
    o_out = o_n[:, None] * D_out + o_d[None, :]
    size = N.to(tl.int64) * D_out

    b_alpha = tl.load(p_alpha + o_n // group_size, mask=m_n, other=0).to(COMPUTE)[:, None]
    b_real = tl.load(p_real + o_in, mask=m_in, other=0)
    b_fake = tl.load(p_fake + o_in, mask=m_in, other=0)
    b_mixed = _mix(b_real.to(COMPUTE), b_fake.to(COMPUTE), b_alpha)
    tl.store(p_out + o_out, b_real.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_out + size + o_out, b_fake.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_out + 2 * size + o_out, b_mixed.to(p_out.dtype.element_ty), mask=m)


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


def assemble(real: Tensor, fake: Tensor, alpha: Tensor, out: Tensor, *, transposed: bool) -> None:
    """Write x, x̃ and x̂, mixed in the dtype of ``alpha``, one behind the other.

    Args:
        real: x ``[N, C, *]``, floating point; each sample dense in memory, one after another.
        fake: x̃, likewise.
        alpha: α ``[N // group_size]``, float32 or float64.
        out: ``[3N, C, *]``, floating point, dense; with its channels last there may be more of them, of zeros.
        transposed: Whether ``out`` has its channels last in memory where the samples have them first, or the other
            way round; else all lie alike.
    """
    N = real.shape[0]
    D, D_out = real.numel() // N, out.numel() // (3 * N)
    inner, stride_inner, stride_outer, filled = 1, 1, 1, 1
    if transposed or D_out > D:
        C, S = real.shape[1], D // real.shape[1]
        inner, filled = (out.shape[1], C) if out.stride(1) == 1 else (S, S)
        stride_inner, stride_outer = (D // filled, 1) if transposed else (1, filled)
    tile = _TILE_BYTES // real.element_size()
    BLOCK_D = min(triton.next_power_of_2(D_out), tile)
    BLOCK_N = tile // BLOCK_D
    alpha = alpha.contiguous()
    assemble_kernel[(triton.cdiv(N, BLOCK_N) * triton.cdiv(D_out, BLOCK_D),)](
        real,
        fake,
        alpha,
        out,
        N,
        D,
        D_out,
        N // alpha.shape[0],
        inner,
        stride_inner,
        stride_outer,
        filled,
        COMPUTE=tl.float64 if alpha.dtype == torch.float64 else tl.float32,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
    )


def _assemble_specialisation(name: str, out: str, *, transposed: bool = False) -> Specialisation:
    pointers = {"p_real": "*fp32", "p_fake": "*fp32", "p_alpha": "*fp32", "p_out": f"*{out}"}
    order = {"inner": "i32", "stride_inner": "i32:16", "filled": "i32"} if transposed else {}
    ones = {"stride_outer"} if transposed else {"inner", "stride_inner", "stride_outer", "filled"}
    return Specialisation(
        name,
        assemble_kernel,
        pointers | {"N": "i32", "D": "i32:16", "D_out": "i32:16"} | order,
        dict.fromkeys(ones, 1) | {"group_size": 1, "COMPUTE": tl.float32, "BLOCK_N": 1, "BLOCK_D": 2048},
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
    _assemble_specialisation("float32", "fp32"),
    _assemble_specialisation("bfloat16", "bf16"),
    _assemble_specialisation("bfloat16, channels last", "bf16", transposed=True),
]
