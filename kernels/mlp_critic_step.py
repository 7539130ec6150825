"""A whole critic step of a narrow MLP on a GPU: passes 1 to 3 in one kernel, pass 4 in a second.

A program of the first takes some rows of one batch (real, fake or points) through every layer and back; what it writes
down for the second, activations or tangents and cotangents, is also what it reads itself in the next layer, from the
cache. All gradients of the weights at once would not fit on chip beside them: at width 128 one takes 64 KiB of
registers, a quarter of a multiprocessor's. So the second kernel is one product over all rows for each layer, in parts
of the rows that are summed in a fixed order. ``wgan_fast.mlp_critic_step`` has the plain form.

Parameters and their gradients are one vector: weight ``[H, D]``, bias ``[H]``, then ``[H, H]`` and ``[H]`` for every
further hidden layer, then ``[1, H]`` and ``[1]``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialisation import Specialisation

_BLOCK = 64
"""Side of the block of a weight's gradient that a program of the second kernel holds."""
_PARTS = 32
"""Parts of the rows at most."""


@triton.jit
def _product(
    p_a,  # [rows, K]
    p_w,
    o_n,  # [BLOCK_N]
    m_n,  # [BLOCK_N]
    K,
    J,
    stride_k,
    stride_j,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Rows of a matrix times w, [BLOCK_N, BLOCK_J]."""
    o_j = tl.arange(0, BLOCK_J)
    b_sum = tl.zeros([BLOCK_N, BLOCK_J], SUM)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_a = tl.load(p_a + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & (o_k[None, :] < K), other=0)
        m_w = (o_k[:, None] < K) & (o_j[None, :] < J)
        b_w = tl.load(p_w + o_k[:, None] * stride_k + o_j[None, :] * stride_j, mask=m_w, other=0)
        b_sum = tl.dot(b_a.to(DOT), b_w.to(DOT), b_sum, input_precision=PRECISION, out_dtype=SUM)
    return b_sum


@triton.jit
def mlp_critic_step_rows_kernel(
    p_real,  # [N, D]
    p_fake,  # [N, D]
    p_alpha,  # [N]
    p_parameters,
    p_x,  # [3N, D]: real, fake, v
    p_a,  # [LAYERS, 3N, H]: activations of real and fake, tangents
    p_delta,  # [LAYERS, 3N, H]
    p_norm,  # [N]
    p_figures,  # [tiles, 4]: shares of both mean scores, the penalty, the mean norm
    N,
    D,
    H,
    LAYERS: tl.constexpr,
    SLOPE: tl.constexpr,
    WEIGHT: tl.constexpr,
    TARGET: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Scores, activations, cotangents, and for the points norms and tangents."""
    i_t = tl.program_id(0)
    i_b = tl.program_id(1)
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_t * BLOCK_N + o_n < N
    # 64 bits, because activations may pass 2^31 elements; from the first row on 32 do.
    first = i_b.to(tl.int64) * N + i_t * BLOCK_N
    o_d = tl.arange(0, BLOCK_D)
    o_h = tl.arange(0, BLOCK_H)
    m_d = m_n[:, None] & (o_d[None, :] < D)
    m_h = m_n[:, None] & (o_h[None, :] < H)
    size = tl.cast(N, tl.int64) * 3 * H
    p_x += first * D
    p_a += first * H
    p_delta += first * H
    p_alpha += i_t * BLOCK_N
    p_norm += i_t * BLOCK_N
    p_real += i_t.to(tl.int64) * BLOCK_N * D
    p_fake += i_t.to(tl.int64) * BLOCK_N * D
    o_x = o_n[:, None] * D + o_d[None, :]
    o_a = o_n[:, None] * H + o_h[None, :]
    inner = H * D + H
    one = tl.full([], 1.0, SUM)
    each = one / N

    b_real = tl.load(p_real + o_x, mask=m_d & (i_b != 1), other=0).to(SUM)
    b_fake = tl.load(p_fake + o_x, mask=m_d & (i_b != 0), other=0).to(SUM)
    b_alpha = tl.load(p_alpha + o_n, mask=m_n, other=0).to(SUM)[:, None]
    b_alpha = tl.where(i_b == 0, 1.0, tl.where(i_b == 1, 0.0, b_alpha))
    near_fake = b_alpha < 0.5
    b_step = tl.where(near_fake, b_alpha, b_alpha - 1) * (b_real - b_fake)
    b_x = tl.where(near_fake, b_fake, b_real) + b_step
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_d)
    tl.debug_barrier()

    b_a = _product(p_x, p_parameters, o_n, m_n, D, H, 1, D, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_H)
    b_a += tl.load(p_parameters + H * D + o_h, mask=o_h < H, other=0).to(SUM)[None, :]
    b_a = tl.where(b_a > 0, b_a, b_a * SLOPE)
    tl.store(p_a + o_a, b_a.to(p_a.dtype.element_ty), mask=m_h)
    for layer in range(1, LAYERS):
        tl.debug_barrier()
        p_w = p_parameters + inner + (layer - 1) * (H * H + H)
        p_in = p_a + (layer - 1) * size
        b_a = _product(p_in, p_w, o_n, m_n, H, H, 1, H, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_H)
        b_a += tl.load(p_w + H * H + o_h, mask=o_h < H, other=0).to(SUM)[None, :]
        b_a = tl.where(b_a > 0, b_a, b_a * SLOPE)
        tl.store(p_a + layer * size + o_a, b_a.to(p_a.dtype.element_ty), mask=m_h)

    p_last = p_parameters + inner + (LAYERS - 1) * (H * H + H)
    b_last = tl.load(p_last + o_h, mask=o_h < H, other=0).to(SUM)
    bias = tl.load(p_last + H).to(SUM)
    b_score = tl.sum(b_a * b_last[None, :], 1) + bias
    score = tl.sum(tl.where(m_n, b_score, 0), 0) * each

    seed = tl.where(i_b == 2, one, tl.where(i_b == 0, -each, each))
    b_delta = seed * b_last[None, :]
    b_delta = tl.where(b_a > 0, b_delta, b_delta * SLOPE)
    tl.store(p_delta + (LAYERS - 1) * size + o_a, b_delta.to(p_delta.dtype.element_ty), mask=m_h)
    for layer in range(LAYERS - 1, 0, -1):
        tl.debug_barrier()
        p_w = p_parameters + inner + (layer - 1) * (H * H + H)
        p_in = p_delta + layer * size
        b_delta = _product(p_in, p_w, o_n, m_n, H, H, H, 1, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_H)
        b_before = tl.load(p_a + (layer - 1) * size + o_a, mask=m_h, other=0)
        b_delta = tl.where(b_before > 0, b_delta, b_delta * SLOPE)
        tl.store(p_delta + (layer - 1) * size + o_a, b_delta.to(p_delta.dtype.element_ty), mask=m_h)

    if i_b != 2:
        tl.store(p_figures + i_t * 4 + i_b, score)
    else:
        tl.debug_barrier()
        b_g = _product(p_delta, p_parameters, o_n, m_n, H, D, D, 1, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D)
        b_norm = tl.sqrt(tl.sum(b_g * b_g, 1))
        b_excess = b_norm - TARGET
        if ONE_SIDED:
            b_excess = tl.where(b_excess < 0, 0, b_excess)
        tl.store(p_norm + o_n, b_norm, mask=m_n)
        penalty = tl.sum(tl.where(m_n, b_excess * b_excess, 0), 0) * (WEIGHT * each)
        tl.store(p_figures + i_t * 4 + 2, penalty)
        tl.store(p_figures + i_t * 4 + 3, tl.sum(tl.where(m_n, b_norm, 0), 0) * each)
        # Where the norm is 0 so is g, whatever it is multiplied by.
        b_factor = tl.where(b_norm == 0, 0, b_excess / b_norm) * (2 * (WEIGHT * each))
        tl.store(p_x + o_x, (b_g * b_factor[:, None]).to(p_x.dtype.element_ty), mask=m_d)
        tl.debug_barrier()
        b_t = _product(p_x, p_parameters, o_n, m_n, D, H, 1, D, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_H)
        b_before = tl.load(p_a + o_a, mask=m_h, other=0)
        b_t = tl.where(b_before > 0, b_t, b_t * SLOPE)
        tl.store(p_a + o_a, b_t.to(p_a.dtype.element_ty), mask=m_h)
        for layer in range(1, LAYERS):
            tl.debug_barrier()
            p_w = p_parameters + inner + (layer - 1) * (H * H + H)
            p_in = p_a + (layer - 1) * size
            b_t = _product(p_in, p_w, o_n, m_n, H, H, 1, H, DOT, SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_H)
            b_before = tl.load(p_a + layer * size + o_a, mask=m_h, other=0)
            b_t = tl.where(b_before > 0, b_t, b_t * SLOPE)
            tl.store(p_a + layer * size + o_a, b_t.to(p_a.dtype.element_ty), mask=m_h)


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


