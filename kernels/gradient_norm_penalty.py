"""Turns the input gradient g into norms, the penalty and the tangent seed v on a GPU, and the second derivative.

A group's gradient is read once where one program holds it in registers; a larger one is reduced in two stages,
of which the second reads it again. Every sum has one order, so a result repeats bit for bit.

``ops`` has the plain forms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import bits, float_of
from .specialisation import Specialisation

_MAX_COLUMNS = 16384
"""The largest gradient that one program holds: 32 elements in each of 512 threads."""
_TILE = 4096
_CHUNK = 8192
"""Elements of a larger gradient that one program reduces."""


@triton.jit
def _square_root(x):
    # In float32 the plain square root is an approximation.
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


# G stays an argument where it is 1: a constant has no type to divide in. A weight's bits say nothing of alignment.
_jit = triton.jit(do_not_specialize=["G", "weight"])


@triton.jit
def _seed_slope(norm, G, weight, TARGET: tl.constexpr, ONE_SIDED: tl.constexpr):
    """The s of v = s·g: (2w/G)(r − target)/r, with 0 where r = 0."""
    factor = 2 * float_of(weight, norm.dtype) / G.to(norm.dtype)
    if TARGET == 0:
        return tl.zeros_like(norm) + factor
    excess = norm - TARGET
    if ONE_SIDED:
        excess = tl.where(excess < 0, 0, excess)
    return tl.where(norm == 0, 0, factor * (excess / tl.where(norm == 0, 1, norm)))


@triton.jit
def _curvature(norm, product, G, weight, TARGET: tl.constexpr, ONE_SIDED: tl.constexpr):
    """The q of v's derivative s·c + q·g in the direction c: (2w/G) target ⟨g, c⟩/r³."""
    flat = norm == 0
    if ONE_SIDED:
        flat |= norm < TARGET
    r = tl.where(flat, 1, norm)
    # In this order r³ is never formed, which would overflow long before r.
    return tl.where(flat, 0, 2 * float_of(weight, norm.dtype) / G.to(norm.dtype) * TARGET * (product / r / r / r))


@_jit
def gradient_norm_penalty_rows_kernel(
    p_gradient,  # [G, D]
    p_cotangent,  # [G, D], read for the second derivative
    p_norm,  # [G], written, or read for the second derivative
    p_out,  # [G, D]: v, or v's derivative in the direction of the cotangent
    G,
    D,
    weight,  # its bits
    TARGET: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    BACKWARD: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program holds BLOCK_G whole gradients."""
    o_g = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    o_d = tl.arange(0, BLOCK_D)
    m_g = o_g < G
    o = o_g[:, None] * D + o_d[None, :]  # [BLOCK_G, BLOCK_D]
    m = m_g[:, None] & (o_d[None, :] < D)
    b_gradient = tl.load(p_gradient + o, mask=m, other=0).to(COMPUTE)
    if BACKWARD:
        b_cotangent = tl.load(p_cotangent + o, mask=m, other=0).to(COMPUTE)
        norm = tl.load(p_norm + o_g, mask=m_g, other=1)
        product = tl.sum(b_gradient * b_cotangent, axis=1)
        slope = _seed_slope(norm, G, weight, TARGET, ONE_SIDED)
        curvature = _curvature(norm, product, G, weight, TARGET, ONE_SIDED)
        b_out = slope[:, None] * b_cotangent + curvature[:, None] * b_gradient
    else:
        norm = _square_root(tl.sum(b_gradient * b_gradient, axis=1))
        tl.store(p_norm + o_g, norm, mask=m_g)
        b_out = _seed_slope(norm, G, weight, TARGET, ONE_SIDED)[:, None] * b_gradient
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def gradient_norm_penalty_partial_kernel(
    p_gradient,  # [G, D]
    p_other,  # [G, D]: the gradient again, or a cotangent
    p_partial,  # [G, chunks]
    D,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program reduces a chunk of one large gradient to its share of ⟨g, c⟩."""
    chunks = tl.cdiv(D, CHUNK)
    i_g = tl.program_id(0) // chunks
    i_c = tl.program_id(0) % chunks
    o_d = i_c * CHUNK + tl.arange(0, CHUNK)
    o = i_g.to(tl.int64) * D + o_d
    b_gradient = tl.load(p_gradient + o, mask=o_d < D, other=0).to(COMPUTE)
    b_other = tl.load(p_other + o, mask=o_d < D, other=0).to(COMPUTE)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_gradient * b_other, axis=0))


