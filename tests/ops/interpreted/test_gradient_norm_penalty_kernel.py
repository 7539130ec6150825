import math

import pytest
import torch
from torch import Tensor

from wgan_fast import reference
from wgan_fast.kernels.gradient_norm_penalty import gradient_norm_penalty, gradient_norm_penalty_backward
from wgan_fast.precision import accumulation_dtype

# Several gradients in a program, one, and the two-stage reduction above 16384 columns; blocks full and not.
SHAPES = [(1, 1), (3, 5), (63, 7), (1030, 2), (7, 2, 6, 8), (3, 1000), (2, 4097), (2, 16384), (3, 16385), (2, 40003)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTINGS = [
    {"weight": 10.0, "target": 1.0, "one_sided": False},
    {"weight": 0.1, "target": 0.75, "one_sided": True},  # no float32
    {"weight": 5.0, "target": 0.0, "one_sided": False},
]


def gradients(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Norms on both sides of 1."""
    gradient = torch.randn(shape, dtype=torch.float64)
    lengths = torch.linspace(0.4, 1.7, shape[0], dtype=torch.float64)
    norm = gradient.flatten(1).norm(dim=1)
    return (gradient * reference.per_sample(lengths / norm, gradient)).to(dtype)


def run(gradient: Tensor, groups: int | None = None, **settings: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = accumulation_dtype(gradient.dtype)
    penalty, mean_norm = torch.empty((), dtype=compute), torch.empty((), dtype=compute)
    norm = torch.empty(groups or gradient.shape[0], dtype=compute)
    seed = torch.empty_like(gradient)
    gradient_norm_penalty(gradient, penalty, mean_norm, norm, seed, **settings)
    return penalty, mean_norm, norm, seed


def truth(
    gradient: Tensor, cotangent: Tensor | None = None, group_size: int = 1, **settings: object
) -> tuple[Tensor, ...]:
    """Penalty, mean norm, norms, v and the Hessian times the cotangent, by autograd in float64."""
    x = gradient.double().requires_grad_()
    norm = reference.gradient_norm(x, group_size)
    penalty = reference.penalty_from_norm(norm, **settings)
    (seed,) = torch.autograd.grad(penalty, x, create_graph=True)
    second = None if cotangent is None else torch.autograd.grad(seed, x, cotangent.double())[0]
    return tuple(t if t is None else t.detach() for t in (penalty, norm.mean(), norm, seed, second))


def close(actual: Tensor, exact: Tensor, terms: int, scale: float | None = None) -> None:
    """Within the rounding of sums of ``terms`` in random order, √terms units, and one of the output's dtype.

    A whole unit: the interpreter rounds to bfloat16 towards 0.
    """
    compute = accumulation_dtype(actual.dtype)
    units = (16 + math.sqrt(terms)) * torch.finfo(compute).eps
    scale = exact.abs().max().item() if scale is None else scale
    rtol = units if actual.dtype == compute else torch.finfo(actual.dtype).eps + units
    # float16 is exact to a fixed distance where it is subnormal.
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=units * scale + smallest)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula(dtype: torch.dtype, shape: tuple[int, ...], settings: dict[str, object]) -> None:
    gradient = gradients(shape, dtype)
    outputs = run(gradient, **settings)
    for actual, exact in zip(outputs, truth(gradient, **settings)):
        close(actual, exact, gradient.numel())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_the_second_derivative_equals_autograds(
    dtype: torch.dtype, shape: tuple[int, ...], settings: dict[str, object]
) -> None:
    gradient, cotangent = gradients(shape, dtype), torch.randn(shape).to(dtype)
    norm = run(gradient, **settings)[2]
    out = torch.empty_like(gradient)
    gradient_norm_penalty_backward(gradient, norm, cotangent, out, **settings)
    # Its two summands may cancel: of the size of the larger.
    scale = 2 * settings["weight"] / shape[0] * 2 * cotangent.double().flatten(1).norm(dim=1).max().item()
    close(out, truth(gradient, cotangent, **settings)[4], gradient.numel(), scale)


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_a_group_shares_one_norm(group_size: int) -> None:
    gradient = gradients((6, 5, 3), torch.float32)
    groups = 6 // group_size
    outputs = run(gradient, groups, **SETTINGS[1])
    for actual, exact in zip(outputs, truth(gradient, group_size=group_size, **SETTINGS[1])):
        close(actual, exact, gradient.numel())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("columns", [5, 16400])
def test_a_zero_gradient_has_a_zero_seed(columns: int, settings: dict[str, object]) -> None:
    gradient = torch.zeros(3, columns)
    gradient[1, :2] = torch.tensor([3.0, 4.0])
    penalty, mean_norm, norm, seed = run(gradient, **settings)
    assert norm.tolist() == [0, 5, 0]
    assert mean_norm.item() == pytest.approx(5 / 3)
    free = 0 if settings["one_sided"] else 2 * settings["target"] ** 2
    assert penalty.item() == pytest.approx(settings["weight"] / 3 * ((5 - settings["target"]) ** 2 + free))
    assert (seed[[0, 2]] == 0).all()
    assert seed[1].abs().sum() > 0
    out = torch.empty_like(gradient)
    gradient_norm_penalty_backward(gradient, norm, torch.ones_like(gradient), out, **settings)
    assert out.isfinite().all()


@pytest.mark.parametrize("columns", [5, 16400])
@pytest.mark.parametrize("one_sided", [False, True])
def test_nan_passes_and_stays_in_its_row(one_sided: bool, columns: int) -> None:
    gradient = torch.ones(3, columns)
    gradient[1, 2] = torch.nan
    penalty, mean_norm, norm, seed = run(gradient, weight=1.0, target=1.0, one_sided=one_sided)
    assert penalty.isnan()
    assert mean_norm.isnan()
    assert norm.isnan().tolist() == [False, True, False]
    assert seed[1].isnan().all()
    assert seed[[0, 2]].isfinite().all()


@pytest.mark.parametrize("columns", [5, 16400])
def test_a_norm_past_float32_is_infinite_and_its_seed_nan(columns: int) -> None:
    gradient = torch.ones(3, columns)
    gradient[1] = 1e19
    penalty, _, norm, seed = run(gradient, weight=1.0, target=1.0, one_sided=False)
    assert penalty == norm[1] == torch.inf
    assert seed[1].isnan().all()


def test_an_unaligned_start_is_read_and_nothing_beside_the_seed_is_written() -> None:
    for columns in (7, 16401):
        gradient, buffer = gradients((4, columns), torch.float32)[1:], torch.full((5, columns), 9.0)
        empty = torch.empty(()), torch.empty(()), torch.empty(3)
        gradient_norm_penalty(gradient, *empty, buffer[1:4], **SETTINGS[0])
        close(buffer[1:4], truth(gradient, **SETTINGS[0])[3], gradient.numel())
        assert (buffer[[0, 4]] == 9).all()
