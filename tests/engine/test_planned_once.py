"""A critic is planned at its first steps and not again while nothing about its graph changes."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import textbook
import torch
from side_by_side import (
    ALPHA,
    FAKE,
    REAL,
    USES,
    Critic,
    SideBySide,
    assert_same_gradients,
    in_turn,
    mlp,
    outcome,
    planning,
    vector,
)
from torch import Tensor, nn

from wgan_fast import CriticStep, GradientPenalty, gradient_penalty

strict = pytest.mark.filterwarnings("error::RuntimeWarning", "ignore::FutureWarning")
lenient = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # autograd, once said, is as good

WARM_UP, STEPS, ALLOWED = 4, 10, 2
"""Steps until plans are there, steps that are counted, and how many of these may make graphs all the same."""


class Helper(nn.Module):
    """Hands on the first of a critic's outputs, as people write it around a critic with two."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor) -> Tensor:
        return self.critic(x) * 2


class Fading(nn.Module):
    alpha = 0.5

    def forward(self, h: Tensor) -> Tensor:
        return h * self.alpha


def old_spectral() -> nn.Module:
    torch.manual_seed(1)
    norm = nn.utils.spectral_norm
    return nn.Sequential(norm(nn.Linear(5, 6)), nn.Tanh(), norm(nn.Linear(6, 1))).double()


def by_argument(critic: Any, h: Tensor, alpha: Any = 1.0, stage: int = 4) -> Tensor:
    return h * alpha if stage == 4 else h


def freeze_and_thaw(critic: nn.Module, i: int) -> None:
    """What a loop does around the generator's turn."""
    critic.requires_grad_(False)
    critic.requires_grad_(True)


def evaluate_between(critic: nn.Module, i: int) -> None:
    critic.eval()
    with torch.no_grad():
        critic(REAL)
    critic.train()


def save_and_load(critic: nn.Module, i: int) -> None:
    state = copy.deepcopy(critic.state_dict())
    critic.load_state_dict(state)


def refresh(critic: Any, i: int) -> None:
    critic.mix.mul_(0.9).add_(0.1 * i)


def value(i: int) -> float:
    return 0.05 + 0.07 * i


# A critic, what happens before a step, and the step's further arguments.
Changing = tuple[Callable[[], nn.Module], Callable[[Any, int], object], Callable[[int], dict[str, Any]]]


def nothing(critic: Any, i: int) -> None:
    pass


def no_arguments(i: int) -> dict[str, Any]:
    return {}


CASES: dict[str, Changing] = {
    "nothing": (mlp, nothing, no_arguments),
    "a float as an argument": (lambda: Critic(by_argument), nothing, lambda i: {"args": lambda: (value(i), 4)}),
    "a float by keyword": (lambda: Critic(by_argument), nothing, lambda i: {"kwargs": lambda: {"alpha": value(i)}}),
    "a NumPy float as an argument": (
        lambda: Critic(by_argument), nothing, lambda i: {"args": lambda: (np.float64(value(i)), 4)}
    ),
    "a tensor as an argument": (
        lambda: Critic(by_argument), nothing, lambda i: {"args": lambda: (vector(value(i)), 4)}
    ),
    "a float attribute": (
        lambda: Critic(lambda c, h: h * c.alpha, alpha=0.5), lambda c, i: setattr(c, "alpha", value(i)), no_arguments
    ),
    "a float attribute of a layer": (
        lambda: Critic(lambda c, h: c.body(h), body=Fading()),
        lambda c, i: setattr(c.body, "alpha", value(i)),
        no_arguments,
    ),
    "a float in a dictionary": (
        lambda: Critic(lambda c, h: h * c.held["k"], held={"k": 0.5}),
        lambda c, i: c.held.update(k=value(i)),
        no_arguments,
    ),
    "a tensor attribute replaced": (
        lambda: Critic(lambda c, h: h * c.mix, mix=vector()), lambda c, i: setattr(c, "mix", vector() + i), no_arguments
    ),
    "a tensor attribute refreshed": (lambda: Critic(lambda c, h: h * c.mix, mix=vector()), refresh, no_arguments),
    "an attribute that forward does not read": (
        lambda: Critic(updates=0), lambda c, i: setattr(c, "updates", c.updates + 1), no_arguments
    ),
    "an object that forward does not read": (
        lambda: Critic(log=types.SimpleNamespace(losses=[])), lambda c, i: c.log.losses.append(value(i)), no_arguments
    ),
    "old-style spectral norm called in between": (old_spectral, lambda c, i: c(REAL), no_arguments),
    "old-style spectral norm": (old_spectral, nothing, no_arguments),
    "spectral norm called in between": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(mlp()[0]), nn.Tanh(), nn.Linear(9, 1).double()),
        lambda c, i: c(REAL),
        no_arguments,
    ),
    "frozen and thawed in between": (mlp, freeze_and_thaw, no_arguments),
    "evaluated in between": (lambda: nn.Sequential(mlp(), nn.Dropout(0.0)), evaluate_between, no_arguments),
    "saved and loaded in between": (mlp, save_and_load, no_arguments),
    "copied in between": (mlp, lambda c, i: copy.deepcopy(c)(REAL), no_arguments),
}  # fmt: skip


