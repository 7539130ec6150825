"""Normalisation over groups of channels on a GPU: the forward, and all that the four passes ask of it, in one kernel.

A program takes one group of one sample, or of several samples one after another. It reads its operands twice, once for
the sums over the group and once for the result; the second read finds them in a cache. Where large groups are too few
to fill a GPU, each is cut into chunks, and both are done by kernels of their own: sums over chunks, then what follows.
The formulas and the plain form are in ``wgan_fast.ops.normalization``.
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
_ENOUGH = 256
"""Programs that fill a GPU: two for every multiprocessor. Fewer groups of at least four tiles are cut into chunks."""

# A kernel does all for a group; or sums over chunks of it alone; or what follows from such sums, for a chunk.
_WHOLE, _SUMS, _REST = (tl.constexpr(stage) for stage in range(3))


@triton.jit
def _range(i_k, chunk, channels, S, STAGE: tl.constexpr, ACROSS: tl.constexpr):
    """The first and last channel and position of a chunk, or of the whole group."""
    c_begin = i_k * 0
    s_begin = i_k * 0
    c_end = c_begin + channels
    s_end = s_begin + S
    if STAGE != _WHOLE:
        if ACROSS:
            s_begin = i_k * chunk
            s_end = tl.minimum(s_begin + chunk, S)
        else:
            c_begin = i_k * chunk
            c_end = tl.minimum(c_begin + chunk, channels)
    return c_begin, c_end, s_begin, s_end


@triton.jit
def _total(p_sums, chunks, BLOCK_K: tl.constexpr):
    """Of a sum over every chunk."""
    o_k = tl.arange(0, BLOCK_K)
    return tl.sum(tl.load(p_sums + o_k, mask=o_k < chunks, other=0), 0)


@triton.jit
def norm_fwd_kernel(
    p_x,  # [N, C, S]
    p_weight,  # [C]
    p_bias,  # [C]
    p_out,  # [N, C, S]
    p_mean,  # [N, groups]
    p_rstd,  # [N, groups]
    p_sums,  # [N, groups, 2, chunks]: Σ x of a chunk, and Σ (x − its mean)²
    C,
    S,
    channels,
    stride_c,
    stride_s,
    chunk,
    chunks,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGE: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """γ n(x) + β, μ and r."""
    groups = C // channels
    i_ng = tl.program_id(0) // chunks
    i_k = tl.program_id(0) % chunks
    i_n = i_ng // groups
    i_g = i_ng % groups
    # 64 bits from here: a batch may pass 2^31 elements.
    base = i_n.to(tl.int64) * C * S + i_g * channels * stride_c
    p_sums += i_ng * 2 * chunks
    c_begin, c_end, s_begin, s_end = _range(i_k, chunk, channels, S, STAGE, ACROSS)

    if STAGE != _REST:
        size = tl.full([], 1, COMPUTE) * (c_end - c_begin) * (s_end - s_begin)
        b_sum = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
        for i_c in range(c_begin, c_end, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)[:, None]
            for i_s in range(s_begin, s_end, BLOCK_S):
                o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
                m = (o_c < c_end) & (o_s < s_end)
                b_sum += tl.load(p_x + base + o_c * stride_c + o_s * stride_s, mask=m, other=0).to(COMPUTE)
        total = tl.sum(tl.sum(b_sum, 1), 0)
        mean = total / size

        b_square = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
        for i_c in range(c_begin, c_end, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)[:, None]
            for i_s in range(s_begin, s_end, BLOCK_S):
                o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
                m = (o_c < c_end) & (o_s < s_end)
                b_x = tl.load(p_x + base + o_c * stride_c + o_s * stride_s, mask=m, other=0).to(COMPUTE)
                b_x = tl.where(m, b_x - mean, 0)
                b_square += b_x * b_x
        squares = tl.sum(tl.sum(b_square, 1), 0)
        if STAGE == _SUMS:
            tl.store(p_sums + i_k, total)
            tl.store(p_sums + chunks + i_k, squares)
    else:
        # Chan, Golub and LeVeque (1979): squares around the chunks' means, and of these around the whole's.
        size = tl.full([], 1, COMPUTE) * channels * S
        o_k = tl.arange(0, BLOCK_K)
        b_total = tl.load(p_sums + o_k, mask=o_k < chunks, other=0)
        mean = tl.sum(b_total, 0) / size
        extent = S if ACROSS else channels
        b_length = tl.where(o_k < chunks, tl.minimum(chunk, extent - o_k * chunk), 1).to(COMPUTE)
        b_size = b_length * (size / extent)
        b_apart = tl.where(o_k < chunks, b_total / b_size - mean, 0)
        squares = _total(p_sums + chunks, chunks, BLOCK_K) + tl.sum(b_size * b_apart * b_apart, 0)

    if STAGE != _SUMS:
        rstd = 1 / tl.sqrt(squares / size + EPS)
        for i_c in range(c_begin, c_end, BLOCK_C):
            o_w = i_c + tl.arange(0, BLOCK_C)
            b_scale = tl.full([BLOCK_C], 1, COMPUTE) * rstd
            b_shift = tl.zeros([BLOCK_C], COMPUTE)
            if WEIGHT:
                b_scale *= tl.load(p_weight + i_g * channels + o_w, mask=o_w < c_end, other=0).to(COMPUTE)
            if BIAS:
                b_shift += tl.load(p_bias + i_g * channels + o_w, mask=o_w < c_end, other=0).to(COMPUTE)
            o_c = o_w[:, None]
            for i_s in range(s_begin, s_end, BLOCK_S):
                o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
                m = (o_c < c_end) & (o_s < s_end)
                o = base + o_c * stride_c + o_s * stride_s
                b_x = tl.load(p_x + o, mask=m, other=0).to(COMPUTE)
                b_y = (b_x - mean) * b_scale[:, None] + b_shift[:, None]
                tl.store(p_out + o, b_y.to(p_out.dtype.element_ty), mask=m)
        tl.store(p_mean + i_ng, mean, mask=i_k == 0)
        tl.store(p_rstd + i_ng, rstd, mask=i_k == 0)


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
    p_sums,  # [N, groups, 7, chunks]
    N,
    C,
    S,
    channels,
    stride_c,
    stride_s,
    samples,
    chunk,
    chunks,
    TANGENT: tl.constexpr,
    COTANGENT: tl.constexpr,
    BETA: tl.constexpr,
    WEIGHT: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGE: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """J γβ where there is a ``BETA``, plus ∂⟨δ, γ J t⟩/∂x where there is a ``COTANGENT``; else γ J t."""
    groups = C // channels
    i_p = tl.program_id(0) // chunks // groups
    i_g = tl.program_id(0) // chunks % groups
    i_k = tl.program_id(0) % chunks
    c_begin, c_end, s_begin, s_end = _range(i_k, chunk, channels, S, STAGE, ACROSS)
    size = tl.full([], 1, COMPUTE) * channels * S
    # Chunks across positions have parts of the same channels, each its own.
    parts = chunks if ACROSS else 1
    i_part = i_k if ACROSS else 0

    for i in range(samples):
        i_n = i_p * samples + i
        alive = i_n < N
        # 64 bits from here: a batch may pass 2^31 elements.
        base = i_n.to(tl.int64) * C * S + i_g * channels * stride_c
        mean = tl.load(p_mean + i_n * groups + i_g, mask=alive, other=0).to(COMPUTE)
        rstd = tl.load(p_rstd + i_n * groups + i_g, mask=alive, other=0).to(COMPUTE)

        if STAGE != _REST and (OUT or COTANGENT):
            b_t = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_tn = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_u = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_un = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_ut = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_b = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            b_bn = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
            for i_c in range(c_begin, c_end, BLOCK_C):
                o_w = i_c + tl.arange(0, BLOCK_C)
                b_w = tl.full([BLOCK_C], 1, COMPUTE)
                if WEIGHT:
                    b_w = tl.load(p_weight + i_g * channels + o_w, mask=o_w < c_end, other=0).to(COMPUTE)
                o_c = o_w[:, None]
                for i_s in range(s_begin, s_end, BLOCK_S):
                    o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
                    m = (o_c < c_end) & (o_s < s_end) & alive
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
            ut = tl.sum(tl.sum(b_ut, 1), 0) / size
            b_mean = tl.sum(tl.sum(b_b, 1), 0) / size
            bn = tl.sum(tl.sum(b_bn, 1), 0) / size
        p_own = p_sums + (i_n * groups + i_g) * 7 * chunks
        if STAGE == _SUMS:
            tl.store(p_own + i_k, t)
            tl.store(p_own + chunks + i_k, tn)
            tl.store(p_own + 2 * chunks + i_k, u_mean)
            tl.store(p_own + 3 * chunks + i_k, un)
            tl.store(p_own + 4 * chunks + i_k, ut)
            tl.store(p_own + 5 * chunks + i_k, b_mean)
            tl.store(p_own + 6 * chunks + i_k, bn)
        if STAGE == _REST and (OUT or COTANGENT):
            t = _total(p_own, chunks, BLOCK_K)
            tn = _total(p_own + chunks, chunks, BLOCK_K)
            u_mean = _total(p_own + 2 * chunks, chunks, BLOCK_K)
            un = _total(p_own + 3 * chunks, chunks, BLOCK_K)
            ut = _total(p_own + 4 * chunks, chunks, BLOCK_K)
            b_mean = _total(p_own + 5 * chunks, chunks, BLOCK_K)
            bn = _total(p_own + 6 * chunks, chunks, BLOCK_K)
        if STAGE != _SUMS and (OUT or COTANGENT):
            spread = ut - u_mean * t - un * tn

        if STAGE != _SUMS:
            for i_c in range(c_begin, c_end, BLOCK_C):
                o_w = i_c + tl.arange(0, BLOCK_C)
                b_w = tl.full([BLOCK_C], 1, COMPUTE)
                if WEIGHT:
                    b_w = tl.load(p_weight + i_g * channels + o_w, mask=o_w < c_end, other=0).to(COMPUTE)
                o_c = o_w[:, None]
                b_scale = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
                b_shift = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
                for i_s in range(s_begin, s_end, BLOCK_S):
                    o_s = i_s + tl.arange(0, BLOCK_S)[None, :]
                    m = (o_c < c_end) & (o_s < s_end) & alive
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
                    o = (i_p.to(tl.int64) * parts + i_part) * 2 * C + i_g * channels + o_w
                    m_c = o_w < c_end
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


def _cut(programs: int, channels: int, S: int, last: bool) -> dict[str, int | bool]:
    """Where groups are few and large, chunks of them: along what has more blocks, positions or channels."""
    blocks = _blocks(channels, S, last)
    across = triton.cdiv(S, blocks["BLOCK_S"]) >= triton.cdiv(channels, blocks["BLOCK_C"])
    extent, block = (S, blocks["BLOCK_S"]) if across else (channels, blocks["BLOCK_C"])
    wanted = triton.cdiv(_ENOUGH, programs)
    if wanted == 1 or channels * S < 4 * _TILE:
        return {"chunk": extent, "chunks": 1, "ACROSS": False, "BLOCK_K": 1}
    chunk = triton.cdiv(triton.cdiv(extent, block), wanted) * block
    chunks = triton.cdiv(extent, chunk)
    return {"chunk": chunk, "chunks": chunks, "ACROSS": across, "BLOCK_K": triton.next_power_of_2(chunks)}


def _stages(cut: dict[str, int | bool], sums: bool = True) -> list[int]:
    return [_WHOLE.value] if cut["chunks"] == 1 else [_SUMS.value, _REST.value] if sums else [_REST.value]


def _forward_warps(stage: int) -> int:
    return 4 if stage == _SUMS.value else 16


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
    programs = x.shape[0] * groups
    cut = _cut(programs, C // groups, S, last)
    sums = mean.new_empty(programs, 2, cut["chunks"]) if cut["chunks"] > 1 else mean
    for stage in _stages(cut):
        norm_fwd_kernel[(programs * cut["chunks"],)](
            x, weight, bias, out, mean, rstd, sums, C, S, C // groups, stride_c, stride_s,
            EPS=eps, WEIGHT=weight is not None, BIAS=bias is not None, COMPUTE=_compute(x),
            **_blocks(C // groups, S, last), STAGE=stage, **cut, num_warps=_forward_warps(stage),
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
    cut = _cut(programs * groups, C // groups, S, last)
    parts = mean.new_empty(programs * (cut["chunks"] if cut["ACROSS"] else 1), 2, C) if shares else None
    sums = mean.new_empty(N * groups, 7, cut["chunks"]) if cut["chunks"] > 1 else mean
    for stage in _stages(cut, sums=out is not None or cotangent is not None):
        norm_second_order_kernel[(programs * groups * cut["chunks"],)](
            tangent, cotangent, beta, x, mean, rstd, weight, out, parts, sums,
            N, C, S, C // groups, stride_c, stride_s, samples,
            TANGENT=tangent is not None, COTANGENT=cotangent is not None, BETA=beta is not None,
            WEIGHT=weight is not None, OUT=out is not None, PARTS=shares, COMPUTE=_compute(x),
            **_blocks(C // groups, S, last), STAGE=stage, **cut, num_warps=8,
        )  # fmt: skip
    if parts is None:
        return None
    # Not views of one sum: what an operator returns must not share memory.
    return parts[:, 0].sum(0), parts[:, 1].sum(0)


def _specialisation(
    name: str,
    dtype: str,
    block: tuple[int, int],
    *,
    operands: str,
    weight: bool,
    out: bool,
    parts: bool,
    stage: int = _WHOLE.value,
) -> Specialisation:
    given = {"p_tangent": "t" in operands, "p_cotangent": "d" in operands, "p_beta": "b" in operands}
    pointers = {**{n: dtype for n, there in given.items() if there}, "p_x": dtype, "p_mean": "fp32", "p_rstd": "fp32"}
    pointers |= {"p_weight": "fp32"} if weight else {}
    pointers |= {"p_out": dtype} if out else {}
    pointers |= {"p_parts": "fp32"} if parts else {}
    pointers |= {"p_sums": "fp32"}
    last = block[0] > block[1]
    strides = {"stride_c": 1} if last else {"stride_s": 1}
    integers = ["N", "C", "S", "channels", "stride_s" if last else "stride_c"]
    absent = {n for n in ("p_tangent", "p_cotangent", "p_beta", "p_weight", "p_out", "p_parts") if n not in pointers}
    return Specialisation(
        name,
        norm_second_order_kernel,
        {n: f"*{t}" for n, t in pointers.items()} | {n: "i32:16" for n in integers} | _cut_arguments(stage),
        {
            **dict.fromkeys(absent),
            **_cut_constants(stage),
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


def _cut_arguments(stage: int) -> dict[str, str]:
    return {} if stage == _WHOLE.value else {"chunk": "i32:16", "chunks": "i32"}


def _cut_constants(stage: int) -> dict[str, int | bool]:
    if stage == _WHOLE.value:
        return {"STAGE": stage, "chunk": 1, "chunks": 1, "ACROSS": False, "BLOCK_K": 1}
    return {"STAGE": stage, "ACROSS": True, "BLOCK_K": 16}


def _forward_specialisation(name: str, dtype: str, block: tuple[int, int], stage: int = _WHOLE.value) -> Specialisation:
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
            "p_sums": "*fp32",
            **{n: "i32:16" for n in integers},
            **_cut_arguments(stage),
        },
        {
            **_cut_constants(stage),
            "stride_c" if last else "stride_s": 1,
            "EPS": 1e-5,
            "WEIGHT": True,
            "BIAS": True,
            "COMPUTE": tl.float32,
            "BLOCK_C": block[0],
            "BLOCK_S": block[1],
        },
        num_warps=_forward_warps(stage),
    )


_FIRST, _LAST = (8, 256), (64, 32)
SPECIALISATIONS = [
    _forward_specialisation("float32", "fp32", _FIRST),
    _forward_specialisation("bfloat16, channels last", "bf16", _LAST),
    *[_forward_specialisation(f"float32, {stage} of 2", "fp32", _FIRST, stage) for stage in (1, 2)],
    _specialisation("vjp, float32", "fp32", _FIRST, operands="b", weight=True, out=True, parts=False),
    _specialisation("jvp, float32", "fp32", _FIRST, operands="t", weight=True, out=True, parts=False),
    _specialisation("parameters, float32", "fp32", _FIRST, operands="b", weight=False, out=False, parts=True),
    _specialisation("float32", "fp32", _FIRST, operands="td", weight=True, out=True, parts=True),
    _specialisation("with beta, float32", "fp32", _FIRST, operands="tdb", weight=True, out=True, parts=True),
    _specialisation("with beta, channels last", "fp32", _LAST, operands="tdb", weight=True, out=True, parts=True),
    _specialisation("with beta, bfloat16", "bf16", _FIRST, operands="tdb", weight=True, out=True, parts=True),
    *[
        _specialisation(
            f"with beta, float32, {stage} of 2",
            "fp32",
            _FIRST,
            operands="tdb",
            weight=True,
            out=True,
            parts=True,
            stage=stage,
        )
        for stage in (1, 2)
    ],
]
