"""The critic step of a narrow MLP as one operator: autograd's gradients, and a reason where it cannot be taken."""

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from textbook import assert_equal_gradients, gradients_left_in, random_pair
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wgan_fast import CriticStep, CriticStepResult, PenaltyConfig, explain, reference
from wgan_fast.engine import fused_mlp
from wgan_fast.training import models

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def mlp(D: int, H: int, layers: int, activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [m for _ in range(layers - 1) for m in (nn.Linear(H, H), activation)]
    return nn.Sequential(nn.Linear(D, H), activation, *hidden, nn.Linear(H, 1), nn.Flatten(0)).double()


def run(critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor, **penalty: float) -> tuple:
    parameters = [p.detach() for p in critic.parameters()]
    slope = getattr(critic[1], "negative_slope", 0.0)
    return torch.ops.wgan_fast.mlp_critic_step(real, fake, alpha, parameters, slope, *penalty.values(), "fp32")


@pytest.mark.parametrize(
    ("N", "D", "H", "layers", "activation", "penalty"),
    [
        (5, 2, 7, 1, nn.ReLU(), {}),
        (67, 3, 20, 2, nn.LeakyReLU(0.2), {"target": 0.3, "one_sided": True}),
        (1, 63, 65, 4, nn.ReLU(inplace=True), {"weight": 3.0}),
        (100, 5, 9, 3, nn.LeakyReLU(), {"target": 0.0}),
    ],
)
def test_float64_equals_autograd(N: int, D: int, H: int, layers: int, activation: nn.Module, penalty: dict) -> None:
    critic = mlp(D, H, layers, activation)
    options = {"weight": 10.0, "target": 1.0, "one_sided": False} | penalty
    real, fake = torch.randn(2, N, D, dtype=torch.float64).unbind()
    alpha = torch.rand(N, dtype=torch.float64)
    figures, norms, gradients = run(critic, real, fake, alpha, **options)

    scores = critic(real).mean(), critic(fake).mean()
    value, norm = reference.gradient_penalty(critic, [reference.interpolate(real, fake, alpha)], **options)
    loss = scores[1] - scores[0] + value
    expected = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(figures, torch.stack([*scores, value, norm]).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norms.mean(), norm.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(tuple(gradients), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    critic = mlp(3, 8, 2, nn.ReLU()).float().to(device)
    real, fake = torch.randn(2, 6, 3, device=device).unbind()
    parameters = [p.detach() for p in critic.parameters()]
    arguments = real, fake, torch.rand(6, device=device), parameters, 0.0, 10.0, 1.0, False, "fp32"
    torch.library.opcheck(torch.ops.wgan_fast.mlp_critic_step, arguments)


class Calls(TorchDispatchMode):
    """Counts the calls of the operator."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.wgan_fast.mlp_critic_step.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the step take the operator where its plain form runs."""
    monkeypatch.setattr(fused_mlp, "widest", lambda samples: 256 if samples.dtype == torch.float64 else 0)


def pair_of_steps(critic: nn.Module, **options: Any) -> tuple[CriticStep, CriticStep]:
    """The step as it is, and the one that autograd makes."""
    return CriticStep(critic, **options), CriticStep(critic, engine="autograd", penalty=options.get("penalty", GP))


def assert_equal_steps(critic: nn.Module, steps: tuple[CriticStep, CriticStep], *batch: Any, operator: bool) -> None:
    """Both steps give the same figures and gradients, the first with or without the operator."""
    with Calls() as calls:
        result = steps[0](*batch)
    assert calls.count == operator
    left = gradients_left_in(critic)
    expected = steps[1](*batch)
    assert_equal_gradients(left, gradients_left_in(critic))
    for name, actual, exact in zip(CriticStepResult._fields, result, expected):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-14, equal_nan=True, msg=name)


GP = PenaltyConfig.wgan_gp()
LP = PenaltyConfig(weight=3.5, target=0.25, one_sided=True)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("engine", ["auto", "four_pass"])
@pytest.mark.parametrize("penalty", [GP, LP])
def test_the_step_takes_the_operator_and_equals_autograd(penalty: PenaltyConfig, engine: str, compile: bool) -> None:
    critic = mlp(5, 9, 3, nn.LeakyReLU(0.2))
    steps = pair_of_steps(critic, penalty=penalty, engine=engine, compile=compile)
    for batch in (7, 1):
        real, fake = random_pair(batch, 5)
        alpha = torch.rand(batch, requires_grad=True)
        assert_equal_steps(critic, steps, real.requires_grad_(), fake, alpha, operator=True)
    assert not steps[0].code


@pytest.mark.usefixtures("on_cpu")
def test_critics_of_the_package_take_it_whatever_the_shape_of_a_sample() -> None:
    critic = models.build("mlp", (3, 2), width=9)[1].double()
    real, fake = (x.view(7, 3, 2) for x in random_pair(7, 6))
    alpha = torch.rand(7, dtype=torch.float64)
    assert_equal_steps(critic, pair_of_steps(critic), real, fake, alpha, operator=True)


@pytest.mark.usefixtures("on_cpu")
def test_alpha_is_the_one_that_four_passes_draw() -> None:
    critic = mlp(5, 9, 2, nn.ReLU())
    real, fake = random_pair(7, 5)
    losses = []
    for step in pair_of_steps(critic):
        torch.manual_seed(5)
        losses.append(step(real, fake).loss)
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)


@pytest.mark.usefixtures("on_cpu")
def test_accumulate_adds_and_otherwise_gradients_are_replaced() -> None:
    critic = mlp(5, 9, 2, nn.ReLU())
    critic.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    step, _ = pair_of_steps(critic)
    real, fake = random_pair(7, 5)
    alpha = torch.rand(7, dtype=torch.float64)
    for parameter in critic.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step(real, fake, alpha)
    assert critic.unused.grad is None
    once = gradients_left_in(critic)
    step(real, fake, alpha, accumulate=True)
    assert_equal_gradients(gradients_left_in(critic), {name: 2 * gradient for name, gradient in once.items()})


@pytest.mark.usefixtures("on_cpu")
def test_a_lazy_penalty_takes_it_at_the_steps_that_have_one() -> None:
    critic = mlp(5, 9, 2, nn.ReLU())
    steps = pair_of_steps(critic, penalty=replace(GP, every=3))
    for call in range(7):
        real, fake = random_pair(7, 5)
        alpha = torch.rand(7, dtype=torch.float64)
        assert_equal_steps(critic, steps, real, fake, alpha, operator=call % 3 == 0)
    assert steps[0].steps_taken == 7


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fake": zeros(4, 3)}, r"fake must have the shape of real, got \[4, 3\] and \[4, 5\]"),
        ({"alpha": zeros(3)}, r"alpha must be a number, have one value per sample, shape \[4\], .*, got \[3\]"),
        ({"real": zeros(0, 5), "fake": zeros(0, 5)}, r"real must be a non-empty batch \[N, ...\], got shape \[0, 5\]"),
        ({"real": zeros(5), "fake": zeros(5)}, r"real must be a non-empty batch \[N, ...\], got shape \[5\]"),
        ({"real": zeros(), "fake": zeros()}, r"real must be a non-empty batch \[N, ...\], got shape \[\]"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["at the first step", "at a later step"])
def test_bad_batches_touch_no_gradient(wrong: dict[str, Tensor], message: str, first: bool) -> None:
    critic = nn.Sequential(nn.Flatten(), *mlp(5, 9, 2, nn.ReLU()))
    real, fake = random_pair(4, 5)
    step = CriticStep(critic)
    with Calls() as calls:
        (CriticStep(critic) if first else step)(real, fake)
    assert calls.count == 1
    for parameter in critic.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    with pytest.raises(ValueError, match=f"^{message}$"):
        step(**{"real": real, "fake": fake, **wrong})
    assert all((p.grad == 7).all() for p in critic.parameters())
    assert step.steps_taken == (not first)


def changed(holder: object, **attributes: object) -> Callable[[], object]:
    """Set attributes; calling the result sets them back."""
    before = {name: getattr(holder, name) for name in attributes}
    for name, value in attributes.items():
        setattr(holder, name, value)
    return lambda: changed(holder, **before)


def replaced(critic: nn.Module, modules: dict[int, nn.Module]) -> Callable[[], object]:
    return changed(critic, **{str(index): module.double() for index, module in modules.items()})


def with_another_forward(layer: nn.Module) -> Callable[[], object]:
    layer.forward = lambda x: 2 * x
    return lambda: delattr(layer, "forward")


def with_weight_norm(layer: nn.Module) -> Callable[[], object]:
    nn.utils.parametrizations.weight_norm(layer)
    return lambda: nn.utils.parametrize.remove_parametrizations(layer, "weight")


def appended(modules: nn.Sequential, module: nn.Module) -> Callable[[], object]:
    modules.append(module.double())
    return lambda: modules.pop(-1)


# Each returns what undoes it.
CHANGES: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    "a hook": lambda critic: critic[2].register_forward_hook(lambda module, args, out: 2 * out).remove,
    "a frozen bias": lambda critic: changed(critic[2].bias, requires_grad=False),
    "another module": lambda critic: replaced(critic, {3: nn.Tanh()}),
    "no bias": lambda critic: replaced(critic, {2: nn.Linear(9, 9, bias=False)}),
    "another slope": lambda critic: changed(critic[3], negative_slope=0.5),
    "a forward method": lambda critic: with_another_forward(critic[2]),
    "weight norm": lambda critic: with_weight_norm(critic[2]),
    "appended to a nested Sequential": lambda critic: appended(critic[1], nn.Linear(9, 9)),
}