@_jit
def gradient_norm_penalty_apply_kernel(
    p_gradient,  # [G, D]
    p_cotangent,  # [G, D], read for the second derivative
    p_partial,  # [G, chunks]: shares of ‖g‖², or of ⟨g, c⟩
    p_norm,  # [G]
    p_out,  # [G, D]
    G,
    D,
    weight,  # its bits
    TARGET: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    BACKWARD: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """One program adds up the shares of one large gradient and writes a chunk of what follows from their sum."""
    chunks = tl.cdiv(D, CHUNK)
    i_g = tl.program_id(0) // chunks
    i_c = tl.program_id(0) % chunks
    b_total = tl.zeros([BLOCK_CHUNKS], dtype=COMPUTE)
    for first in range(0, chunks, BLOCK_CHUNKS):
        o_c = first + tl.arange(0, BLOCK_CHUNKS)
        b_total += tl.load(p_partial + i_g.to(tl.int64) * chunks + o_c, mask=o_c < chunks, other=0)
    total = tl.sum(b_total, axis=0)

    o_d = i_c * CHUNK + tl.arange(0, CHUNK)
    o = i_g.to(tl.int64) * D + o_d
    b_gradient = tl.load(p_gradient + o, mask=o_d < D, other=0).to(COMPUTE)
    if BACKWARD:
        norm = tl.load(p_norm + i_g)
        b_cotangent = tl.load(p_cotangent + o, mask=o_d < D, other=0).to(COMPUTE)
        slope = _seed_slope(norm, G, weight, TARGET, ONE_SIDED)
        b_out = slope * b_cotangent + _curvature(norm, total, G, weight, TARGET, ONE_SIDED) * b_gradient
    else:
        norm = _square_root(total)
        tl.store(p_norm + i_g, norm, mask=i_c == 0)
        b_out = _seed_slope(norm, G, weight, TARGET, ONE_SIDED) * b_gradient
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=o_d < D)


