"""The package's penalty and critic step, and plain double backward with the same critic in the same state.

Compared are the value, every gradient, and where there is none.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import textbook
import torch
from textbook import CRITIC_LOSSES
from torch import Tensor, nn

from wgan_fast import CriticStep, PenaltyConfig, gradient_penalty

USES = ["penalty", "step"]
REAL, FAKE = textbook.CASES["mlp"].samples()
ALPHA = textbook.CASES["mlp"].alpha()


class Critic(nn.Module):
    """Two layers with what a test is about between them: ``middle(critic, hidden, *further)``."""

    def __init__(self, middle: Callable[..., Tensor] = lambda critic, h: h, **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(5, 6).double(), nn.Linear(6, 1).double()
        self.middle = middle
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.last(torch.tanh(self.middle(self, self.first(x), *args, **kwargs)))


def mlp(features: int = 5) -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Linear(features, 9), nn.LeakyReLU(0.2), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 1)
    return nn.Sequential(*layers).double()


def vector(*values: float) -> Tensor:
    return torch.tensor(values or (0.5, -1.0, 2.0, 1.5, 0.3, -0.7), dtype=torch.float64)


def linear(seed: int, features: int = 6) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, features).double()


def embedding(seed: int = 4) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(3, 6).double()


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


def by_label(critic: Any, h: Tensor, style: Any) -> Tensor:
    return h * style


def in_turn(cases: Iterable[Any]) -> list[Any]:
    """Every case with every use: the first of the uses fast and the second slow, then the other way round."""
    made = []
    for i, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        for j, use in enumerate(USES):
            marks = () if (i + j) % len(USES) == 0 else pytest.mark.slow
            made.append(pytest.param(*values, use, marks=marks, id="-".join([*map(str, values), use])))
    return made


class SideBySide:
    """One use of the package with one critic, and plain autograd beside it.

    Args:
        use: "penalty", the function, or "step", one ``CriticStep`` for all calls.
        critic: The critic; a module for "step".
        leaves: The tensors whose gradients count, asked for at every check; None means the critic's parameters.
        loss: Name of the loss of the step; the penalty has none.
        slack: As in ``assert_same_gradients``.
        options: Further options of the step, or of the penalty.
    """

    def __init__(
        self,
        use: str,
        critic: Callable[..., Tensor],
        leaves: Callable[[], Iterable[Tensor]] | None = None,
        loss: str = "wasserstein",
        slack: float = 1e-14,
        **options: Any,
    ) -> None:
        self.critic, self.loss, self.slack, self.options = critic, loss, slack, options
        self.leaves = critic.parameters if leaves is None else leaves
        self.at = options.pop("at", "interpolates")
        if use == "step":
            self.step = CriticStep(critic, loss=loss, penalty=PenaltyConfig(at=self.at), **options)
        self.use = use

    def ours(self, real: Tensor, fake: Tensor, alpha: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        if self.use == "step":
            return self.step(real, fake, alpha, critic_args=args, critic_kwargs=kwargs).loss
        value = gradient_penalty(
            self.critic, real, fake, alpha=alpha, at=self.at, critic_args=args, critic_kwargs=kwargs, **self.options
        )
        value.backward()
        return value.detach()

    def plain(self, real: Tensor, fake: Tensor, alpha: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        value = 0
        if self.use == "step":
            scores = [self.critic(x, *args, **(kwargs or {})) for x in (real, fake)]
            value = CRITIC_LOSSES[self.loss](*scores)
        points = textbook.points_at(self.at, real, fake, alpha)
        value = value + textbook.penalty(self.critic, points, args=args, kwargs=kwargs)
        value.backward()
        return value.detach()

    def check(
        self,
        real: Tensor = REAL,
        fake: Tensor = FAKE,
        alpha: Tensor = ALPHA,
        args: Callable[[], tuple[Any, ...]] = tuple,
        kwargs: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> float:
        """Compare one call of each, buffers included; return the value.

        ``args`` and ``kwargs`` make the further arguments anew, since a backward frees what they were computed by.
        """
        leaves, start = list(self.leaves()), self._buffers()
        actual, ours = outcome(lambda: self.ours(real, fake, alpha, args(), kwargs()), leaves)
        after = self._buffers()
        with torch.no_grad():
            for name, buffer in self._live_buffers().items():
                buffer.copy_(start[name])
        expected, theirs = outcome(lambda: self.plain(real, fake, alpha, args(), kwargs()), leaves)
        assert type(actual) is Tensor
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
        assert_same_gradients(ours, theirs, self.slack)
        for name, buffer in self._live_buffers().items():
            torch.testing.assert_close(after[name], buffer, rtol=1e-12, atol=1e-14)
        return expected.item()

    def _live_buffers(self) -> dict[str, Tensor]:
        return dict(self.critic.named_buffers()) if isinstance(self.critic, nn.Module) else {}

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self._live_buffers().items()}


def outcome(call: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """What a call returns and the gradients that it leaves, None where it leaves none."""
    for leaf in leaves:
        leaf.grad = None
    value = call()
    return value, [None if leaf.grad is None else leaf.grad.detach().to_dense().clone() for leaf in leaves]


def assert_same_gradients(actual: list[Tensor | None], expected: list[Tensor | None], slack: float = 1e-14) -> None:
    """None where there is none, and elsewhere within 1e-10 of the gradient's own norm.

    A gradient whose summands cancel carries their rounding: ``slack`` of the whole gradient's norm and of 1, the
    order of the scores and penalties here, is allowed besides; 1e-14 is some 50 roundings.
    """
    assert [g is None for g in actual] == [g is None for g in expected], "None in other places"
    whole = torch.cat([torch.zeros(1, dtype=torch.float64), *[g.flatten() for g in expected if g is not None]]).norm()
    assert torch.isfinite(whole)
    for i, (ours, theirs) in enumerate(zip(actual, expected)):
        if theirs is not None:
            assert type(ours) is Tensor
            error = (ours - theirs).norm()
            assert error <= 1e-10 * theirs.norm() + slack * (1 + whole), (
                f"gradient {i}: error {error} of {theirs.norm()}"
            )


def check_changes(pair: SideBySide, changes: Iterable[Callable[[], object]], **given: Any) -> None:
    """Compare before and after each change, twice, for what is kept between calls; every change changes the value."""
    before = pair.check(**given)
    for change in changes:
        change()
        now = pair.check(**given)
        assert now != before, "the change changes nothing, so the test tests nothing"
        pair.check(**given)
        before = now


@contextmanager
def planning(monkeypatch: pytest.MonkeyPatch):
    """List the graphs that are made meanwhile, by any tracer: all end as an FX module that writes its code."""
    made: list[str] = []
    recompile = torch.fx.GraphModule.recompile

    def counted(module: torch.fx.GraphModule) -> Any:
        made.append(type(module).__name__)
        return recompile(module)

    with monkeypatch.context() as patch:
        patch.setattr(torch.fx.GraphModule, "recompile", counted)
        yield made
