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
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import reference
from ..checks import picked
from ..four_pass import Objective, Plan, StepOutput
from ..four_pass.blocks import joined
from ..four_pass.capture import Output
from .guarded import Called
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
        called: The critic, and what it is called with.
    """

    called: Called

    def __post_init__(self) -> None:
        self.critic = self.called.critic
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
        batches: Mapping[str, Any],
        planned: Planned,
        tensors: Sequence[Tensor],
        output: StepOutput,
        given: Sequence[Tensor | None] = (),
    ) -> None:
        """Compare a step with autograd's; of what others computed between its pieces, ``given`` are the derivatives.

        Raises:
            GradientsDifferError: They differ by more than roundings explain, at two checks in a row.
        """
        known = [i for i, t in enumerate(tensors) if self.twins and all(id(t) in memo for _, memo in self.twins)]
        after, found = _random_state(), []
        try:
            for (twin, memo), least in zip(self.twins, (torch.float32, torch.float64)):
                copies = [memo[id(tensors[i])] for i in known]
                found.append(self._differentiate(twin, objective, batches, copies, least, planned.plan, iter(given)))
        except Exception:
            # Autograd cannot, or a tensor of the critic's own stays in float32.
            return
        finally:
            _set_random_state(after)
        if not known:
            return
        own, truth = found
        error, expected = _distance([output.gradients[i] for i in known], truth), _distance(own, truth)
        dtype = self.called.first.dtype
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
        batches: Mapping[str, Any],
        tensors: Sequence[Any],
        least: torch.dtype,
        plan: Plan,
        given: Iterator[Tensor | None],
    ) -> list[Tensor | None]:
        captured = plan.captured

        def forward(x: Any, name: str) -> dict[int, Tensor]:
            args, kwargs = self.called.further(name)
            kwargs = dict(kwargs)
            if least == torch.float64:
                x, args, kwargs = tree_map_only(Tensor, _widened, (x, args, kwargs))
            # Buffers that a forward changes, such as those of spectral norm, are for each batch what they were.
            with _as_before(critic, self.buffers):
                _set_random_state(self.random)
                made = critic(x, *args, **kwargs)
            values = tree_leaves(tuple(picked(made, pick) for pick in self.called.picks))
            return {
                leaf.number: value
                for leaf, value in zip(tree_leaves(captured.picks), values)
                if isinstance(leaf, Output)
            }

        def of(nodes: list[Any], made: dict[int, Tensor]) -> list[Tensor]:
            return [made[captured.outputs.index(node)] for node in nodes]

        def along(values: list[Tensor]) -> list[Tensor]:
            pairs = [(value, next(given)) for value in values]
            return [(value * cotangent.to(value.dtype)).sum() for value, cotangent in pairs if cotangent is not None]

        with torch.enable_grad():
            terms: list[Tensor] = []
            if objective.has_loss:
                sides = [forward(batches[name], name) for name in objective.sides]
                if objective.loss is None:
                    terms += [term for side in sides for term in along(of(plan.differentiable, side))]
                else:
                    scores = [joined(of(captured.picked(-1), side)) for side in sides]
                    terms.append(objective.loss(*[s if s.dtype == torch.float64 else s.float() for s in scores]))
            for name in objective.points():
                points = tree_map_only(Tensor, Tensor.detach, batches[name])
                if least == torch.float64:
                    points = tree_map_only(Tensor, _widened, points)
                leaves = tree_leaves(points)
                leaves = [leaves[captured.sampled[node]].requires_grad_() for node in captured.samples]
                scores = of(captured.picked(0), forward(points, name))
                ones = [torch.ones_like(part) for part in scores]
                gradient = torch.autograd.grad(scores, leaves, ones, create_graph=True, materialize_grads=True)
                if objective.outside_penalty:
                    terms += along(scores) if objective.outside_scores else []
                    terms += along([*gradient])
                    continue
                norm = reference.gradient_norm(torch.cat([g.flatten(1) for g in gradient], 1), objective.group_size)
                options = objective.norm_options
                del options["group_size"]
                terms.append(reference.penalty_from_norm(norm, **options))
            if not terms:
                return [None for _ in tensors]
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