def steps_that_plan(monkeypatch: pytest.MonkeyPatch, step: Callable[[int], object]) -> list[int]:
    """Which of the steps after the warm-up made a graph."""
    planned = []
    for i in range(WARM_UP + STEPS):
        with planning(monkeypatch) as made:
            step(i)
        if made and i >= WARM_UP:
            planned.append(i)
    return planned


@strict
@pytest.mark.parametrize(("name", "use"), in_turn(CASES))
def test_a_critic_is_planned_once(name: str, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, change, arguments = CASES[name]
    critic = make()
    pair = SideBySide(use, critic)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)

    def step(i: int) -> None:
        change(critic, i)
        # A step may iterate once or once a forward, so what spectral norm gives in evaluation is compared.
        critic.train("spectral" not in name or use == "penalty")
        pair.check(**arguments(i))
        critic.train()
        optimizer.step()

    assert len(steps_that_plan(monkeypatch, step)) <= ALLOWED


@strict
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_spectral_critic_in_training_is_planned_once(
    norm: Callable[..., nn.Module], use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    critic = nn.Sequential(norm(nn.Linear(5, 6)), nn.Tanh(), norm(nn.Linear(6, 1))).double()
    pair = SideBySide(use, critic)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)

    def step(i: int) -> None:
        critic(REAL)
        optimizer.zero_grad()
        if use == "penalty":
            pair.check()
        else:
            pair.ours(REAL, FAKE, ALPHA, (), None)
        optimizer.step()

    assert len(steps_that_plan(monkeypatch, step)) <= ALLOWED


ANEW: dict[str, Callable[[nn.Module, int], Callable[..., Tensor]]] = {
    "function": lambda critic, i: lambda x: critic(x),
    "function of a condition": lambda critic, i: (lambda y: lambda x: critic(x * y))(vector()[:5] * i),
    "function of a number": lambda critic, i: (lambda y: lambda x: critic(x * y))(value(i)),
    "bound method": lambda critic, i: critic.forward,
    "partial": lambda critic, i: functools.partial(critic),
}


@strict
def test_a_helper_made_anew_at_every_step_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    critic = mlp()
    steps = steps_that_plan(monkeypatch, lambda i: SideBySide("penalty", Helper(critic), critic.parameters).check())
    assert len(steps) <= ALLOWED


@lenient
@pytest.mark.parametrize("name", ANEW)
def test_a_function_made_anew_at_every_step_is_planned_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = mlp()
    steps = steps_that_plan(
        monkeypatch, lambda i: SideBySide("penalty", ANEW[name](critic, i), critic.parameters).check()
    )
    assert len(steps) <= ALLOWED


