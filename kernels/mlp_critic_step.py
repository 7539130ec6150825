"""A whole critic step of a narrow MLP on a GPU: passes 1 to 3 in one kernel, pass 4 in a second.

A program of the first takes some rows of one batch (real, fake or points) through every layer and back, some columns
of a layer at a time: what it holds does not grow with the width, and one compiled form serves every critic. What it
writes down for the second, activations or tangents and cotangents, is also what it reads itself in the next layer, from
the cache. All gradients of the weights at once would not fit on chip beside them: at width 128 one takes 64 KiB of
registers, a quarter of a multiprocessor's. So the second kernel is one product over all rows for each layer, in parts
of the rows that are summed in a fixed order. ``wgan_fast.ops.mlp_critic_step`` has the plain form.

Parameters and their gradients are one vector: weight ``[H, D]``, bias ``[H]``, then ``[H, H]`` and ``[H]`` for every
further hidden layer, then ``[1, H]`` and ``[1]``. D and H are filled up with zeros to multiples of 16, which tensor
cores and vector loads want; a unit that is not there has no activation and no cotangent.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .numbers import bits, float_of
from .specialisation import Specialisation

_ROWS = 16, 64
"""Of a program of the first kernel, least and most: tensor cores want 16 of everything."""
_BLOCK = 64
"""Columns of a program of the first kernel, and side of the block of a gradient that one of the second holds."""
_PARTS = 32
"""Parts of the rows at most."""


@triton.jit
def _layer(
    p_in,  # [rows, K]
    p_w,
    p_bias,  # [J]; None where a derivative passes
    p_gate,  # [rows, J]: activations, of the sign of what went into them; None for no activation
    p_out,  # [rows, J]
    o_n,  # [BLOCK_N]
    m_n,  # [BLOCK_N]
    K,
    J,
    stride_k,
    stride_j,
    SLOPE: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Rows of a matrix times w, and through the activation or its derivative; Σ out² of every row, [BLOCK_N]."""
    b_squares = tl.zeros([BLOCK_N], SUM)
    # The rows may be another thread's.
    tl.debug_barrier()
    for i_j in range(0, J, BLOCK_J):
        o_j = i_j + tl.arange(0, BLOCK_J)
        m_j = o_j[None, :] < J
        b_out = tl.zeros([BLOCK_N, BLOCK_J], SUM)
        for i_k in range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            b_in = tl.load(p_in + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None], other=0)
            b_w = tl.load(p_w + o_k[:, None] * stride_k + o_j[None, :] * stride_j, mask=m_j, other=0)
            b_out = tl.dot(b_in.to(DOT), b_w.to(DOT), b_out, input_precision=PRECISION, out_dtype=SUM)
        o_out = o_n[:, None] * J + o_j[None, :]
        m_out = m_n[:, None] & m_j
        if p_bias is not None:
            b_out += tl.load(p_bias + o_j, mask=o_j < J, other=0).to(SUM)[None, :]
            b_out = tl.where(b_out > 0, b_out, b_out * SLOPE)
        if p_gate is not None:
            b_gate = tl.load(p_gate + o_out, mask=m_out, other=0)
            b_out = tl.where(b_gate > 0, b_out, b_out * SLOPE)
        b_squares += tl.sum(b_out * b_out, 1)
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
    return b_squares


