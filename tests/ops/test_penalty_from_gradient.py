import math

import pytest
import torch
from bad_arguments import OPTION_ERRORS, Row, assert_says, rows
from textbook import LAYOUTS
from torch import Tensor

from wgan_fast import interpolate, penalty_from_gradient


def formula(gradient: Tensor, weight: float, target: float, one_sided: bool) -> float:
    """(w/N) Σ ψ(‖g_i‖₂) in Python floats."""
    total = 0.0
    for row in gradient.double().flatten(1).tolist():
        excess = math.sqrt(math.fsum(entry**2 for entry in row)) - target
        total += max(0.0, excess) ** 2 if one_sided else excess**2
    return weight * total / len(gradient)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (63, 7), (7, 2, 6, 8)])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("target", [0.0, 1.0, 2.5])
def test_equals_the_formula(shape: tuple[int, ...], target: float, one_sided: bool) -> None:
    gradient = torch.randn(shape, dtype=torch.float64)
    penalty = penalty_from_gradient(gradient, weight=3.5, target=target, one_sided=one_sided)
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(formula(gradient, 3.5, target, one_sided), rel=1e-13)


def test_defaults_are_those_of_wgan_gp() -> None:
    gradient = torch.randn(5, 3, dtype=torch.float64)
    assert penalty_from_gradient(gradient).item() == pytest.approx(formula(gradient, 10.0, 1.0, False), rel=1e-13)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_first_and_second_derivatives(target: float, one_sided: bool) -> None:
    gradient = torch.randn(5, 2, 3, dtype=torch.float64)
    lengths = torch.tensor([0.25, 0.5, 0.75, 1.5, 3.0], dtype=torch.float64)  # on both sides of the target 1
    gradient *= (lengths / gradient.flatten(1).norm(dim=1)).view(5, 1, 1)
    gradient.requires_grad_()

    def penalty(g: Tensor) -> Tensor:
        return penalty_from_gradient(g, weight=3.5, target=target, one_sided=one_sided)

    assert torch.autograd.gradcheck(penalty, gradient)
    assert torch.autograd.gradgradcheck(penalty, gradient)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_zero_row_costs_psi_of_zero_and_has_derivative_zero(target: float, one_sided: bool) -> None:
    gradient = torch.zeros(3, 4, dtype=torch.float64)
    gradient[1] = torch.tensor([1.0, 2.0, 2.0, 4.0])  # norm 5
    gradient.requires_grad_()
    penalty = penalty_from_gradient(gradient, weight=3.0, target=target, one_sided=one_sided)
    assert penalty.item() == pytest.approx((5 - target) ** 2 + (0 if one_sided else 2 * target**2), rel=1e-14)
    (first,) = torch.autograd.grad(penalty, gradient, create_graph=True)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[1] = 2 * (5 - target) * gradient[1].detach() / 5
    torch.testing.assert_close(first, expected, rtol=1e-14, atol=0)
    (second,) = torch.autograd.grad(first.sum(), gradient)
    assert second.isfinite().all()


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_show_in_the_value(bad: float, one_sided: bool) -> None:
    gradient = torch.randn(3, 5)
    gradient[2, 4] = bad
    penalty = penalty_from_gradient(gradient, one_sided=one_sided)
    assert penalty.isnan() if math.isnan(bad) else penalty == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    # 1000 entries of 64: their sum of squares is 63 times the largest float16 and needs 3 bits more than bfloat16 has.
    gradient = torch.full((3, 1000), 64.0, dtype=dtype)
    penalty = penalty_from_gradient(gradient, weight=1.0, target=0.0)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(64.0**2 * 1000, rel=1e-6)
    # A mean over 1000 rows, which a running sum in bfloat16 would stop at 256.
    ones = torch.ones(1000, 1, dtype=dtype)
    assert penalty_from_gradient(ones, weight=1.0, target=0.0).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_that_of_float32_arithmetic(dtype: torch.dtype) -> None:
    gradient = torch.randn(63, 100).to(dtype)
    expected = formula(gradient, 10.0, 1.0, False)
    # Pairwise sums of 100 squares and of 63 rows: far below 100 units in the last place of float32.
    assert penalty_from_gradient(gradient).item() == pytest.approx(expected, rel=100 * 2**-24)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    gradient = torch.randn(3, 2, 6, 8, dtype=torch.float64)
    strided = LAYOUTS[layout](gradient).detach().requires_grad_()
    penalty = penalty_from_gradient(strided)
    assert penalty.item() == pytest.approx(formula(gradient, 10.0, 1.0, False), rel=1e-13)
    (derivative,) = torch.autograd.grad(penalty, strided)
    norm = gradient.flatten(1).norm(dim=1).view(3, 1, 1, 1)
    torch.testing.assert_close(derivative, 2 * 10 / 3 * (norm - 1) * gradient / norm, rtol=1e-13, atol=0)


