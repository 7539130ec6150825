"""The operators of a normalisation: what autograd gives for group_norm, in every layout and dtype, in one read."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wgan_fast.ops import normalization

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
NAMES = ["vjp", "jvp", "parameters", "second_order"]
# What the dispatcher runs here, and what it runs where no compiled code is.
IMPLEMENTATIONS = [
    pytest.param({name: getattr(torch.ops.wgan_fast, f"norm_{name}") for name in NAMES}, id="operator"),
    pytest.param({name: getattr(normalization, name) for name in NAMES}, id="plain"),
]
# Layer norm, one channel per group, positions below, at and above a vector, more samples than parts of a sum.
CASES = [
    ((3, 6, 7, 5), 3),
    ((5, 4, 16, 16), 1),
    ((2, 8, 4, 4), 8),
    ((3, 63), 1),
    ((7, 10), 5),
    ((2, 6, 3, 2, 5), 2),
    ((70, 4, 3), 2),
    ((2, 1, 4, 5), 1),
    ((1, 1000), 1),
]


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last" and x.dim() > 3:
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x[:, :, None].expand(*x.shape[:2], 2, *x.shape[2:])[:, :, 1] if layout == "strided" else x


class Case:
    """Operands of every operator, and what autograd makes of them."""

    def __init__(self, shape: tuple[int, ...], groups: int, affine: bool = True, offset: float = 1.0) -> None:
        torch.manual_seed(0)
        self.groups = groups
        self.delta, self.t, self.beta = torch.randn(3, *shape, dtype=torch.float64).unbind()
        self.x = torch.randn(shape, dtype=torch.float64) + offset
        self.weight = torch.randn(shape[1], dtype=torch.float64) if affine else None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        """Rounded; in float64 again, it is the exact problem that the rounded one poses."""
        made = object.__new__(Case)
        for name, value in vars(self).items():
            setattr(made, name, value.to(device, dtype) if isinstance(value, Tensor) else value)
        return made

    def run(
        self, functions: dict[str, Callable], layouts: tuple[str, str] = ("contiguous", "contiguous")
    ) -> dict[str, Tensor]:
        x, (delta, t, beta) = (
            laid_out(self.x, layouts[0]),
            (laid_out(v, layouts[1]) for v in (self.delta, self.t, self.beta)),
        )
        _, mean, rstd = torch.ops.wgan_fast.norm_forward(x, None, None, self.groups, 1e-5)
        statistics = x, mean, rstd
        scale, shift = functions["parameters"](delta, *statistics, self.groups)
        alone = functions["second_order"](t, delta, None, *statistics, self.weight, self.groups)
        joint = functions["second_order"](t, delta, beta, *statistics, self.weight, self.groups)
        return {
            "vjp": functions["vjp"](delta, *statistics, self.weight, self.groups),
            "jvp": functions["jvp"](t, *statistics, self.weight, self.groups),
            "scale": scale,
            "shift": shift,
            **{f"second order of {name}": out for name, out in zip(("x", "weight", "bias"), alone)},
            **{f"joint gradient of {name}": out for name, out in zip(("x", "weight", "bias"), joint)},
        }

    def autograd(self) -> dict[str, Tensor]:
        x, weight = self.x.clone().requires_grad_(), self.weight
        weight = torch.ones_like(x[0].reshape(x.shape[1], -1)[:, 0]) if weight is None else weight.clone()
        weight.requires_grad_()
        bias = torch.zeros_like(weight, requires_grad=True)
        y = F.group_norm(x, self.groups, weight, bias, 1e-5)
        dummy = torch.zeros_like(y, requires_grad=True)
        (linear,) = torch.autograd.grad(y, x, dummy, create_graph=True)
        jvp = torch.autograd.grad(linear, dummy, self.t)[0]
        vjp, scale, shift = torch.autograd.grad(y, (x, weight, bias), self.delta, create_graph=True)
        second = torch.autograd.grad(vjp, (x, weight), self.t, retain_graph=True)
        through = torch.autograd.grad(y, (x, weight, bias), self.beta)
        return {
            "vjp": vjp.detach(),
            "jvp": jvp,
            "scale": scale.detach(),
            "shift": shift.detach(),
            "second order of x": second[0],
            "second order of weight": second[1],
            "second order of bias": torch.zeros_like(shift),
            "joint gradient of x": second[0] + through[0],
            "joint gradient of weight": second[1] + through[1],
            "joint gradient of bias": through[2],
        }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("shape", "groups"), CASES)
@pytest.mark.parametrize("functions", IMPLEMENTATIONS)
def test_float64_equals_autograd(
    functions: dict[str, Callable], shape: tuple[int, ...], groups: int, affine: bool, device: str
) -> None:
    case = Case(shape, groups, affine).to(torch.float64, device)
    expected = case.autograd()
    for layouts in itertools.product(["contiguous", "channels last", "strided"], repeat=2):
        actual = case.run(functions, layouts)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), [((9, 6, 17, 15), 3), ((64, 100), 1), ((5, 64, 8, 8), 1)])
@pytest.mark.parametrize("functions", IMPLEMENTATIONS)
def test_lower_precision_is_as_exact_as_autograd_in_it(
    functions: dict[str, Callable], shape: tuple[int, ...], groups: int, dtype: torch.dtype, device: str
) -> None:
    case = Case(shape, groups).to(dtype, device)
    exact, theirs = case.to(torch.float64, device).autograd(), case.autograd()
    for layouts in itertools.product(["contiguous", "channels last"], repeat=2):
        for name, actual in case.run(functions, layouts).items():
            error, their_error = ((v.double() - exact[name]).norm().item() for v in (actual, theirs[name]))
            # Where PyTorch happens to be exact, two roundings of the output and of the sums are left.
            floor = 2 * (torch.finfo(actual.dtype).eps + 2**-24) * exact[name].norm().item()
            assert error <= max(2 * their_error, floor), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (2, 4, 256, 256), (2, 65536)])
def test_long_sums_are_as_exact_as_pytorch_on_contiguous_memory(
    shape: tuple[int, ...], layout: str, device: str
) -> None:
    case = Case(shape, 1).to(torch.float32, device)
    # A sum of noise is small beside its terms, and so is its exact value a poor measure of its error.
    case.delta = case.delta.abs()
    x, delta = laid_out(case.x, layout), laid_out(case.delta, layout)
    _, mean, rstd = torch.ops.wgan_fast.norm_forward(x, None, None, 1, 1e-5)
    actual = rstd, *torch.ops.wgan_fast.norm_parameters(delta, x, mean, rstd, 1)

    def pytorch(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        N, C, S, aten = *x.shape[:2], x.shape[2:].numel(), torch.ops.aten
        weight = torch.ones(C, dtype=x.dtype, device=device)
        _, mean, rstd = aten.native_group_norm(x, weight, weight, N, C, S, 1, 1e-5)
        shares = aten.native_group_norm_backward(delta, x, mean, rstd, weight, N, C, S, 1, [False, True, True])
        return rstd, *shares[1:]

    theirs, exact = pytorch(case.x, case.delta), pytorch(case.x.double(), case.delta.double())
    for ours, other, reference in zip(actual, theirs, exact):
        error, their_error = ((v.double() - reference).norm() for v in (ours, other))
        assert error <= 2 * their_error + torch.finfo(torch.float32).eps * reference.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_results_lie_in_memory_as_the_input_does(layout: str, device: str) -> None:
    case = Case((2, 6, 5, 3), 2).to(torch.float32, device)
    out = case.run(IMPLEMENTATIONS[0].values[0], (layout, "contiguous"))
    for name in ("vjp", "jvp", "second order of x", "joint gradient of x"):
        assert out[name].stride() == laid_out(case.x, layout).stride()


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_mean_costs_no_more_than_it_costs_autograd(device: str) -> None:
    case = Case((4, 8, 9, 9), 2, offset=100.0).to(torch.float32, device)
    exact, theirs = case.to(torch.float64, device).autograd(), case.autograd()
    for name, actual in case.run(IMPLEMENTATIONS[0].values[0]).items():
        error, their_error = ((v.double() - exact[name]).norm() for v in (actual, theirs[name]))
        assert error <= 2 * their_error + 2**-22 * exact[name].norm(), name


def test_sums_over_samples_do_not_depend_on_the_number_of_threads() -> None:
    case, threads = Case((131, 6, 7, 5), 3).to(torch.float32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.run(IMPLEMENTATIONS[0].values[0]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_spoils_no_other(bad: float, device: str) -> None:
    case = Case((3, 4, 5, 3), 2).to(torch.float32, device)
    clean = case.run(IMPLEMENTATIONS[0].values[0])
    case.delta[1, 2, 0, 0] = bad
    spoilt = case.run(IMPLEMENTATIONS[0].values[0])
    for name in ("vjp", "second order of x", "joint gradient of x"):
        assert not spoilt[name][1].isfinite().all()
        assert torch.equal(spoilt[name][[0, 2]], clean[name][[0, 2]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (3, 6)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_opcheck(layout: str, shape: tuple[int, ...], device: str) -> None:
    ops, case = torch.ops.wgan_fast, Case(shape, 2).to(torch.float32, device)
    x = laid_out(case.x, layout)
    _, mean, rstd = ops.norm_forward(x, case.weight, None, 2, 1e-5)
    torch.library.opcheck(ops.norm_forward, (x, case.weight, case.weight, 2, 1e-5))
    for weight in (case.weight, None):
        torch.library.opcheck(ops.norm_vjp, (case.delta, x, mean, rstd, weight, 2))
        torch.library.opcheck(ops.norm_jvp, (case.t, x, mean, rstd, weight, 2))
        for beta in (case.beta, None):
            torch.library.opcheck(ops.norm_second_order, (case.t, case.delta, beta, x, mean, rstd, weight, 2))
    torch.library.opcheck(ops.norm_parameters, (case.delta, x, mean, rstd, 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_forward_equals_group_norm(shape: tuple[int, ...], groups: int, device: str) -> None:
    case = Case(shape, groups).to(torch.float64, device)
    out, mean, rstd = torch.ops.wgan_fast.norm_forward(case.x, case.weight, case.weight, groups, 1e-5)
    torch.testing.assert_close(out, F.group_norm(case.x, groups, case.weight, case.weight), rtol=1e-12, atol=1e-12)
    rows = case.x.reshape(shape[0], groups, -1)
    torch.testing.assert_close(mean, rows.mean(2))
    torch.testing.assert_close(rstd, (rows.var(2, correction=0) + 1e-5).rsqrt())