@triton.jit(do_not_specialize=["weight"])
def mlp_critic_step_rows_kernel(
    p_real,  # [N, columns]
    p_fake,  # [N, columns]
    p_alpha,  # [N]
    p_parameters,
    p_x,  # [3N, D]: real, fake, v
    p_a,  # [LAYERS, 3N, H]: activations of real and fake, tangents
    p_delta,  # [LAYERS, 3N, H]
    p_norm,  # [N]
    p_figures,  # [tiles, 4]: shares of both mean scores, the penalty, the mean norm
    N,
    columns,
    D,
    H,
    weight,  # its bits
    LAYERS: tl.constexpr,
    SLOPE: tl.constexpr,
    TARGET: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Scores, activations, cotangents, and for the points norms and tangents."""
    i_t = tl.program_id(0)
    i_b = tl.program_id(1)
    o_n = tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, BLOCK_J)
    m_n = i_t * BLOCK_N + o_n < N
    # 64 bits, because activations may pass 2^31 elements; from the first row on 32 do.
    first = i_b.to(tl.int64) * N + i_t * BLOCK_N
    size = tl.cast(N, tl.int64) * 3 * H
    p_x += first * D
    p_a += first * H
    p_delta += first * H
    p_alpha += i_t * BLOCK_N
    p_norm += i_t * BLOCK_N
    p_real += i_t.to(tl.int64) * BLOCK_N * columns
    p_fake += i_t.to(tl.int64) * BLOCK_N * columns
    inner = H * D + H
    one = tl.full([], 1.0, SUM)
    each = one / N

    b_alpha = tl.load(p_alpha + o_n, mask=m_n, other=0).to(SUM)[:, None]
    b_alpha = tl.where(i_b == 0, 1.0, tl.where(i_b == 1, 0.0, b_alpha))
    near_fake = b_alpha < 0.5
    for i_j in range(0, D, BLOCK_J):
        o_given = o_n[:, None] * columns + i_j + o_j[None, :]
        m_given = m_n[:, None] & (i_j + o_j[None, :] < columns)
        b_real = tl.load(p_real + o_given, mask=m_given & (i_b != 1), other=0).to(SUM)
        b_fake = tl.load(p_fake + o_given, mask=m_given & (i_b != 0), other=0).to(SUM)
        b_step = tl.where(near_fake, b_alpha, b_alpha - 1) * (b_real - b_fake)
        b_x = tl.where(near_fake, b_fake, b_real) + b_step
        o_x = o_n[:, None] * D + i_j + o_j[None, :]
        tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_n[:, None] & (i_j + o_j[None, :] < D))

    p_bias = p_parameters + H * D
    _layer(
        p_x, p_parameters, p_bias, None, p_a, o_n, m_n, D, H, 1, D,
        SLOPE, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_J,
    )  # fmt: skip
    for layer in range(1, LAYERS):
        p_w = p_parameters + inner + (layer - 1) * (H * H + H)
        p_in = p_a + (layer - 1) * size
        _layer(
            p_in, p_w, p_w + H * H, None, p_in + size, o_n, m_n, H, H, 1, H,
            SLOPE, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_J,
        )  # fmt: skip

    p_last = p_parameters + inner + (LAYERS - 1) * (H * H + H)
    seed = tl.where(i_b == 2, one, tl.where(i_b == 0, -each, each))
    b_score = tl.zeros([BLOCK_N], SUM) + tl.load(p_last + H).to(SUM)
    tl.debug_barrier()
    for i_j in range(0, H, BLOCK_J):
        o_a = (LAYERS - 1) * size + o_n[:, None] * H + i_j + o_j[None, :]
        m = m_n[:, None] & (i_j + o_j[None, :] < H)
        b_a = tl.load(p_a + o_a, mask=m, other=0).to(SUM)
        b_last = tl.load(p_last + i_j + o_j, mask=i_j + o_j < H, other=0).to(SUM)[None, :]
        b_score += tl.sum(b_a * b_last, 1)
        b_delta = tl.where(b_a > 0, seed * b_last, seed * b_last * SLOPE)
        tl.store(p_delta + o_a, b_delta.to(p_delta.dtype.element_ty), mask=m)
    score = tl.sum(tl.where(m_n, b_score, 0), 0) * each

    for layer in range(LAYERS - 1, 0, -1):
        p_w = p_parameters + inner + (layer - 1) * (H * H + H)
        p_in = p_delta + layer * size
        _layer(
            p_in, p_w, None, p_a + (layer - 1) * size, p_in - size, o_n, m_n, H, H, H, 1,
            SLOPE, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_J,
        )  # fmt: skip

    if i_b != 2:
        tl.store(p_figures + i_t * 4 + i_b, score)
    else:
        b_squares = _layer(
            p_delta, p_parameters, None, None, p_x, o_n, m_n, H, D, D, 1,
            SLOPE, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_J,
        )  # fmt: skip
        b_norm = tl.sqrt(b_squares)
        b_excess = b_norm - TARGET
        if ONE_SIDED:
            b_excess = tl.where(b_excess < 0, 0, b_excess)
        tl.store(p_norm + o_n, b_norm, mask=m_n)
        penalty = tl.sum(tl.where(m_n, b_excess * b_excess, 0), 0) * (float_of(weight, SUM) * each)
        tl.store(p_figures + i_t * 4 + 2, penalty)
        tl.store(p_figures + i_t * 4 + 3, tl.sum(tl.where(m_n, b_norm, 0), 0) * each)
        # Where the norm is 0 so is g, whatever it is multiplied by.
        b_factor = tl.where(b_norm == 0, 0, b_excess / b_norm) * (2 * (float_of(weight, SUM) * each))
        tl.debug_barrier()
        for i_j in range(0, D, BLOCK_J):
            o_x = o_n[:, None] * D + i_j + o_j[None, :]
            m = m_n[:, None] & (i_j + o_j[None, :] < D)
            b_g = tl.load(p_x + o_x, mask=m, other=0).to(SUM)
            tl.store(p_x + o_x, (b_g * b_factor[:, None]).to(p_x.dtype.element_ty), mask=m)
        _layer(
            p_x, p_parameters, None, p_a, p_a, o_n, m_n, D, H, 1, D,
            SLOPE, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_J,
        )  # fmt: skip
        for layer in range(1, LAYERS):
            p_w = p_parameters + inner + (layer - 1) * (H * H + H)
            p_in = p_a + (layer - 1) * size
            _layer(
                p_in, p_w, None, p_in + size, p_in + size, o_n, m_n, H, H, 1, H,
                SLOPE, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_J,
            )  # fmt: skip


@triton.jit
def mlp_critic_step_weights_kernel(
    p_x,  # [3N, D]
    p_a,  # [LAYERS, 3N, H]
    p_delta,  # [LAYERS, 3N, H]
    p_parts,  # [parts, parameters]
    N,
    D,
    H,
    parameters,
    share,
    LAYERS: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of δᵀ [a; t] over a part of the rows, and Σ δ over the rows of the loss."""
    blocks = tl.cdiv(tl.maximum(H, D), BLOCK)
    i_i = tl.program_id(0) // blocks
    i_j = tl.program_id(0) % blocks
    i_l = tl.program_id(1)
    i_p = tl.program_id(2)
    o_i = i_i * BLOCK + tl.arange(0, BLOCK)
    o_j = i_j * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(N, tl.int64) * 3 * H
    columns = tl.where(i_l == 0, D, H)
    p_out = p_parts + i_p.to(tl.int64) * parameters
    p_out += tl.where(i_l == 0, 0, H * D + H + (i_l - 1) * (H * H + H))
    begin = i_p * share
    end = tl.minimum(begin + share, 3 * N)

    if i_l == LAYERS:
        # The last layer: its cotangents are the seeds.
        if i_i == 0:
            one = tl.full([], 1.0, SUM)
            each = one / N
            b_sum = tl.zeros([BLOCK], SUM)
            for i_r in range(begin, end, BLOCK_R):
                o_r = i_r + tl.arange(0, BLOCK_R)
                m = (o_r[:, None] < end) & (o_j[None, :] < H)
                o = (LAYERS - 1) * size + o_r.to(tl.int64)[:, None] * H + o_j[None, :]
                b_in = tl.load(p_a + o, mask=m, other=0).to(SUM)
                b_seed = tl.where(o_r < N, -each, tl.where(o_r < 2 * N, each, one))
                b_sum += tl.sum(b_in * b_seed[:, None], 0)
            tl.store(p_out + o_j, b_sum, mask=o_j < H)
            if i_j == 0:
                # Scores of real and fake are subtracted, so their bias has no gradient.
                tl.store(p_out + H, 0.0)
    else:
        b_sum = tl.zeros([BLOCK, BLOCK], SUM)
        b_bias = tl.zeros([BLOCK], SUM)
        for i_r in range(begin, end, BLOCK_R):
            o_r = i_r + tl.arange(0, BLOCK_R)
            rows = o_r.to(tl.int64)[:, None]
            m_r = o_r[:, None] < end
            o = i_l * size + rows * H + o_i[None, :]
            b_delta = tl.load(p_delta + o, mask=m_r & (o_i[None, :] < H), other=0)
            if i_l == 0:
                b_in = tl.load(p_x + rows * D + o_j[None, :], mask=m_r & (o_j[None, :] < D), other=0)
            else:
                o = (i_l - 1) * size + rows * H + o_j[None, :]
                b_in = tl.load(p_a + o, mask=m_r & (o_j[None, :] < H), other=0)
            b_sum = tl.dot(tl.trans(b_delta).to(DOT), b_in.to(DOT), b_sum, input_precision=PRECISION, out_dtype=SUM)
            b_bias += tl.sum(tl.where(o_r[:, None] < 2 * N, b_delta.to(SUM), 0), 0)
        m = (o_i[:, None] < H) & (o_j[None, :] < columns)
        tl.store(p_out + o_i[:, None] * columns + o_j[None, :], b_sum, mask=m)
        if i_j == 0:
            tl.store(p_out + H * columns + o_i, b_bias, mask=o_i < H)


def _blocks(N: int) -> dict[str, int]:
    """Few rows for a program where many would leave multiprocessors of a large GPU idle."""
    least, most = _ROWS
    return {"BLOCK_N": most if 64 * least < N else least, "BLOCK_K": 16, "BLOCK_J": _BLOCK}


def _options(rows: int, precision: str) -> dict[str, int]:
    """What keeps the first kernel from spilling: with a third stage it does on gfx942, with half the warps on sm_80."""
    options = {"num_warps": 8 if rows == _ROWS[1] else 4, "num_stages": 2}
    # Left to itself, ptxas spills where that lets more programs run at a time.
    return options | ({"maxnreg": 255} if rows == _ROWS[0] or precision == "fp32" else {})


def mlp_critic_step(
    real: Tensor,
    fake: Tensor,
    alpha: Tensor,
    parameters: Sequence[Tensor],
    negative_slope: float,
    weight: float,
    target: float,
    one_sided: bool,
    precision: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the four passes.

    Args:
        real: x ``[N, D]``, contiguous; float32, or float64 where the interpreter runs.
        fake: x̃ ``[N, D]``, likewise.
        alpha: α ``[N]``.
        parameters: Weight and bias of every linear layer.
        negative_slope: Of the activation; 0 for ReLU.
        weight: The penalty's.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
        precision: "fp32", "tf32" or "bf16": how products are taken; sums are float32.

    Returns:
        ``[4]``: mean scores of real and fake, penalty, mean norm; the norms ``[N]``; the gradient of every parameter.
    """
    N, columns = real.shape
    layers = len(parameters) // 2 - 1
    D, H = (triton.cdiv(size, 16) * 16 for size in (columns, parameters[0].shape[0]))
    shapes = [(H, D), (H,), *[(H, H), (H,)] * (layers - 1), (1, H), (1,)]
    packed = torch.cat([_filled_up(p, shape).flatten() for p, shape in zip(parameters, shapes)])

    half = precision == "bf16"
    kept = torch.bfloat16 if half else real.dtype
    x = real.new_empty(3 * N, D, dtype=kept)
    a, delta = real.new_empty(2, layers, 3 * N, H, dtype=kept)
    norm = torch.empty_like(alpha)
    settings = {
        "LAYERS": layers,
        "DOT": tl.bfloat16 if half else tl.float64 if real.dtype == torch.float64 else tl.float32,
        "SUM": tl.float64 if real.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }
    blocks = _blocks(N)
    options = _options(blocks["BLOCK_N"], precision)
    if torch.version.hip:
        options.pop("maxnreg", None)
    tiles = triton.cdiv(N, blocks["BLOCK_N"])
    figures = real.new_empty(tiles, 4)
    mlp_critic_step_rows_kernel[(tiles, 3)](
        real, fake, alpha, packed, x, a, delta, norm, figures, N, columns, D, H, bits(weight),
        SLOPE=negative_slope, TARGET=target, ONE_SIDED=one_sided, **settings, **blocks, **options,
    )  # fmt: skip
    count = min(_PARTS, triton.cdiv(3 * N, 4 * _BLOCK))
    share = triton.cdiv(3 * N, count)
    parts = packed.new_empty(count, packed.numel())
    sides = triton.cdiv(max(H, D), _BLOCK)
    mlp_critic_step_weights_kernel[(sides * sides, layers + 1, count)](
        x, a, delta, parts, N, D, H, packed.numel(), share, **settings, BLOCK_R=32, BLOCK=_BLOCK, num_warps=4
    )
    # Copied, in one launch: what an operator returns must not share memory.
    gradients = torch._foreach_mul(parts.sum(0).split([math.prod(shape) for shape in shapes]), 1.0)
    return (
        figures.sum(0),
        norm,
        [_part(gradient.view(shape), p) for gradient, shape, p in zip(gradients, shapes, parameters)],
    )


def _filled_up(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    missing = [end for size, have in zip(reversed(shape), reversed(parameter.shape)) for end in (0, size - have)]
    return pad(parameter, missing) if any(missing) else parameter


def _part(gradient: Tensor, parameter: Tensor) -> Tensor:
    return gradient[tuple(map(slice, parameter.shape))].contiguous()


def _specialisations(
    name: str, precision: str, *, N: int = 4096, columns: str = "i32:16", layers: int = 3
) -> list[Specialisation]:
    kept = "bf16" if precision == "bf16" else "fp32"
    shared = {
        "LAYERS": layers,
        "DOT": tl.bfloat16 if precision == "bf16" else tl.float32,
        "SUM": tl.float32,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }
    buffers = {"p_x": f"*{kept}", "p_a": f"*{kept}", "p_delta": f"*{kept}"}
    rows = {f"p_{n}": "*fp32" for n in ("real", "fake", "alpha", "parameters")}
    rows |= buffers | {"p_norm": "*fp32", "p_figures": "*fp32"}
    rows |= {"N": "i32:16", "columns": columns, "D": "i32:16", "H": "i32:16", "weight": "i64"}
    penalty = {"SLOPE": 0.2, "TARGET": 1.0, "ONE_SIDED": False}
    weights = {**buffers, "p_parts": "*fp32", **{n: rows[n] for n in ("N", "D", "H")}}
    weights |= {"parameters": "i32", "share": "i32:16"}
    blocks = _blocks(N)
    constants = {**shared, **penalty, **blocks}
    options = _options(blocks["BLOCK_N"], precision)
    warps = options.pop("num_warps")
    return [
        Specialisation(name, mlp_critic_step_rows_kernel, rows, constants, warps, options),
        Specialisation(name, mlp_critic_step_weights_kernel, weights, {**shared, "BLOCK_R": 32, "BLOCK": _BLOCK}),
    ]


SPECIALISATIONS = [
    *_specialisations("float32", "fp32"),
    *_specialisations("TF32", "tf32"),
    *_specialisations("bfloat16", "bf16"),
    *_specialisations("float32, small batch", "fp32", N=256)[:1],
    *_specialisations("TF32, small batch", "tf32", N=256)[:1],
    *_specialisations("bfloat16, small batch", "bf16", N=256)[:1],
    *_specialisations("float32, odd columns", "fp32", columns="i32")[:1],
]
"""How the kernels are compiled, as data: what ``tests/kernel_resources.py`` compiles for every architecture."""