GRADIENT_ERRORS: list[Row] = [
    ("gradient is a list", {"gradient": [[1.0]]}, TypeError, ("gradient", "list")),
    ("gradient is None", {"gradient": None}, TypeError, ("gradient", "NoneType")),
    ("gradient is integer", {"gradient": torch.ones(4, 6).long()}, TypeError, ("gradient", "torch.int64")),
    ("gradient is complex", {"gradient": torch.ones(4, 6) * 1j}, TypeError, ("gradient", "torch.complex64")),
    ("gradient has no rows", {"gradient": torch.ones(0, 6)}, ValueError, ("gradient", "[0, 6]")),
    ("gradient has no features", {"gradient": torch.ones(4, 0)}, ValueError, ("gradient", "[4, 0]")),
    ("gradient is one row", {"gradient": torch.ones(4)}, ValueError, ("gradient", "[4]")),
    ("gradient is 0-dim", {"gradient": torch.tensor(1.0)}, ValueError, ("gradient", "[]")),
]
SETTINGS = ("weight", "target", "one_sided")


@pytest.mark.parametrize(
    ("wrong", "exception", "words"),
    rows([row for row in OPTION_ERRORS if set(row[1]) <= set(SETTINGS)], GRADIENT_ERRORS),
)
def test_bad_arguments_raise(wrong: dict[str, object], exception: type[Exception], words: tuple[str, ...]) -> None:
    arguments = {"gradient": torch.ones(4, 6), **wrong}
    with pytest.raises(exception) as caught:
        penalty_from_gradient(arguments.pop("gradient"), **arguments)
    assert_says(str(caught.value), words)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("one_sided", [False, True])
def test_compiles_into_one_graph(one_sided: bool, backend: str) -> None:
    def penalise(gradient: Tensor) -> Tensor:
        return 2 * penalty_from_gradient(gradient, weight=3.5, target=0.5, one_sided=one_sided)

    torch.compiler.reset()  # the compiled forms of one function are limited in number
    compiled = torch.compile(penalise, fullgraph=True, backend=backend)
    for batch in (7, 9):
        gradient = torch.randn(batch, 5, dtype=torch.float64)
        gradient[1] = 0
        gradient.requires_grad_()
        penalty, expected = compiled(gradient), penalise(gradient)
        torch.testing.assert_close(penalty, expected, rtol=1e-13, atol=0)
        (derivative,) = torch.autograd.grad(penalty, gradient)
        torch.testing.assert_close(derivative, torch.autograd.grad(expected, gradient)[0], rtol=1e-13, atol=0)


def test_a_compiled_critic_step_may_contain_it() -> None:
    # torch.func.grad needs no double backward through a compiled graph: the one way without private flags.
    critic = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).double()
    parameters = dict(critic.named_parameters())

    def objective(parameters: dict[str, Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        def score(x: Tensor) -> Tensor:
            return torch.func.functional_call(critic, parameters, (x,)).sum()

        gradient = torch.func.grad(score)(interpolate(real, fake, alpha))
        return penalty_from_gradient(gradient, target=0.25, one_sided=True)

    real, fake = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    alpha = torch.rand(7, dtype=torch.float64)
    compiled = torch.compile(torch.func.grad(objective), fullgraph=True, backend="aot_eager")
    actual = compiled({name: p.detach() for name, p in parameters.items()}, real, fake, alpha)
    expected = torch.autograd.grad(
        objective(parameters, real, fake, alpha), list(parameters.values()), allow_unused=True
    )
    for (name, parameter), gradient in zip(parameters.items(), expected):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-15, msg=name)
