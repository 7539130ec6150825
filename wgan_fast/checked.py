"""A net under the engine: its steps compared with plain autograd, on a copy of the critic in float64."""

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import reference
from .double_backprop import Objective, Planned, StepOutput

FIRST_STEPS, ONE_IN = 3, 1000
"""Of every plan, the steps that are compared: the first ones, and then one in so many."""


def asked_for() -> bool:
    """Whether the environment asks for every step to be checked."""
    return os.environ.get("WGAN_FAST_CHECK", "") not in ("", "0")


def is_due(planned: Planned) -> bool:
    """Whether the next step of a plan is one to compare; of those that draw random numbers, only single forwards."""
    if planned.plan.draws and len(planned.plan.objective.parts()) > 1:
        return False
    return planned.plan.runs < FIRST_STEPS or planned.plan.runs % ONE_IN == 0 or planned.suspect


class GradientsDifferError(RuntimeError):
    """The engine's gradients are not autograd's: a mistake in this package."""


@dataclass
class Check:
    """A critic as it is before a step, to be differentiated after it.

    Args:
        critic: The critic.
        args: Its further positional arguments.
        kwargs: Its keyword arguments.
    """

    critic: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.random = torch.get_rng_state()
        self.buffers = _buffers(self.critic)
        self.memo: dict[int, Any] = {}
        self.double: nn.Module | None = None
        try:
            if isinstance(self.critic, nn.Module):
                self.double = copy.deepcopy(self.critic, self.memo).double()
        except Exception:
            # Not everything can be copied: then it is differentiated itself, in its own precision.
            self.double = None

    def __call__(
        self,
        objective: Objective,
        batches: Mapping[str, Tensor],
        planned: Planned,
        tensors: Sequence[Tensor],
        output: StepOutput,
    ) -> None:
        """Compare a step with autograd's.

        Raises:
            GradientsDifferError: They differ by more than roundings explain, at two checks in a row.
        """
        copies = [self.memo.get(id(tensor)) for tensor in tensors]
        after = torch.get_rng_state()
        try:
            own = self._differentiate(self.critic, objective, batches, tensors, torch.float32)
            truth = own
            if self.double is not None and all(isinstance(twin, Tensor) for twin in copies):
                try:
                    truth = self._differentiate(self.double, objective, batches, copies, torch.float64)
                except RuntimeError:
                    # A tensor of its own that no module moves stays in float32.
                    truth = own
        finally:
            torch.set_rng_state(after)
        error, expected = _distance(output.gradients, truth), _distance(own, truth)
        epsilon = torch.finfo(batches[next(iter(batches))].dtype).eps
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            epsilon = torch.finfo(torch.bfloat16).eps
        if error <= max(10 * expected, epsilon**0.5):
            planned.suspect = False
            return
        # A rounding may move one activation across a kink, but not at every step.
        if not planned.suspect and epsilon > torch.finfo(torch.float64).eps:
            planned.suspect = True
            return
        raise GradientsDifferError(
            f"the gradients in four passes are off by {error:.1e} of autograd's, of which roundings explain "
            f"{max(10 * expected, epsilon**0.5):.1e}: this is a mistake in wgan_fast. Please report it with the "
            'critic, its explain() and the output of `wgan-fast info`; engine="autograd" is right'
        )

    def _differentiate(
        self,
        critic: Callable[..., Tensor],
        objective: Objective,
        batches: Mapping[str, Tensor],
        tensors: Sequence[Any],
        least: torch.dtype,
    ) -> list[Tensor | None]:
        def forward(x: Tensor) -> Tensor:
            args, kwargs = self.args, dict(self.kwargs)
            if least == torch.float64:
                x, args, kwargs = tree_map_only(Tensor, _widened, (x, args, kwargs))
            # Buffers that a forward changes, such as those of spectral norm, are for each batch what they were.
            with _as_before(critic, self.buffers):
                torch.set_rng_state(self.random)
                return critic(x, *args, **kwargs)

        with torch.enable_grad():
            terms: list[Tensor] = []
            if objective.loss is not None:
                scores = [forward(batches[name]) for name in ("real", "fake")]
                terms.append(objective.loss(*[s if s.dtype == torch.float64 else s.float() for s in scores]))
            if objective.weight is not None:
                points = [batches.get("points", batches.get(name)) for name in objective.points()]
                if least == torch.float64:
                    points = [x.double() for x in points]  # type: ignore[union-attr]
                value, _ = reference.gradient_penalty(
                    forward,
                    points,  # type: ignore[arg-type]
                    weight=objective.weight,
                    target=objective.target,
                    one_sided=objective.one_sided,
                    group_size=objective.group_size,
                )
                terms.append(value)
            total = sum(terms[1:], terms[0])
            wanted = [tensor for tensor in tensors if tensor.requires_grad]
            if not wanted or not total.requires_grad:
                return [None for _ in tensors]
            return list(torch.autograd.grad(total, wanted, allow_unused=True))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _buffers(critic: Any) -> list[Tensor]:
    return [buffer.detach().clone() for buffer in critic.buffers()] if isinstance(critic, nn.Module) else []


@contextmanager
def _as_before(critic: Any, buffers: list[Tensor]) -> Iterator[None]:
    """Run a forward on buffers as they were, and leave them as they are."""
    if not isinstance(critic, nn.Module):
        yield
        return
    live = list(critic.buffers())
    now = [buffer.data for buffer in live]
    for buffer, before in zip(live, buffers):
        # Not in place: what autograd saved must stay.
        buffer.data = before.to(buffer, copy=True)
    try:
        yield
    finally:
        for buffer, after in zip(live, now):
            buffer.data = after


def _distance(gradients: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> float:
    """‖g − truth‖ / ‖truth‖ over all gradients, joined; None counts as zeros."""
    square = total = 0.0
    for gradient, expected in zip(gradients, truth):
        ours = 0.0 if gradient is None else gradient.detach().double()
        theirs = 0.0 if expected is None else expected.detach().double()
        square += float(torch.as_tensor(ours - theirs).square().sum())
        total += float(torch.as_tensor(theirs).square().sum())
    return math.sqrt(square / total) if total else math.sqrt(square)
