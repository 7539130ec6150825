"""Hooks on parameters run as often, and change as much, as a plain backward lets them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import ALPHA, FAKE, REAL, USES, Critic, SideBySide, by_label, embedding, mlp
from torch import Tensor

from wgan_fast import GradientPenalty

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # to leave a critic to autograd is right, too


LABELS = torch.arange(7) % 3


Watch = Callable[[list[Tensor], list[Any]], list[Any]]


def masked(parameters: list[Tensor], seen: list[Any]) -> list[Any]:
    mask = (torch.arange(parameters[0].numel()) % 2).view_as(parameters[0])
    return [parameters[0].register_hook(lambda g: seen.append(g.sum().item()) or g * mask)]


def scaled(parameters: list[Tensor], seen: list[Any]) -> list[Any]:
    return [p.register_hook(lambda g, i=i: seen.append(i) or g * (i + 2)) for i, p in enumerate(parameters)]


def watched(parameters: list[Tensor], seen: list[Any]) -> list[Any]:
    return [p.register_hook(lambda g, i=i: seen.append((i, g.shape))) for i, p in enumerate(parameters)]


def clipped_after(parameters: list[Tensor], seen: list[Any]) -> list[Any]:
    def clip(parameter: Tensor) -> None:
        seen.append(parameter.grad.norm().item())
        parameter.grad.clamp_(-0.01, 0.01)

    return [p.register_post_accumulate_grad_hook(clip) for p in parameters]


def stepped_after(parameters: list[Tensor], seen: list[Any]) -> list[Any]:
    """An optimizer in the backward: the parameter is stepped and its gradient freed as soon as it is there."""

    def step(parameter: Tensor) -> None:
        seen.append(parameter.grad.norm().item())
        parameter.data.add_(parameter.grad, alpha=-0.1)
        parameter.grad = None

    return [p.register_post_accumulate_grad_hook(step) for p in parameters]


def together(parameters: list[Tensor], seen: list[Any]) -> list[Any]:
    def hook(gradients: Any) -> None:
        seen.append([g is None for g in gradients])

    return [torch.autograd.graph.register_multi_grad_hook(parameters, hook)]


def any_of_them(parameters: list[Tensor], seen: list[Any]) -> list[Any]:
    return [torch.autograd.graph.register_multi_grad_hook(parameters, lambda g: seen.append("any"), mode="any")]


WATCHES: dict[str, Watch] = {
    "masks": masked,
    "scales": scaled,
    "watches": watched,
    "clips after accumulation": clipped_after,
    "steps after accumulation": stepped_after,
    "all together": together,
    "any of them": any_of_them,
}


def rounded(seen: list[Any]) -> list[Any]:
    # Which parameter's turn comes first is the backward's business.
    return sorted(repr(float(f"{x:.9e}")) if isinstance(x, float) else repr(x) for x in seen)


@pytest.mark.parametrize("use", [*USES, "object"])
@pytest.mark.parametrize("when", ["before the first use", "after it"])
@pytest.mark.parametrize("name", WATCHES)
def test_hooks_on_parameters_run_as_backward_runs_them(name: str, when: str, use: str) -> None:
    found = []
    for plain in (False, True):
        critic = mlp()
        parameters, seen = list(critic.parameters()), []
        pair = SideBySide("step" if use == "step" else "penalty", critic)
        call = pair.plain if plain else pair.ours
        if use == "object" and not plain:
            penalty = GradientPenalty(critic)

            def call(*given: Any, penalty: GradientPenalty = penalty) -> Tensor:
                (value := penalty(*given[:3])).backward()
                return value.detach()

        if when == "after it":
            call(REAL, FAKE, ALPHA, (), None)
        handles = WATCHES[name](parameters, seen)
        results = []
        for _ in range(3):
            critic.zero_grad()
            value = call(REAL, FAKE, ALPHA, (), None)
            results += [value, *[torch.zeros(()) if p.grad is None else p.grad.clone() for p in parameters]]
            results += [p.detach().clone() for p in parameters]
        for handle in handles:
            getattr(handle, "remove", lambda: None)()
        heard = len(seen)
        call(REAL, FAKE, ALPHA, (), None)
        assert name == "accumulators" or len(seen) == heard  # they are gone once removed
        found.append((rounded(seen), results))
    (ours, our_results), (theirs, their_results) = found
    assert ours == theirs
    assert theirs
    for actual, expected in zip(our_results, their_results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use", USES)
def test_hooks_on_further_arguments_run_too(use: str) -> None:
    critic, table = Critic(by_label), embedding()
    pair = SideBySide(use, critic, lambda: [*critic.parameters(), *table.parameters()])
    seen: list[str] = []

    def arguments() -> tuple[Any, ...]:
        style = table(LABELS)
        style.register_hook(lambda g: seen.append("style") or 0.5 * g)
        return (style,)

    table.weight.register_hook(lambda g: seen.append("table") or 2 * g.abs())
    for _ in range(3):
        seen.clear()
        pair.check(args=arguments)
        assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
        assert seen
