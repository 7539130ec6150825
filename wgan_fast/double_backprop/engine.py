"""The engine as the rest of the package sees it: plans made on first use and kept per critic, shape and state."""

import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten

from .capture import first_line, plain_attributes
from .plan import Objective, Plan, Schedule, StepOutput

MOST_PLANS = 64
"""Of one engine; the oldest gives way."""


class FourPassEngine:
    """Runs one objective on one critic.

    Args:
        critic: The critic; its parameters are read at every call.
        objective: What to compute.
        schedule: As in ``Plan``.
        compile: Compile the flat graph with ``torch.compile``; where that fails, warn and run it as it is.
    """

    def __init__(
        self, critic: nn.Module, objective: Objective, *, schedule: Schedule = "auto", compile: bool = False
    ) -> None:
        # Weakly: plans are kept for as long as the critic lives, and must not keep it alive.
        self._critic = weakref.ref(critic)
        self.objective, self.schedule, self.compile = objective, schedule, compile
        self.plans: dict[Hashable, Plan] = {}
        self._warned = False
        self._written: set[tuple[int, str]] = set()
        """Attributes that the critic's own forward writes, such as counters: they do not ask for a new plan."""

    @property
    def critic(self) -> nn.Module:
        """The critic."""
        critic = self._critic()
        assert critic is not None, "an engine is called by those who hold its critic"
        return critic

    def __call__(
        self,
        batches: Mapping[str, Tensor],
        critic_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
        given: Mapping[int, Tensor] | None = None,
    ) -> StepOutput:
        """Run one step.

        Args:
            batches: What the objective takes of ``real``, ``fake``, ``alpha`` ``[N]`` and ``points`` by name.
            critic_args: Further positional arguments of the critic, given with every batch.
            critic_kwargs: Keyword arguments of the critic.
            given: What to read in place of the critic's parameters and buffers, by their ids.

        Returns:
            The figures and the gradients, aligned with ``plan.parameters``.

        Raises:
            CaptureError: The critic cannot run in four passes; nothing has been computed then.
        """
        return self.run(self.plan(batches, critic_args, critic_kwargs), batches, critic_args, critic_kwargs, given)

    def run(
        self,
        plan: Plan,
        batches: Mapping[str, Tensor],
        critic_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
        given: Mapping[int, Tensor] | None = None,
    ) -> StepOutput:
        """Run one step on the plan that was made for these batches; the rest as in a call."""
        leaves, _ = _flat(critic_args, critic_kwargs)
        owned = [(given or {}).get(id(tensor), tensor) for tensor in plan.owned()]
        return plan.run(owned, [_laid_out(batches[name].detach(), like) for name, like in plan.layout.items()], leaves)

    def plan(
        self,
        batches: Mapping[str, Tensor],
        critic_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Return the plan for these batches, made now if there is none."""
        key = self._key(batches, critic_args, critic_kwargs)
        plan = self.plans.get(key)
        if plan is None:
            plan = self._make(batches, critic_args, critic_kwargs)
            self._written |= plan.captured.written
            self._keep(self._key(batches, critic_args, critic_kwargs), plan)
        return plan

    def _keep(self, key: Hashable, plan: Plan) -> None:
        self.plans[key] = plan
        if len(self.plans) > MOST_PLANS:
            del self.plans[next(iter(self.plans))]
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the critic was planned {MOST_PLANS} times, which takes a while each time: batch shapes change, "
                    "or a number that its forward reads does (a buffer may change without a new plan)",
                    RuntimeWarning, stacklevel=6,
                )  # fmt: skip

    def has_plan(
        self,
        batches: Mapping[str, Tensor],
        critic_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Whether there is a plan for these batches."""
        return self._key(batches, critic_args, critic_kwargs) in self.plans

    def _key(
        self,
        batches: Mapping[str, Tensor],
        critic_args: tuple[Any, ...],
        critic_kwargs: Mapping[str, Any] | None,
    ) -> Hashable:
        example = _example(batches)
        leaves, spec = _flat(critic_args, critic_kwargs)
        device = example.device.type
        return (
            example.shape, example.stride(), example.dtype, example.device,
            tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves), spec,
            _state(self.critic, self._written),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )  # fmt: skip

    def _make(
        self,
        batches: Mapping[str, Tensor],
        critic_args: tuple[Any, ...],
        critic_kwargs: Mapping[str, Any] | None,
    ) -> Plan:
        example = _example(batches).detach()

        plan = Plan(
            self.critic,
            self.objective,
            example,
            critic_args,
            critic_kwargs,
            schedule=self.schedule,
            in_place=not self.compile,
        )
        if self.compile:
            plan.compiled = _Compiled(plan.graph)
        return plan


