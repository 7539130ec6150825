"""Normalisation over groups of channels on a GPU: the forward, and all that the four passes ask of it, in one kernel.

A program takes one group of one sample, or of several samples one after another. It reads its operands twice, once for
the sums over the group and once for the result; the second read finds them in a cache. The formulas and the plain form
are in ``wgan_fast.ops.normalization``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialisation import Specialisation

_TILE = 2048
"""Elements of one operand that a program holds: 8 a thread, of 8 warps."""
_PROGRAMS = 1024
"""Programs that have parts of the parameters' gradients to themselves: several for every multiprocessor."""


@triton.jit
def norm_fwd_kernel(
    p_x,  # [N, C, S]
    p_weight,  # [C]
    p_bias,  # [C]
    p_out,  # [N, C, S]
    p_mean,  # [N, groups]
    p_rstd,  # [N, groups]
    C,
    S,
    channels,
    stride_c,
    stride_s,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """γ n(x) + β, μ and r."""
    groups = C // channels
    i_n = tl.program_id(0) // groups
    i_g = tl.program_id(0) % groups
    # 64 bits from here: a batch may pass 2^31 elements.
    base = i_n.to(tl.int64) * C * S + i_g * channels * stride_c
    size = tl.full([], 1, COMPUTE) * channels * S

    b_sum = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
    for i_c in range(0, channels, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)[:, None]
        for i_s in range(0, S, BLOCK_S):
            o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
            m = (o_c < channels) & (o_s < S)
            b_sum += tl.load(p_x + base + o_c * stride_c + o_s * stride_s, mask=m, other=0).to(COMPUTE)
    mean = tl.sum(tl.sum(b_sum, 1), 0) / size

    b_square = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
    for i_c in range(0, channels, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)[:, None]
        for i_s in range(0, S, BLOCK_S):
            o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
            m = (o_c < channels) & (o_s < S)
            b_x = tl.load(p_x + base + o_c * stride_c + o_s * stride_s, mask=m, other=0).to(COMPUTE)
            b_x = tl.where(m, b_x - mean, 0)
            b_square += b_x * b_x
    rstd = 1 / tl.sqrt(tl.sum(tl.sum(b_square, 1), 0) / size + EPS)

    for i_c in range(0, channels, BLOCK_C):
        o_w = i_c + tl.arange(0, BLOCK_C)
        b_scale = tl.full([BLOCK_C], 1, COMPUTE) * rstd
        b_shift = tl.zeros([BLOCK_C], COMPUTE)
        if WEIGHT:
            b_scale *= tl.load(p_weight + i_g * channels + o_w, mask=o_w < channels, other=0).to(COMPUTE)
        if BIAS:
            b_shift += tl.load(p_bias + i_g * channels + o_w, mask=o_w < channels, other=0).to(COMPUTE)
        o_c = o_w[:, None]
        for i_s in range(0, S, BLOCK_S):
            o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
            m = (o_c < channels) & (o_s < S)
            o = base + o_c * stride_c + o_s * stride_s
            b_x = tl.load(p_x + o, mask=m, other=0).to(COMPUTE)
            b_y = (b_x - mean) * b_scale[:, None] + b_shift[:, None]
            tl.store(p_out + o, b_y.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_mean + tl.program_id(0), mean)
    tl.store(p_rstd + tl.program_id(0), rstd)


@triton.jit
def norm_second_order_kernel(
    p_tangent,  # [N, C, S]
    p_cotangent,  # [N, C, S]
    p_beta,  # [N, C, S]
    p_x,  # [N, C, S]
    p_mean,  # [N, groups]
    p_rstd,  # [N, groups]
    p_weight,  # [C]
    p_out,  # [N, C, S]
    p_parts,  # [programs, 2, C]
    N,
    C,
    S,
    channels,
    stride_c,
    stride_s,
    samples,
    TANGENT: tl.constexpr,
    COTANGENT: tl.constexpr,
    BETA: tl.constexpr,
    WEIGHT: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """J γβ where there is a ``BETA``, plus ∂⟨δ, γ J t⟩/∂x where there is a ``COTANGENT``; else γ J t."""
    groups = C // channels
    i_p = tl.program_id(0) // groups
    i_g = tl.program_id(0) % groups
    size = tl.full([], 1, COMPUTE) * channels * S

    for i in range(samples):
        i_n = i_p * samples + i
        alive = i_n < N
        # 64 bits from here: a batch may pass 2^31 elements.
        base = i_n.to(tl.int64) * C * S + i_g * channels * stride_c
        mean = tl.load(p_mean + i_n * groups + i_g, mask=alive, other=0).to(COMPUTE)
        rstd = tl.load(p_rstd + i_n * groups + i_g, mask=alive, other=0).to(COMPUTE)

        if OUT or COTANGENT:
            b_t = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_tn = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_u = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_un = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_ut = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_b = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_bn = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            for i_c in range(0, channels, BLOCK_C):
                o_w = i_c + tl.arange(0, BLOCK_C)
                b_w = tl.full([BLOCK_C], 1, COMPUTE)
                if WEIGHT:
                    b_w = tl.load(p_weight + i_g * channels + o_w, mask=o_w < channels, other=0).to(COMPUTE)
                o_c = o_w[:, None]
                for i_s in range(0, S, BLOCK_S):
                    o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
                    m = (o_c < channels) & (o_s < S) & alive
                    o = base + o_c * stride_c + o_s * stride_s
                    b_n = (tl.load(p_x + o, mask=m, other=0).to(COMPUTE) - mean) * rstd
                    if TANGENT:
                        tangent = tl.load(p_tangent + o, mask=m, other=0).to(COMPUTE)
                        b_t += tangent
                        b_tn += tangent * b_n
                        if COTANGENT:
                            u = tl.load(p_cotangent + o, mask=m, other=0).to(COMPUTE) * b_w[:, None]
                            b_u += u
                            b_un += u * b_n
                            b_ut += u * tangent
                    if BETA:
                        beta = tl.load(p_beta + o, mask=m, other=0).to(COMPUTE) * b_w[:, None]
                        b_b += beta
                        b_bn += beta * b_n
            t = tl.sum(tl.sum(b_t, 1), 0) / size
            tn = tl.sum(tl.sum(b_tn, 1), 0) / size
            u_mean = tl.sum(tl.sum(b_u, 1), 0) / size
            un = tl.sum(tl.sum(b_un, 1), 0) / size
            spread = tl.sum(tl.sum(b_ut, 1), 0) / size - u_mean * t - un * tn
            b_mean = tl.sum(tl.sum(b_b, 1), 0) / size
            bn = tl.sum(tl.sum(b_bn, 1), 0) / size

        for i_c in range(0, channels, BLOCK_C):
            o_w = i_c + tl.arange(0, BLOCK_C)
            b_w = tl.full([BLOCK_C], 1, COMPUTE)
            if WEIGHT:
                b_w = tl.load(p_weight + i_g * channels + o_w, mask=o_w < channels, other=0).to(COMPUTE)
            o_c = o_w[:, None]
            b_scale = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_shift = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            for i_s in range(0, S, BLOCK_S):
                o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
                m = (o_c < channels) & (o_s < S) & alive
                o = base + o_c * stride_c + o_s * stride_s
                b_n = (tl.load(p_x + o, mask=m, other=0).to(COMPUTE) - mean) * rstd
                b_out = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
                if TANGENT:
                    tangent = tl.load(p_tangent + o, mask=m, other=0).to(COMPUTE)
                    along = rstd * (tangent - t - b_n * tn)
                    if COTANGENT:
                        delta = tl.load(p_cotangent + o, mask=m, other=0).to(COMPUTE)
                        back = rstd * (delta * b_w[:, None] - u_mean - b_n * un)
                        b_out -= rstd * (b_n * rstd * spread + un * along + tn * back)
                        b_scale += delta * along
                    else:
                        b_out += along * b_w[:, None]
                if BETA:
                    beta = tl.load(p_beta + o, mask=m, other=0).to(COMPUTE)
                    if OUT:
                        b_out += rstd * (beta * b_w[:, None] - b_mean - b_n * bn)
                    b_scale += beta * b_n
                    b_shift += beta
                if OUT:
                    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=m)
            if PARTS:
                # The program adds to its own part: no other reads it before the kernel ends.
                o = i_p.to(tl.int64) * 2 * C + i_g * channels + o_w
                m_c = o_w < channels
                before = m_c & (i > 0)
                tl.debug_barrier()
                b_one = tl.load(p_parts + o, mask=before, other=0) + tl.sum(b_scale, 1)
                b_two = tl.load(p_parts + C + o, mask=before, other=0) + tl.sum(b_shift, 1)
                tl.debug_barrier()
                tl.store(p_parts + o, b_one, mask=m_c)
                tl.store(p_parts + C + o, b_two, mask=m_c)


def _geometry(x: Tensor, last: bool) -> tuple[int, int, int, int]:
    """C, S and the strides of both."""
    C = x.shape[1]
    S = x.numel() // (x.shape[0] * C)
    return (C, S, 1, C) if last else (C, S, S, 1)


def _blocks(channels: int, S: int, last: bool) -> dict[str, int]:
    """A tile whose rows in memory are as long as they can be."""
    C, S = triton.next_power_of_2(channels), triton.next_power_of_2(S)
    if last:
        block = min(C, _TILE)
        return {"BLOCK_C": block, "BLOCK_S": min(S, _TILE // block)}
    block = min(S, _TILE)
    return {"BLOCK_C": min(C, _TILE // block), "BLOCK_S": block}


def _compute(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    last: bool,
) -> None:
    """Write y, μ and r.

    Args:
        x: ``[N, C, *]``, dense.
        weight: γ ``[C]``; None for ones.
        bias: β ``[C]``; None for zeros.
        groups: Sets of channels that share statistics.
        eps: Added to the variance.
        out: y, laid out as ``x``.
        mean: ``[N, groups]``, float32, or float64 for float64.
        rstd: Likewise.
        last: Whether the channels come last in memory.
    """
    C, S, stride_c, stride_s = _geometry(x, last)
    norm_fwd_kernel[(x.shape[0] * groups,)](
        x, weight, bias, out, mean, rstd, C, S, C // groups, stride_c, stride_s,
        EPS=eps, WEIGHT=weight is not None, BIAS=bias is not None, COMPUTE=_compute(x), **_blocks(C // groups, S, last),
        num_warps=16,
    )  # fmt: skip


def second_order(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
    *,
    last: bool,
    tangent: Tensor | None = None,
    cotangent: Tensor | None = None,
    beta: Tensor | None = None,
    out: Tensor | None = None,
    shares: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Write what the operands given ask for.

    Args:
        x: ``[N, C, *]``, dense.
        mean: μ ``[N, groups]``, contiguous.
        rstd: r, likewise.
        weight: γ ``[C]``; None for ones.
        groups: Sets of channels that share statistics.
        last: Whether the channels come last in memory.
        tangent: t; alone it asks for γ J t. Every operand is laid out as ``x``.
        cotangent: δ; with t it asks for ∂⟨δ, γ J t⟩/∂x.
        beta: Asks for J γβ, added to the curvature where there is one.
        out: Where to write that; None where nobody wants it.
        shares: Whether the gradients of γ and β are wanted.

    Returns:
        Those, each ``[C]``, summed in a fixed order.
    """
    N = x.shape[0]
    C, S, stride_c, stride_s = _geometry(x, last)
    samples = triton.cdiv(N, _PROGRAMS) if shares else 1
    programs = triton.cdiv(N, samples)
    parts = mean.new_empty(programs, 2, C) if shares else None
    norm_second_order_kernel[(programs * groups,)](
        tangent, cotangent, beta, x, mean, rstd, weight, out, parts,
        N, C, S, C // groups, stride_c, stride_s, samples,
        TANGENT=tangent is not None, COTANGENT=cotangent is not None, BETA=beta is not None,
        WEIGHT=weight is not None, OUT=out is not None, PARTS=shares, COMPUTE=_compute(x),
        **_blocks(C // groups, S, last), num_warps=8,
    )  # fmt: skip
    if parts is None:
        return None
    # Not views of one sum: what an operator returns must not share memory.
    return parts[:, 0].sum(0), parts[:, 1].sum(0)


def _specialisation(
    name: str, dtype: str, block: tuple[int, int], *, operands: str, weight: bool, out: bool, parts: bool
) -> Specialisation:
    given = {"p_tangent": "t" in operands, "p_cotangent": "d" in operands, "p_beta": "b" in operands}
    pointers = {**{n: dtype for n, there in given.items() if there}, "p_x": dtype, "p_mean": "fp32", "p_rstd": "fp32"}
    pointers |= {"p_weight": "fp32"} if weight else {}
    pointers |= {"p_out": dtype} if out else {}
    pointers |= {"p_parts": "fp32"} if parts else {}
    last = block[0] > block[1]
    strides = {"stride_c": 1} if last else {"stride_s": 1}
    integers = ["N", "C", "S", "channels", "stride_s" if last else "stride_c"]
    absent = {n for n in ("p_tangent", "p_cotangent", "p_beta", "p_weight", "p_out", "p_parts") if n not in pointers}
    return Specialisation(
        name,
        norm_second_order_kernel,
        {n: f"*{t}" for n, t in pointers.items()} | {n: "i32:16" for n in integers},
        {
            **dict.fromkeys(absent),
            **strides,
            "samples": 1,
            "TANGENT": given["p_tangent"],
            "COTANGENT": given["p_cotangent"],
            "BETA": given["p_beta"],
            "WEIGHT": weight,
            "OUT": out,
            "PARTS": parts,
            "COMPUTE": tl.float32,
            "BLOCK_C": block[0],
            "BLOCK_S": block[1],
        },
        num_warps=8,
    )


def _forward_specialisation(name: str, dtype: str, block: tuple[int, int]) -> Specialisation:
    last = block[0] > block[1]
    integers = ["C", "S", "channels", "stride_s" if last else "stride_c"]
    return Specialisation(
        name,
        norm_fwd_kernel,
        {
            "p_x": f"*{dtype}",
            "p_weight": "*fp32",
            "p_bias": "*fp32",
            "p_out": f"*{dtype}",
            "p_mean": "*fp32",
            "p_rstd": "*fp32",
            **{n: "i32:16" for n in integers},
        },
        {
            "stride_c" if last else "stride_s": 1,
            "EPS": 1e-5,
            "WEIGHT": True,
            "BIAS": True,
            "COMPUTE": tl.float32,
            "BLOCK_C": block[0],
            "BLOCK_S": block[1],
        },
        num_warps=16,
    )


_FIRST, _LAST = (8, 256), (64, 32)
SPECIALISATIONS = [
    _forward_specialisation("float32", "fp32", _FIRST),
    _forward_specialisation("bfloat16, channels last", "bf16", _LAST),
    _specialisation("vjp, float32", "fp32", _FIRST, operands="b", weight=True, out=True, parts=False),
    _specialisation("jvp, float32", "fp32", _FIRST, operands="t", weight=True, out=True, parts=False),
    _specialisation("parameters, float32", "fp32", _FIRST, operands="b", weight=False, out=False, parts=True),
    _specialisation("float32", "fp32", _FIRST, operands="td", weight=True, out=True, parts=True),
    _specialisation("with beta, float32", "fp32", _FIRST, operands="tdb", weight=True, out=True, parts=True),
    _specialisation("with beta, channels last", "fp32", _LAST, operands="tdb", weight=True, out=True, parts=True),
    _specialisation("with beta, bfloat16", "bf16", _FIRST, operands="tdb", weight=True, out=True, parts=True),
]