# A critic may be changed between two steps, and back.
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_critic_is_noticed(change: Callable[[nn.Module], Callable[[], object]]) -> None:
    first = nn.Sequential(nn.Linear(5, 9), nn.LeakyReLU(0.2))
    hidden = [m for _ in range(2) for m in (nn.Linear(9, 9), nn.LeakyReLU(0.2))]
    critic = chain(nn.Flatten(), first, *hidden, nn.Linear(9, 1), nn.Flatten(0))
    steps = pair_of_steps(critic)
    batch = *random_pair(7, 5), torch.rand(7, dtype=torch.float64)
    assert_equal_steps(critic, steps, *batch, operator=True)
    undo = change(critic)
    assert_equal_steps(critic, steps, *batch, operator=False)
    undo()
    assert_equal_steps(critic, steps, *batch, operator=True)


@pytest.mark.usefixtures("on_cpu")
def test_other_widths_are_taken_as_they_are() -> None:
    critic = chain(nn.Flatten(), nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 1))
    steps = pair_of_steps(critic)
    batch = *random_pair(7, 5), torch.rand(7, dtype=torch.float64)
    assert_equal_steps(critic, steps, *batch, operator=True)
    replaced(critic, {1: nn.Linear(5, 12), 3: nn.Linear(12, 9)})
    assert_equal_steps(critic, steps, *batch, operator=True)