def _flat(critic_args: tuple[Any, ...], critic_kwargs: Mapping[str, Any] | None) -> tuple[list[Any], Any]:
    """Flatten the critic's further arguments; mostly there are none, and that need not take 7 microseconds."""
    return tree_flatten((critic_args, dict(critic_kwargs or {}))) if critic_args or critic_kwargs else ([], None)


def _state(critic: nn.Module, written: set[tuple[int, str]]) -> Hashable:
    """What a forward method may read besides the values of tensors, less the attributes that it writes itself.

    Globals and what closures hold are not seen; a capture takes them as they are.
    """
    found: list[Any] = []
    pending = [critic]
    while pending:
        module = pending.pop()
        plain = plain_attributes(module)
        if written:
            plain = {name: value for name, value in plain.items() if (id(module), name) not in written}
        found += [type(module), id(module.__dict__.get("forward")), *plain.items()]
        # By their numbers, which no two hooks share.
        found += map(tuple, (module._forward_hooks, module._forward_pre_hooks))
        found += map(tuple, (module._backward_hooks, module._backward_pre_hooks))
        found += [
            (id(p), p.requires_grad, p.dtype, p.device, p.shape) for p in module._parameters.values() if p is not None
        ]
        pending += [child for child in module._modules.values() if child is not None]
    return tuple(found)


class _Compiled:
    """A flat graph under ``torch.compile``, or as it is where the compiler fails."""

    def __init__(self, graph: Callable[..., Any]) -> None:
        self._graph, self._run = graph, torch.compile(graph, fullgraph=True, dynamic=False)
        self._proven = False

    def __call__(self, *args: Any) -> Any:
        if self._proven:
            return self._run(*args)
        try:
            result = self._run(*args)
        except Exception as error:
            warnings.warn(
                f"the compiler failed, the step runs uncompiled: {first_line(error)}", RuntimeWarning, stacklevel=4
            )
            self._run = self._graph
            result = self._graph(*args)
        self._proven = True
        return result


def _example(batches: Mapping[str, Tensor]) -> Tensor:
    return next(batches[name] for name in ("real", "points", "fake") if name in batches)


def _laid_out(tensor: Tensor, like: tuple[torch.Size, tuple[int, ...]]) -> Tensor:
    """Give a batch the strides that it was planned with."""
    shape, stride = like
    if tensor.stride() == stride or tensor.shape != shape:
        return tensor
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class _Attached(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        gradients = ctx.saved_tensors
        if all(gradient.dtype == cotangent.dtype for gradient in gradients):
            scaled = torch._foreach_mul(gradients, cotangent)
        else:
            scaled = tuple(gradient * cotangent.to(gradient.dtype) for gradient in gradients)
        return None, None, *scaled, *[None] * len(gradients)


def attach(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return ``value`` such that its ``.backward()`` gives ``parameters`` their ``gradients``, scaled from above.

    Once differentiable: the gradients themselves are constants.
    """
    pairs = [(p, g) for p, g in zip(parameters, gradients) if g is not None]
    if not pairs or not torch.is_grad_enabled():
        return value
    return _Attached.apply(value, len(pairs), *[p for p, _ in pairs], *[g for _, g in pairs])  # type: ignore[no-any-return,no-untyped-call]
