import pytest
import torch
from torch import Tensor

from wgan_fast.kernels import normalization as kernel
from wgan_fast.ops import normalization as plain
from wgan_fast.ops.registry import launch_on

# One tile and several, layer norm, one channel per group, several groups; channels last or not, affine or not.
CASES = [
    ((2, 6, 7, 5), 3, False, True),
    ((2, 6, 7, 5), 3, True, True),
    ((1, 2, 35, 40), 1, False, True),
    ((1, 40, 8, 8), 1, True, False),
    ((1, 4, 3, 3), 4, False, False),
    ((2, 63), 1, True, True),
    ((2, 30), 5, True, False),
]
EPS = 1e-5


def operands(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for _ in range(4)]
    tensors[0] += 1
    return [t.contiguous(memory_format=torch.channels_last) if last and t.dim() == 4 else t for t in tensors]


def assert_as_exact(actual: Tensor, ours: Tensor, exact: Tensor) -> None:
    """Within twice the error of the plain form in the same dtype, and two roundings, of the float64 result."""
    floor = 2 * (torch.finfo(actual.dtype).eps + 2**-24) * exact.norm() + 1e-12
    assert (actual.double() - exact).norm() <= 2 * (ours.double() - exact).norm() + floor


# Chunks across positions and across channels, full and not.
CUT = [
    ((2, 6, 20, 21), 2, False, True),
    ((1, 6, 20, 21), 1, True, True),
    ((1, 1300), 1, True, True),
    ((2, 230, 3, 3), 1, False, False),
    ((3, 6, 15, 20), 3, False, True),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups", "last", "affine"), CUT)
def test_few_large_groups_are_cut(
    shape: tuple[int, ...], groups: int, last: bool, affine: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_TILE", 128)
    monkeypatch.setattr(kernel, "_ENOUGH", 20)
    cut = kernel._cut(shape[0] * groups, shape[1] // groups, torch.Size(shape[2:]).numel(), last or len(shape) == 2)
    assert cut["chunks"] > 1
    test_equals_the_formulas(shape, groups, last, affine, dtype)


def test_groups_that_fill_a_gpu_or_are_small_are_not_cut() -> None:
    assert kernel._cut(kernel._ENOUGH, 1000, 1000, False)["chunks"] == 1
    assert kernel._cut(1, 2, 100, False)["chunks"] == 1


def test_the_variance_of_what_lies_far_from_zero_survives_the_cut() -> None:
    x = 1000 + torch.randn(1, 4, 200, 200)
    out, (mean, rstd) = torch.empty_like(x), torch.empty(2, 1, 1)
    kernel.forward(x, None, None, 1, EPS, out, mean, rstd, last=False)
    assert kernel._cut(1, 4, 40_000, False)["chunks"] > 1
    torch.testing.assert_close(
        rstd.double(), 1 / (x.double().var(correction=0) + EPS).sqrt().view(1, 1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups", "last", "affine"), CASES)
def test_equals_the_formulas(shape: tuple[int, ...], groups: int, last: bool, affine: bool, dtype: torch.dtype) -> None:
    x, delta, t, beta = operands(shape, dtype, last)
    weight, bias = torch.randn(2, shape[1]).unbind() if affine else (None, None)

    def exactly(function, *args):
        return function(*[a.double() if isinstance(a, Tensor) else a for a in args])

    y, mean, rstd = exactly(plain.forward, x, weight, bias, groups, EPS)
    out = torch.empty_like(x)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    made = torch.empty(2, shape[0], groups, dtype=sums)
    kernel.forward(x, weight, bias, groups, EPS, out, *made, last=last)
    assert_as_exact(out, y.to(dtype), y)
    torch.testing.assert_close(made[0].double(), mean, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(made[1].double(), rstd, rtol=2e-6, atol=0)

    statistics = x, made[0], made[1]
    given = {"last": last, "out": out}
    for expected, vectors in (
        (plain.vjp, {"beta": delta}),
        (plain.jvp, {"tangent": t}),
    ):
        out.fill_(torch.nan)
        kernel.second_order(*statistics, weight, groups, **vectors, **given)
        arguments = (*vectors.values(), *statistics, weight, groups)
        assert_as_exact(out, expected(*arguments), exactly(expected, *arguments))
    arguments = (delta, *statistics, groups)
    shares = kernel.second_order(*statistics, None, groups, last=last, beta=delta, shares=True)
    for actual, ours, exact in zip(shares, plain.parameters(*arguments), exactly(plain.parameters, *arguments)):
        assert_as_exact(actual, ours, exact)
    for incoming in (None, beta):
        out.fill_(torch.nan)
        shares = kernel.second_order(
            *statistics, weight, groups, tangent=t, cotangent=delta, beta=incoming, shares=True, **given
        )
        arguments = (t, delta, incoming, *statistics, weight, groups)
        results = zip((out, *shares), plain.second_order(*arguments), exactly(plain.second_order, *arguments))
        for actual, ours, exact in results:
            assert_as_exact(actual, ours, exact)


def test_a_program_sums_over_the_samples_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_PROGRAMS", 3)
    x, delta, t, beta = operands((7, 6, 5), torch.float64, last=False)
    _, mean, rstd = plain.forward(x, None, None, 2, EPS)
    out = torch.empty_like(x)
    shares = kernel.second_order(
        x, mean, rstd, None, 2, last=False, tangent=t, cotangent=delta, beta=beta, out=out, shares=True
    )
    assert len({part.untyped_storage().data_ptr() for part in (out, *shares)}) == 3
    expected = plain.second_order(t, delta, beta, x, mean, rstd, None, 2)
    torch.testing.assert_close((out, *shares), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*overrid")
def test_the_operators_hand_every_layout_to_the_kernels() -> None:
    launch_on("CPU", *[f"norm_{name}" for name in ("forward", "vjp", "jvp", "parameters", "second_order")])
    run = torch.ops.wgan_fast
    x, delta, t, _ = operands((2, 6, 5, 3), torch.float64, last=True)
    delta, t = delta.contiguous(), torch.stack([t, t], 1)[:, 1]
    weight, bias = torch.randn(2, 6, dtype=torch.float64).unbind()
    y, mean, rstd = run.norm_forward(x, weight, bias, 2, EPS)
    torch.testing.assert_close((y, mean, rstd), plain.forward(x, weight, bias, 2, EPS), rtol=1e-10, atol=1e-12)
    assert y.stride() == x.stride()
    statistics = x, mean, rstd
    for name, arguments in {
        "vjp": (delta, *statistics, weight, 2),
        "jvp": (t, *statistics, None, 2),
        "parameters": (delta, *statistics, 2),
        "second_order": (t, delta, None, *statistics, weight, 2),
    }.items():
        actual, expected = getattr(run, f"norm_{name}")(*arguments), getattr(plain, name)(*arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
