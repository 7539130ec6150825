"""Nothing is timed that is not right: every variant's gradients against autograd's in float64."""

from functools import cache

import torch
from torch import Tensor

from ..critic_step import Precision
from .step import Step
from .variants import Computes, Variant, naive
from .workloads import SEED, Workload, repeatable

EPSILON: dict[Precision, float] = {"fp32": 2.0**-23, "bf16": 2.0**-7}


DRAWS = 3
"""Batches that a variant is tried on before it is refused."""


class WrongGradientsError(Exception):
    """A variant's gradients are not those of the objective."""


class PatientChecker:
    """Refuses a variant that is wrong on every one of ``DRAWS`` batches.

    Rounding decides on which side of its kink an activation within rounding of it falls, and the gradient of either
    side is right; but they differ by far more than rounding, most of all behind batch norm, where one activation moves
    all samples. That is luck of the batch: of critics with batch norm one batch in ten falls so, for the naive step as
    for any other. A wrong step is off on every batch.

    Deciding in float64, where kinks are out of reach, would judge other code than what is timed: a compiled step is
    compiled anew, and kernels, autocast and JAX have no float64 form here.

    Args:
        workload: The workload; the batches after its own are drawn from other seeds.
    """

    def __init__(self, workload: Workload) -> None:
        self._checker = cache(lambda draw: Checker(workload.redrawn(SEED + draw) if draw else workload))

    def check(self, name: str, variant: Variant, step: Step) -> float:
        """Check a variant as ``Checker`` does, on one batch after the other.

        Args:
            name: As for ``Checker``.
            variant: As for ``Checker``; for batches after the first a step is prepared anew.
            step: The step on the workload's own batch.

        Returns:
            The error on the first batch where it is small enough.

        Raises:
            WrongGradientsError: There is none; what is told is the first batch's.
        """
        found: list[WrongGradientsError] = []
        for draw in range(DRAWS):
            checker = self._checker(draw)
            try:
                return checker.check(name, variant, variant.prepare(checker.workload) if draw else step)
            except WrongGradientsError as error:
                found.append(error)
        raise WrongGradientsError(f"{found[0]}, nor are they right on {DRAWS - 1} other batches") from found[0]


class Checker:
    """Holds the truth about a workload's batch, computed once, against its variants.

    Args:
        workload: The workload.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._double = workload.double()
        self._truth = cache(self._differentiate)
        self._naive_error = cache(self._measure_naive)

    def check(self, name: str, variant: Variant, step: Step) -> float:
        """Compare a step's gradients, at given α and with everything that varies switched off, with float64's.

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
        # Spectral norm's vectors, which every forward in between has moved.
        for buffer, original in zip(step.critic.buffers(), self._double.critic.buffers()):
            buffer.copy_(original)
        with repeatable(step.critic):
            step(self.workload.alpha)
        truth = self._truth(computes)
        return float((_joined(step.gradients()).to(truth) - truth).norm() / truth.norm())

    def _differentiate(self, computes: Computes) -> Tensor:
        step = naive(self._double, computes=computes)
        with repeatable(step.critic):
            step(self._double.alpha)
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
