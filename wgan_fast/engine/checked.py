"""A net under the engine: its steps compared with plain autograd, on copies of the critic, one in float64.

What cannot be copied, a function say, is not compared.
"""

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

from .. import reference
from ..checks import Score, picked
from ..four_pass import Objective, StepOutput
from .planned import Planned

FIRST_STEPS, ONE_IN = 3, 1000
"""Of every plan, the steps that are compared: the first ones, and then one in so many."""


def asked_for() -> bool:
    """Whether the environment asks for a check of every critic."""
    return os.environ.get("WGAN_FAST_CHECK", "") not in ("", "0")


def is_due(planned: Planned) -> bool:
    """Whether the next step of a plan is one to compare; of those that draw random numbers, only single forwards."""
    if planned.plan.draws and planned.plan.objective.batches() > 1:
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
        score: What of its output is differentiated.
    """

    critic: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    score: Score = None

    def __post_init__(self) -> None:
        self.random = _random_state()
        self.buffers = _buffers(self.critic)
        self.twins: list[tuple[nn.Module, dict[int, Any]]] = []
        try:
            if isinstance(self.critic, nn.Module):
                for _ in range(2):
                    memo: dict[int, Any] = {}
                    self.twins.append((copy.deepcopy(self.critic, memo), memo))
                self.twins[1][0].double()
        except Exception:
            self.twins = []

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
        known = [i for i, t in enumerate(tensors) if self.twins and all(id(t) in memo for _, memo in self.twins)]
        after, found = _random_state(), []
        try:
            for (twin, memo), least in zip(self.twins, (torch.float32, torch.float64)):
                copies = [memo[id(tensors[i])] for i in known]
                found.append(self._differentiate(twin, objective, batches, copies, least))
        except Exception:
            # Autograd cannot, or a tensor of the critic's own stays in float32.
            return
        finally:
            _set_random_state(after)
        if not known:
            return
        own, truth = found
        error, expected = _distance([output.gradients[i] for i in known], truth), _distance(own, truth)
        dtype = next(iter(batches.values())).dtype
        autocast = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        epsilon = torch.finfo(torch.bfloat16 if autocast else dtype).eps
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
                _set_random_state(self.random)
                return picked(critic(x, *args, **kwargs), self.score)  # type: ignore[no-any-return]

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
                    **objective.norm_options,
                )
                terms.append(value)
            total = sum(terms[1:], terms[0])
            wanted = [tensor for tensor in tensors if tensor.requires_grad]
            if not wanted or not total.requires_grad:
                return [None for _ in tensors]
            return list(torch.autograd.grad(total, wanted, allow_unused=True))


def _random_state() -> tuple[Tensor, list[Tensor]]:
    on_gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpus else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


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
