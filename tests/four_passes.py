"""The four-pass engine called in one go, without the choices and the gradients' way into ``.grad`` around it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from wgan_fast.engine import planned
from wgan_fast.engine.guarded import Called
from wgan_fast.engine.planned import summed
from wgan_fast.four_pass import Plan, StepOutput


class FourPassEngine(planned.FourPassEngine):
    """An engine that is called with batches by name: ``real``, ``fake``, ``points``."""

    def __call__(
        self, batches: Mapping[str, Tensor], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> StepOutput:
        """Run one step; the gradients are those of the critic's trainable parameters, in order."""
        step = self.prepare(Called(self.critic, _example(batches), args, kwargs or {}))
        output = step.run(batches)
        gradients = summed(step.tensors, output.gradients)
        parameters = self.critic.parameters() if isinstance(self.critic, nn.Module) else step.tensors
        return output._replace(gradients=[gradients.get(id(p)) for p in parameters if p.requires_grad])

    def plan(
        self, batches: Mapping[str, Tensor], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Plan:
        """Return the plan for these batches, made now if there is none; the critic stays as it is."""
        return self.planned(Called(self.critic, _example(batches), args, kwargs or {})).plan


def _example(batches: Mapping[str, Tensor]) -> Tensor:
    return next(batches[name] for name in ("real", "points", "fake") if name in batches)