def _blocks(D: int, H: int) -> dict[str, int]:
    """As many rows and columns at a time as registers hold; tensor cores want 16 of everything."""
    return {
        "BLOCK_N": 64 if H <= 64 else 32,
        "BLOCK_K": 16,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_H": max(16, triton.next_power_of_2(H)),
    }


def mlp_critic_step(
    real: Tensor,
    fake: Tensor,
    alpha: Tensor,
    parameters: Tensor,
    H: int,
    layers: int,
    negative_slope: float,
    weight: float,
    target: float,
    one_sided: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the four passes.

    Args:
        real: x ``[N, D]``, contiguous; float32, or float64 where the interpreter runs.
        fake: x̃ ``[N, D]``, likewise.
        alpha: α ``[N]``.
        parameters: One vector of them all, in the order of this module.
        H: Width of the hidden layers.
        layers: How many there are.
        negative_slope: Of the activation; 0 for ReLU.
        weight: The penalty's.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
        precision: "fp32", "tf32" or "bf16": how products are taken; sums are float32.

    Returns:
        ``[4]``: mean scores of real and fake, penalty, mean norm; the norms ``[N]``; the gradient of ``parameters``.
    """
    N, D = real.shape
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
    blocks = _blocks(D, H)
    tiles = triton.cdiv(N, blocks["BLOCK_N"])
    figures = real.new_zeros(tiles, 4)
    mlp_critic_step_rows_kernel[(tiles, 3)](
        real, fake, alpha, parameters, x, a, delta, norm, figures, N, D, H,
        SLOPE=negative_slope, WEIGHT=weight, TARGET=target, ONE_SIDED=one_sided, **settings, **blocks, num_warps=8,
    )  # fmt: skip
    count = min(_PARTS, triton.cdiv(3 * N, 4 * _BLOCK))
    share = triton.cdiv(3 * N, count)
    parts = parameters.new_empty(count, parameters.numel())
    sides = triton.cdiv(max(H, D), _BLOCK)
    mlp_critic_step_weights_kernel[(sides * sides, layers + 1, count)](
        x, a, delta, parts, N, D, H, parameters.numel(), share, **settings, BLOCK_R=32, BLOCK=_BLOCK, num_warps=4
    )
    return figures.sum(0), norm, parts.sum(0)


def _specialisations(name: str, D: int, H: int, layers: int, kept: str, precision: str) -> list[Specialisation]:
    shared = {
        "LAYERS": layers,
        "DOT": tl.bfloat16 if kept == "bf16" else tl.float32,
        "SUM": tl.float32,
        "PRECISION": precision,
    }
    buffers = {"p_x": f"*{kept}", "p_a": f"*{kept}", "p_delta": f"*{kept}"}
    rows = {f"p_{n}": "*fp32" for n in ("real", "fake", "alpha", "parameters")}
    rows |= buffers | {"p_norm": "*fp32", "p_figures": "*fp32"}
    rows |= {"N": "i32:16", "D": "i32" if D % 16 else "i32:16", "H": "i32:16"}
    penalty = {"SLOPE": 0.2, "WEIGHT": 10.0, "TARGET": 1.0, "ONE_SIDED": False}
    weights = {**buffers, "p_parts": "*fp32", **{n: rows[n] for n in ("N", "D", "H")}}
    weights |= {"parameters": "i32", "share": "i32:16"}
    blocks = {**shared, "BLOCK_R": 32, "BLOCK": _BLOCK}
    return [
        Specialisation(name, mlp_critic_step_rows_kernel, rows, {**shared, **penalty, **_blocks(D, H)}, num_warps=8),
        Specialisation(name, mlp_critic_step_weights_kernel, weights, blocks, num_warps=4),
    ]


SPECIALISATIONS = _specialisations("float32, width 64", 32, 64, 2, "fp32", "ieee")