@pytest.mark.usefixtures("on_cpu")
def test_layers_that_come_to_be_tied_have_both_gradients() -> None:
    critic = chain(*[m for _ in range(3) for m in (nn.Linear(5, 5), nn.ReLU())], nn.Linear(5, 1))
    steps = pair_of_steps(critic)
    batch = *random_pair(7, 5), torch.rand(7, dtype=torch.float64)
    assert_equal_steps(critic, steps, *batch, operator=True)
    critic[4] = critic[2]
    steps[0](*batch)
    left = gradients_left_in(critic)
    steps[1](*batch)
    assert_equal_gradients(left, gradients_left_in(critic))


def ending_in(last: nn.Module, kind: type[nn.Sequential]) -> nn.Module:
    torch.manual_seed(0)
    return kind(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 1), last).double()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("kind", "last", "operator"),
    [
        (nn.Sequential, nn.Identity(), True),
        (nn.Sequential, nn.Flatten(), True),
        (nn.Sequential, nn.Flatten(0), True),
        (nn.Sequential, nn.Flatten(0, 0), True),
        (models.Critic, nn.Identity(), True),
        (models.Critic, nn.Flatten(), True),
        (models.Critic, nn.Flatten(0, 0), True),
    ],
)
def test_a_last_layer_that_only_shapes_the_scores(kind: type[nn.Sequential], last: nn.Module, operator: bool) -> None:
    critic = ending_in(last, kind)
    batch = *random_pair(7, 5), torch.rand(7, dtype=torch.float64)
    assert_equal_steps(critic, pair_of_steps(critic), *batch, operator=operator)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("kind", "last"),
    [
        (nn.Sequential, nn.Flatten(2)),
        (nn.Sequential, nn.Flatten(1, 2)),
        (models.Critic, nn.Flatten(0)),
        (models.Critic, nn.Flatten(2)),
    ],
)
@pytest.mark.filterwarnings("ignore:wgan_fast differentiates with autograd")
def test_a_critic_that_raises_raises_in_the_step(kind: type[nn.Sequential], last: nn.Module) -> None:
    critic = ending_in(last, kind)
    real, fake = random_pair(7, 5)
    with pytest.raises(IndexError) as raised:
        critic(real)
    with pytest.raises(IndexError, match=f"^{re.escape(str(raised.value))}"):
        CriticStep(critic)(real, fake)