@_jit
def gradient_norm_penalty_reduce_kernel(
    p_norm,  # [G]
    p_penalty,  # []
    p_mean_norm,  # []
    G,
    weight,  # its bits
    TARGET: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The only program reduces the norms to the penalty and their mean."""
    b_excess = tl.zeros([BLOCK_G], dtype=COMPUTE)
    b_norm = tl.zeros([BLOCK_G], dtype=COMPUTE)
    for first in range(0, G, BLOCK_G):
        o_g = first + tl.arange(0, BLOCK_G)
        norm = tl.load(p_norm + o_g, mask=o_g < G, other=0)
        excess = norm - TARGET
        if ONE_SIDED:
            excess = tl.where(excess < 0, 0, excess)
        b_excess += tl.where(o_g < G, excess * excess, 0)
        b_norm += norm
    tl.store(p_penalty, tl.sum(b_excess, axis=0) / G * float_of(weight, COMPUTE))
    tl.store(p_mean_norm, tl.sum(b_norm, axis=0) / G)


def gradient_norm_penalty(
    gradient: Tensor,
    penalty: Tensor,
    mean_norm: Tensor,
    norm: Tensor,
    seed: Tensor,
    *,
    weight: float,
    target: float,
    one_sided: bool,
) -> None:
    """Write the penalty, the norms and v.

    Args:
        gradient: g ``[N, *D]``, floating point, each sample dense in memory, one after another.
        penalty: (w/G) Σ ψ(‖g‖), 0-dim, float32 (float64 for float64).
        mean_norm: Likewise.
        norm: ‖g‖ ``[G]``, one per group of N/G samples, likewise.
        seed: v = (w/G) ψ'(‖g‖) g/‖g‖, laid out as ``gradient``.
        weight: w.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
    """
    _launch(gradient, gradient, norm, seed, weight, target, one_sided, backward=False)
    gradient_norm_penalty_reduce_kernel[(1,)](
        norm,
        penalty,
        mean_norm,
        norm.shape[0],
        bits(weight),
        TARGET=target,
        ONE_SIDED=one_sided,
        COMPUTE=_compute(norm),
        BLOCK_G=1024,
    )


def gradient_norm_penalty_backward(
    gradient: Tensor,
    norm: Tensor,
    cotangent: Tensor,
    out: Tensor,
    *,
    weight: float,
    target: float,
    one_sided: bool,
) -> None:
    """Write the derivative of v in the direction of a cotangent (the Hessian of the penalty times it).

    Args:
        gradient: g ``[N, *D]``.
        norm: ‖g‖ ``[G]``, as ``gradient_norm_penalty`` wrote it.
        cotangent: c, of the dtype of ``gradient`` and laid out as it.
        out: Likewise.
        weight: w.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
    """
    _launch(gradient, cotangent, norm, out, weight, target, one_sided, backward=True)


def _compute(norm: Tensor) -> tl.dtype:
    return tl.float64 if norm.dtype == torch.float64 else tl.float32


def _launch(
    gradient: Tensor,
    cotangent: Tensor,
    norm: Tensor,
    out: Tensor,
    weight: float,
    target: float,
    one_sided: bool,
    backward: bool,
) -> None:
    G = norm.shape[0]
    D = gradient.numel() // G
    constants = {
        "TARGET": float(target),
        "ONE_SIDED": one_sided,
        "BACKWARD": backward,
        "COMPUTE": _compute(norm),
    }
    if D <= _MAX_COLUMNS:
        BLOCK_D = triton.next_power_of_2(D)
        BLOCK_G = max(1, _TILE // BLOCK_D)
        gradient_norm_penalty_rows_kernel[(triton.cdiv(G, BLOCK_G),)](
            gradient,
            cotangent,
            norm,
            out,
            G,
            D,
            bits(weight),
            BLOCK_G=BLOCK_G,
            BLOCK_D=BLOCK_D,
            num_warps=max(4, BLOCK_D // 1024),
            **constants,
        )
        return
    chunks = triton.cdiv(D, _CHUNK)
    partial = torch.empty(G, chunks, dtype=norm.dtype, device=norm.device)
    gradient_norm_penalty_partial_kernel[(G * chunks,)](
        gradient, cotangent, partial, D, COMPUTE=_compute(norm), CHUNK=_CHUNK, num_warps=8
    )
    gradient_norm_penalty_apply_kernel[(G * chunks,)](
        gradient,
        cotangent,
        partial,
        norm,
        out,
        G,
        D,
        bits(weight),
        CHUNK=_CHUNK,
        BLOCK_CHUNKS=min(1024, triton.next_power_of_2(chunks)),
        num_warps=8,
        **constants,
    )


def _arguments(dtype: str, *pointers: str) -> dict[str, str]:
    return {
        **{name: f"*{'fp32' if name in ('p_norm', 'p_partial') else dtype}" for name in pointers},
        "G": "i32",
        "D": "i32:16",
        "weight": "i64",
    }


def _specialisations() -> list[Specialisation]:
    forms = []
    constants = {"TARGET": 1.0, "ONE_SIDED": False, "COMPUTE": tl.float32}
    for dtype, name in (("fp32", "float32"), ("bf16", "bfloat16")):
        for backward in (False, True):
            form = f"{name}, backward" if backward else name
            pass_constants = {**constants, "BACKWARD": backward}
            rows = _arguments(dtype, "p_gradient", "p_cotangent", "p_norm", "p_out")
            for BLOCK_G, BLOCK_D, warps in ((4, 1024, 4), (1, _MAX_COLUMNS, 16)):
                forms.append(
                    Specialisation(
                        f"{form}, {BLOCK_D} columns",
                        gradient_norm_penalty_rows_kernel,
                        rows,
                        {**pass_constants, "BLOCK_G": BLOCK_G, "BLOCK_D": BLOCK_D},
                        num_warps=warps,
                    )
                )
            forms.append(
                Specialisation(
                    form,
                    gradient_norm_penalty_apply_kernel,
                    _arguments(dtype, "p_gradient", "p_cotangent", "p_partial", "p_norm", "p_out"),
                    {**pass_constants, "CHUNK": _CHUNK, "BLOCK_CHUNKS": 128},
                    num_warps=8,
                )
            )
        partial = _arguments(dtype, "p_gradient", "p_other", "p_partial")
        del partial["G"], partial["weight"]
        forms.append(
            Specialisation(
                name,
                gradient_norm_penalty_partial_kernel,
                partial,
                {"COMPUTE": tl.float32, "CHUNK": _CHUNK},
                num_warps=8,
            )
        )
    reduce = {"p_norm": "*fp32", "p_penalty": "*fp32", "p_mean_norm": "*fp32", "G": "i32", "weight": "i64"}
    forms.append(Specialisation("float32", gradient_norm_penalty_reduce_kernel, reduce, {**constants, "BLOCK_G": 1024}))
    return forms


SPECIALISATIONS = _specialisations()
