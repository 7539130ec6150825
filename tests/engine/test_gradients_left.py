"""Which tensors get a gradient and which get none: as plain autograd leaves it."""

import copy
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import textbook
import torch
import torch.nn.functional as F
from side_by_side import (
    ALPHA,
    FAKE,
    REAL,
    USES,
    Critic,
    SideBySide,
    by_label,
    embedding,
    in_turn,
    linear,
    mlp,
    network,
    outcome,
    vector,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from wgan_fast import CriticStep, PenaltyConfig, gradient_penalty

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # to leave a critic to autograd is right, too


LABELS = torch.arange(7) % 3


GLOBAL_CRITIC = mlp()


GLOBAL_STYLE = nn.Parameter(vector())


class Helper(nn.Module):
    """A module whose forward calls a critic that is not its child."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x) * 2


class OfGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return GLOBAL_CRITIC(x).tanh()


def of_closure(critic: nn.Module) -> nn.Module:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return critic(x)

    return First()


def with_style_in(holder: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> tuple[Any, ...]:
    style = nn.Parameter(vector())
    critic = Critic(lambda critic, h: h * read(critic.held), held=holder(style))
    return critic, {}, lambda: [style, *critic.parameters()]


def with_arguments(make: Callable[[Tensor], dict[str, Any]], read: Callable[..., Tensor]) -> tuple[Any, ...]:
    table = embedding()
    critic = Critic(lambda critic, h, *args, **kwargs: h * read(*args, **kwargs))
    return critic, make(table), lambda: [*table.parameters(), *critic.parameters()]


def with_helper(make: Callable[[nn.Module], nn.Module], inner: nn.Module | None = None) -> tuple[Any, ...]:
    inner = mlp() if inner is None else inner
    return make(inner), {}, lambda: list(inner.parameters())


def with_style_computed_outside() -> tuple[Any, ...]:
    """A generator of styles that is run before the critic, whose output the critic finds in an attribute."""
    mapping, critic = linear(3), Critic(lambda critic, h, *_: h * critic.style)

    def args() -> tuple[Any, ...]:
        critic.style = torch.tanh(mapping(vector()))
        return (0,)

    return critic, {"args": args}, lambda: [*mapping.parameters(), *critic.parameters()]


# A critic, the further arguments of a check, and the tensors whose gradients count.
OUTSIDE: dict[str, Callable[[], tuple[Any, ...]]] = {
    "embedding as an argument": lambda: with_arguments(lambda table: {"args": lambda: (table(LABELS),)}, lambda y: y),
    "embedding by keyword": lambda: with_arguments(lambda table: {"kwargs": lambda: {"y": table(LABELS)}}, lambda y: y),
    "embedding in a dictionary": lambda: with_arguments(
        lambda table: {"args": lambda: ({"y": [table(LABELS)]},)}, lambda held: held["y"][0]
    ),
    "weights as an argument": lambda: with_arguments(lambda table: {"args": lambda: (table.weight,)}, lambda y: y[0]),
    "layer as an argument": lambda: with_arguments(
        lambda table: {"args": lambda: (table, LABELS)}, lambda table, labels: table(labels)
    ),
    "function of a layer as an argument": lambda: with_arguments(
        lambda table: {"args": lambda: (lambda: table(LABELS),)}, lambda call: call()
    ),
    "one of two used": lambda: with_arguments(
        lambda table: {"args": lambda: (table(LABELS), table(LABELS) * 2)}, lambda y, z: y
    ),
    "computed outside": with_style_computed_outside,
    "in a list": lambda: with_style_in(lambda p: [p], lambda held: held[0]),
    "in a tuple": lambda: with_style_in(lambda p: (0, (p,)), lambda held: held[1][0]),
    "in a dictionary": lambda: with_style_in(lambda p: {"k": {"z": p}}, lambda held: held["k"]["z"]),
    "in a namespace": lambda: with_style_in(lambda p: types.SimpleNamespace(w=p), lambda held: held.w),
    "in a view": lambda: with_style_in(lambda p: [p[:3]], lambda held: torch.cat([held[0], held[0].detach()])),
    "in a global": lambda: (
        c := Critic(lambda critic, h: h * GLOBAL_STYLE), {}, lambda: [GLOBAL_STYLE, *c.parameters()]
    ),
    "in a closure": lambda: (
        (style := nn.Parameter(vector())), c := Critic(lambda critic, h: h * style), {},
        lambda: [style, *c.parameters()],
    )[1:],
    "no parameter": lambda: (
        (style := vector().requires_grad_()), c := Critic(lambda critic, h: h * style), {},
        lambda: [style, *c.parameters()],
    )[1:],
    "layers in a list": lambda: (
        c := Critic(lambda critic, h: critic.held[0](h), held=[linear(3)]), {},
        lambda: [*c.held[0].parameters(), *c.parameters()],
    ),
    "layers in a list of a layer": lambda: (
        c := nn.Sequential(Critic(lambda critic, h: critic.held[0](h), held=[linear(3)])), {},
        lambda: [*c[0].held[0].parameters(), *c.parameters()],
    ),
    "helper with the critic in a closure": lambda: with_helper(of_closure),
    "helper with a function": lambda: with_helper(lambda critic: Helper(lambda x: critic(x))),
    "helper with a bound method": lambda: with_helper(lambda critic: Helper(critic.forward)),
    "helper with a partial": lambda: with_helper(lambda critic: Helper(functools.partial(critic))),
    "helper with a list": lambda: with_helper(lambda critic: Helper((lambda held: lambda x: held[0](x))([critic]))),
    "helper with a global": lambda: with_helper(lambda critic: OfGlobal(), GLOBAL_CRITIC),
}  # fmt: skip


def grow(leaves: Iterable[Tensor], by: float) -> None:
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(by)


@pytest.mark.parametrize(("name", "use"), in_turn(OUTSIDE))
def test_trainable_tensors_get_their_gradients_wherever_they_live(name: str, use: str) -> None:
    critic, given, leaves = OUTSIDE[name]()
    pair = SideBySide(use, critic, leaves)
    values = []
    try:
        for by in (1.0, 1.5, 0.5, 1.2):
            grow(leaves(), by)
            values.append(pair.check(**given))
            # Something other than None and zeros came of it.
            assert any(leaf.grad is not None and leaf.grad.any() for leaf in leaves())
    finally:
        grow(leaves(), 1 / (1.5 * 0.5 * 1.2))
    assert len(set(values)) == len(values)


CALLABLES: dict[str, Callable[[nn.Module, nn.Embedding], Callable[[Tensor], Tensor]]] = {
    "function": lambda critic, table: lambda x: critic(x, table(LABELS)),
    "bound method": lambda critic, table: functools.partial(critic.forward, style=table(LABELS)),
    "partial": lambda critic, table: functools.partial(critic, style=table(LABELS)),
    "partial of a layer": lambda critic, table: functools.partial(lambda t, x: critic(x, t(LABELS)), table),
    "object with __call__": lambda critic, table: type(
        "Call", (), {"__call__": lambda self, x: critic(x, table(LABELS))}
    )(),
    "module made anew": lambda critic, table: Helper(lambda x: critic(x, table(LABELS))),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_a_function_made_anew_at_every_call_gives_gradients_to_what_it_reads(name: str) -> None:
    table = embedding()
    critic = Critic(lambda critic, h, style: h * style)
    leaves = [*critic.parameters(), *table.parameters()]

    class Fresh:
        """Made anew at each call, with the graph of the labels' embedding in it."""

        def __call__(self, x: Tensor) -> Tensor:
            return CALLABLES[name](critic, table)(x)

    for by in (1.0, 1.5, 0.5, 1.2, 1.1):
        grow(leaves, by)

        def ours() -> Tensor:
            value = gradient_penalty(CALLABLES[name](critic, table), REAL, FAKE, alpha=ALPHA)
            value.backward()
            return value.detach()

        actual, gradients = outcome(ours, leaves)
        plain = SideBySide("penalty", Fresh(), lambda: leaves)
        expected, others = outcome(lambda plain=plain: plain.plain(REAL, FAKE, ALPHA, (), None), leaves)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
        for g, other in zip(gradients, others):
            torch.testing.assert_close(g, other, rtol=1e-10, atol=1e-14)


class Partly(nn.Module):
    """Parameters of every kind: used, used as constants, times zero, frozen, unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(5, 6).double(), nn.Linear(6, 1).double()
        self.unused, self.constant, self.frozen = linear(2), linear(3), linear(4).requires_grad_(False)
        self.table = embedding()
        self.nothing, self.added = nn.Parameter(torch.ones(6).double()), nn.Parameter(torch.ones(6).double())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.frozen(self.first(x)))
        with torch.no_grad():
            constant = self.constant(h)
        h = h + constant + 0 * self.nothing + self.table(LABELS[:1])
        return self.last(h * h) + self.added.sum()


NONES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: network(nn.Linear(5, 1)),
    "two linear layers": lambda: network(nn.Linear(5, 4), nn.Linear(4, 1)),
    "ReLU": lambda: network(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)),
    "LeakyReLU": lambda: network(nn.Linear(5, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)),
    "ReLU in place": lambda: network(nn.Linear(5, 8), nn.ReLU(True), nn.Linear(8, 1)),
    "Hardtanh": lambda: network(nn.Linear(5, 8), nn.Hardtanh(-0.3, 0.3), nn.Linear(8, 1)),
    "ReLU6": lambda: network(nn.Linear(5, 8), nn.ReLU6(), nn.Linear(8, 1)),
    "clamp": lambda: Critic(lambda c, h: h.clamp(min=0)),
    "maximum": lambda: Critic(lambda c, h: torch.maximum(h, torch.zeros_like(h))),
    "where": lambda: Critic(lambda c, h: torch.where(h > 0, h, 0.1 * h)),
    "multiplied by a mask": lambda: network(nn.Linear(5, 8), Times(lambda h: h * (h > 0)), nn.Linear(8, 1)),
    "absolute value": lambda: network(nn.Linear(5, 8), Times(torch.abs), nn.Linear(8, 1)),
    "absolute value, then ReLU": lambda: network(
        nn.Linear(5, 8), Times(torch.abs), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)
    ),
    "softsign, then ReLU": lambda: network(
        nn.Linear(5, 8), nn.Softsign(), nn.Linear(8, 6), nn.LeakyReLU(), nn.Linear(6, 1)
    ),
    "over its L1 norm, then ReLU": lambda: network(
        nn.Linear(5, 8),
        Times(lambda h: h / h.norm(p=1, dim=1, keepdim=True)),
        nn.Linear(8, 6),
        nn.LeakyReLU(),
        nn.Linear(6, 1),
    ),
    "PReLU": lambda: network(nn.Linear(5, 8), nn.PReLU(), nn.Linear(8, 1)),
    "tanh": lambda: network(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)),
    "SiLU": lambda: network(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 1)),
    "ReLU, then tanh": lambda: network(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)),
    "tanh, then ReLU": lambda: network(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)),
    "normalised": lambda: network(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1)),
    "softmax": lambda: network(nn.Linear(5, 8), nn.Softmax(1), nn.Linear(8, 1)),
    "largest": lambda: network(nn.Linear(5, 8), Times(lambda h: h.amax(1, keepdim=True)), nn.Linear(1, 1)),
    "largest of pairs": lambda: network(
        nn.Linear(5, 8), nn.Unflatten(1, (1, 8)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 1)
    ),
    "weight norm": lambda: network(parametrizations.weight_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 1)),
    "no bias": lambda: network(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False)),
    "residual": lambda: network(nn.Linear(5, 8), Times(lambda h: h + F.relu(h)), nn.Linear(8, 1)),
    "parts of every kind": Partly,
}


class Times(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", NONES)
def test_gradients_are_none_and_zero_where_autograd_leaves_them(name: str, use: str) -> None:
    pair = SideBySide(use, NONES[name]())
    pair.check()
    pair.check()


@pytest.mark.usefixtures("replaced_however_small")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", NONES)
def test_autograds_gradients_are_none_and_zero_without_the_dead_pass(name: str, use: str) -> None:
    pair = SideBySide(use, NONES[name](), engine="autograd")
    pair.check()
    pair.check()


@pytest.mark.parametrize("at", ["real", "fake", "both"])
@pytest.mark.parametrize("name", ["ReLU", "tanh, then ReLU", "parts of every kind"])
def test_gradients_are_none_and_zero_at_samples_too(name: str, at: str) -> None:
    for use in USES:
        SideBySide(use, NONES[name](), at=at).check()


def test_an_image_critics_gradients_are_none_and_zero_where_autograd_leaves_them() -> None:
    critic = network(nn.Conv2d(2, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 1))
    real, fake = textbook.random_pair(3, 2, 6, 6)
    for use in USES:
        SideBySide(use, critic).check(real, fake, ALPHA[:3])


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.5, 0.9)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("apart", [True, False], ids=["each with a step", "penalty alone"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "tanh", "tanh, then ReLU", "parts of every kind"])
def test_a_penalty_with_an_optimizer_step_of_its_own_trains_alike(name: str, optimizer: str, apart: bool) -> None:
    """A bias with zeros moves on by its momentum and decays; one with None stays."""
    critic = NONES[name]()
    plain = copy.deepcopy(critic)

    def train(critic: nn.Module, penalty: Callable[[], Tensor]) -> None:
        stepper = OPTIMIZERS[optimizer](critic.parameters())
        for _ in range(6):
            if apart:
                stepper.zero_grad()
                (critic(FAKE).mean() - critic(REAL).mean()).backward()
                stepper.step()
            stepper.zero_grad()
            penalty().backward()
            stepper.step()

    train(critic, lambda: gradient_penalty(critic, REAL, FAKE, alpha=ALPHA))
    train(plain, lambda: textbook.penalty(plain, [textbook.interpolates(REAL, FAKE, ALPHA)]))
    for ours, theirs in zip(critic.parameters(), plain.parameters()):
        # Adam divides by the gradient's own size, rounding included.
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_replaces_gradients_and_adds_to_them_on_request(every: int) -> None:
    """Of tensors that are no parameters of the critic, too, a step's own gradients are right after zero_grad."""
    critic, table = Critic(by_label), embedding()
    step = CriticStep(critic, penalty=PenaltyConfig(every=every))
    once = []
    for _ in range(2):
        table.zero_grad()
        step.steps_taken = 0
        step(REAL, FAKE, ALPHA, critic_args=(table(LABELS),))
        once.append([p.grad.clone() for p in (*critic.parameters(), *table.parameters())])
    step.steps_taken = 0
    step(REAL, FAKE, ALPHA, accumulate=True, critic_args=(table(LABELS),))
    twice = [p.grad for p in (*critic.parameters(), *table.parameters())]
    for first, second, both in zip(*once, twice):
        torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(both, 2 * first, rtol=1e-10, atol=1e-14)