@pytest.mark.usefixtures("on_cpu")
def test_new_values_and_new_parameters_are_read() -> None:
    critic = mlp(5, 9, 2, nn.ReLU())
    steps = pair_of_steps(critic)
    batch = *random_pair(7, 5), torch.rand(7, dtype=torch.float64)
    assert_equal_steps(critic, steps, *batch, operator=True)
    torch.optim.SGD(critic.parameters(), lr=0.1).step()
    assert_equal_steps(critic, steps, *batch, operator=True)
    critic[0].weight = nn.Parameter(torch.randn(9, 5, dtype=torch.float64))
    assert_equal_steps(critic, steps, *batch, operator=True)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "hinge"},
        {"penalty": PenaltyConfig.r1()},
        {"penalty": PenaltyConfig.dragan()},
        {"penalty": None},
        {"engine": "autograd"},
    ],
)
def test_another_objective_does_not_take_it(options: dict[str, Any]) -> None:
    critic = mlp(5, 9, 2, nn.ReLU())
    with Calls() as calls:
        CriticStep(critic, **options)(*random_pair(7, 5))
    assert calls.count == 0


@pytest.mark.usefixtures("on_cpu")
def test_float32_samples_and_an_outer_autocast_do_not_take_it() -> None:
    critic = mlp(5, 9, 2, nn.ReLU())
    step = CriticStep(critic)
    with Calls() as calls, torch.autocast("cpu", torch.bfloat16):
        step(*random_pair(7, 5))
    critic.float()
    with calls:
        step(*random_pair(7, 5, dtype=torch.float32))
    assert calls.count == 0


def deep(layers: int) -> list[nn.Module]:
    return [module for _ in range(layers) for module in (nn.ReLU(), nn.Linear(4, 4))]


def chain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules).double()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("critic", "reason"),
    [
        (nn.Linear(6, 1).double(), "between each two"),
        (models.PackedCritic(6, 9, group_size=2, dropout=0.0).double(), "packs"),
        (chain(nn.Linear(6, 1)), "between each two"),
        (chain(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), "operator tanh"),
        (chain(nn.Linear(6, 4), nn.Sequential(nn.Tanh()), nn.Linear(4, 1)), "operator tanh"),
        (chain(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)), "no bias"),
        (chain(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 1)), "wider than 256"),
        (chain(nn.Linear(6, 4), *deep(6), nn.ReLU(), nn.Linear(4, 1)), "more than 6 hidden"),
        (chain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.LeakyReLU(), nn.Linear(4, 1)), "activations differ"),
        (chain(nn.Linear(6, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 1)), "frozen"),
        (chain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)), None),
        (chain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)), None),
        (chain(nn.Flatten(), nn.Sequential(nn.Linear(6, 4), nn.ReLU()), nn.Linear(4, 1), nn.Flatten(0)), None),
    ],
)
def test_explain_says_whether_a_critic_takes_it_and_why_not(critic: nn.Module, reason: str | None) -> None:
    group_size = 2 if isinstance(critic, models.PackedCritic) else 1
    report = explain(critic, torch.randn(4, 6, dtype=torch.float64), group_size=group_size)
    if reason is None:
        assert report.unfused is None
        assert "fused      yes, one operator for the step; units and launches are those of the four" in str(report)
    else:
        assert reason in report.unfused
        assert f"fused      no, because {report.unfused}" in str(report)


@pytest.mark.usefixtures("on_cpu")
def test_a_critic_of_more_than_samples_does_not_take_it() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layers(x + y)

    samples = torch.randn(4, 6, dtype=torch.float64)
    assert "more than samples" in explain(Labelled().double(), samples, critic_args=(samples,)).unfused


@pytest.mark.parametrize(
    ("capability", "dtype", "most"),
    [((9, 0), torch.float32, 64), ((9, 0), torch.bfloat16, 0), ((8, 0), torch.float32, 0), ((10, 0), torch.float32, 0)],
)
def test_it_is_taken_where_it_was_measured_to_be_faster(
    capability: tuple[int, int], dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fused_mlp.widest(SimpleNamespace(device=torch.device("cuda"), dtype=dtype)) == most


def test_the_kernels_and_who_asks_for_them_have_the_same_limits() -> None:
    kernels = pytest.importorskip("wgan_fast.kernels.mlp_critic_step")
    limits = fused_mlp.MOST_LAYERS, fused_mlp.MOST_WIDTH
    assert limits == (kernels.MOST_LAYERS, kernels.MOST_WIDTH)
    kernels._in_one([4080] * 7)
    for widths in ([16] * 8, [16, 4096]):
        with pytest.raises(ValueError, match="at most 6 hidden layers of at most 4080"):
            kernels._in_one(widths)


def test_without_a_gpu_the_four_passes_run() -> None:
    critic = chain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)).float()
    assert "GPU" in explain(critic, torch.randn(4, 6)).unfused
    with Calls() as calls:
        CriticStep(critic)(*random_pair(7, 6, dtype=torch.float32))
    assert calls.count == 0