@strict
@pytest.mark.parametrize("kind", ["GradientPenalty", "CriticStep", "helper and CriticStep"])
def test_objects_made_anew_at_every_step_share_their_plans(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = mlp()
    points = [textbook.interpolates(REAL, FAKE, ALPHA)]

    def plain(called: nn.Module) -> Tensor:
        value = textbook.penalty(called, points)
        if kind != "GradientPenalty":
            value = value + called(FAKE).mean() - called(REAL).mean()
        value.backward()
        return value.detach()

    def step(i: int) -> None:
        called = Helper(critic) if kind.startswith("helper") else critic

        def ours() -> Tensor:
            if kind != "GradientPenalty":
                return CriticStep(called)(REAL, FAKE, ALPHA).loss
            (value := GradientPenalty(called)(REAL, FAKE, ALPHA)).backward()
            return value.detach()

        actual, gradients = outcome(ours, list(critic.parameters()))
        expected, others = outcome(lambda: plain(called), list(critic.parameters()))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
        assert_same_gradients(gradients, others)

    assert len(steps_that_plan(monkeypatch, step)) <= ALLOWED


@strict
@pytest.mark.parametrize("setting", ["weight", "target"])
def test_a_setting_that_is_annealed_is_no_new_plan(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = mlp()
    points = [textbook.interpolates(REAL, FAKE, ALPHA)]

    def step(i: int) -> None:
        options = {setting: value(i)}
        ours = gradient_penalty(critic, REAL, FAKE, alpha=ALPHA, **options)
        torch.testing.assert_close(ours, textbook.penalty(critic, points, **options), rtol=1e-10, atol=0)

    assert len(steps_that_plan(monkeypatch, step)) <= ALLOWED


@lenient
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("critic", ["mlp", "batch norm", "one that reads its size"])
def test_new_batch_sizes_soon_ask_for_no_new_plan(critic: str, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "mlp": mlp,
        "batch norm": lambda: nn.Sequential(mlp()[:2], nn.BatchNorm1d(9), nn.Tanh(), mlp()[4:]).double(),
        "one that reads its size": lambda: Critic(lambda c, h: h / len(h) + h.mean(0, keepdim=True).expand(len(h), -1)),
    }[critic]()
    pair = SideBySide(use, made)

    def step(i: int) -> None:
        real, fake = textbook.random_pair(3 + (7 * i) % 17, 5)
        pair.check(real, fake, torch.rand(len(real), dtype=torch.float64))

    assert len(steps_that_plan(monkeypatch, step)) <= ALLOWED


@strict
@pytest.mark.parametrize("use", USES)
def test_two_batch_sizes_in_turn_are_planned_once(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = SideBySide(use, mlp())
    steps = lambda i: pair.check(REAL[: 7 - 3 * (i % 2)], FAKE[: 7 - 3 * (i % 2)], ALPHA[: 7 - 3 * (i % 2)])  # noqa: E731
    assert len(steps_that_plan(monkeypatch, steps)) == 0


@strict
@pytest.mark.parametrize("use", USES)
def test_critics_in_turn_keep_their_plans(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve critics of one class, more than Dynamo's limit on one code object."""
    pairs = [SideBySide(use, Critic(lambda c, h: h * c.alpha, alpha=value(i))) for i in range(12)]

    def step(i: int) -> None:
        for pair in pairs:
            pair.check()

    assert len(steps_that_plan(monkeypatch, step)) == 0


@lenient
@pytest.mark.parametrize("use", USES)
def test_an_integer_that_counts_upwards_soon_asks_for_no_new_plan(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = Critic(lambda c, h: h / (1 + c.stage), stage=0)
    pair = SideBySide(use, critic)

    def step(i: int) -> None:
        critic.stage = i
        pair.check()

    # The limit of traces may be anything small: after it there are none.
    assert len(steps_that_plan(monkeypatch, step)) <= 6
