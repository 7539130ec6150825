"""Nothing is timed that is not right: every variant's gradients against autograd's in float64."""

from functools import cache

import torch
from torch import Tensor

from ..critic_step import Precision
from .step import Step
from .variants import Computes, Variant, naive
from .workloads import Workload, without_dropout

EPSILON: dict[Precision, float] = {"fp32": 2.0**-23, "bf16": 2.0**-7}


class WrongGradientsError(Exception):
    """A variant's gradients are not those of the objective."""


class Checker:
    """Holds the truth about a workload, computed once, against its variants.

    Args:
        workload: The workload.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._truth = cache(self._differentiate)
        self._naive_error = cache(self._measure_naive)

    def check(self, name: str, variant: Variant, step: Step) -> float:
        """Compare a step's gradients, at given α and without dropout, with autograd's in float64.

        Args:
            name: What to call the variant in an error.
            variant: What the step is made from.
            step: The step.

        Returns:
            ‖g − truth‖ / ‖truth‖ over the gradients of all parameters, joined.

        Raises:
            WrongGradientsError: That is more than ``variant.allowed_factor`` times what it is for the well-written
                naive step in the same precision, of images in the worse memory format, and more than four roundings.
        """
        error = self._error(step, variant.computes)
        naive_error = self._naive_error(variant.computes, variant.precision)
        # Naive's own error is one draw: where it is lucky, a factor of it is no measure.
        allowed = max(variant.allowed_factor * naive_error, 4 * EPSILON[variant.precision])
        if not error <= allowed:  # NaN is wrong too
            raise WrongGradientsError(
                f"{name} on {self.workload.key}: the gradients are off by {error:.1e}, allowed are {allowed:.1e}; "
                f"naive's are off by {naive_error:.1e}"
            )
        return error

    def _error(self, step: Step, computes: Computes) -> float:
        with without_dropout(step.critic):
            step(self.workload.alpha)
        truth = self._truth(computes)
        return float((_joined(step.gradients()).to(truth) - truth).norm() / truth.norm())

    def _differentiate(self, computes: Computes) -> Tensor:
        double = self.workload.double()
        step = naive(double, computes=computes)
        with without_dropout(double.critic):
            step(double.alpha)
        return _joined(step.gradients())

    def _measure_naive(self, computes: Computes, precision: Precision) -> float:
        # A rounding that moves an activation across a kink makes the gradient jump: one layout alone may be lucky.
        images = self.workload.real.dim() == 4
        layouts = [self.workload, self.workload.channels_last()] if images else [self.workload]
        error = max(self._error(naive(workload, precision, computes), computes) for workload in layouts)
        # Losing more than half of the digits is no rounding.
        if not error <= EPSILON[precision] ** 0.5:
            raise WrongGradientsError(f"naive on {self.workload.key}: the gradients are off by {error:.1e}")
        return error


def _joined(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).double()
