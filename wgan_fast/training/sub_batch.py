"""A critic step whose penalty looks at a part of the batch: it costs less, and is noisier."""

import contextlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..autograd import leave, penalty_at
from ..checks import Engine
from ..critic_step import CriticStep, CriticStepResult, Precision
from ..double_backprop import Objective
from ..engines import EngineChoice, GivenWay
from ..ops.samples import empty
from ..penalty import PenaltyConfig, penalty_points


class SubBatchCriticStep:
    """As ``CriticStep``, with the penalty on every ``stride``-th of its points alone.

    The penalty stays a mean, over fewer points: where these are independent, and the critic looks at each alone, its
    expectation and that of its gradient are those of the whole batch, and their variance is ``stride`` times as large.
    Of the four passes' 10 critic forwards over a batch, 4 shrink to 4 / ``stride``; loss and penalty run apart, so that
    small critics gain nothing, and that spectral norm makes two power iterations a step in four passes. Batch norm
    takes the penalty's statistics from the part.

    Args:
        critic: As in ``CriticStep``.
        loss: As in ``CriticStep``.
        penalty: What to penalise, at one set of points (not at "both") of single samples.
        stride: Points of the batch for each one that is penalised.
        engine: As in ``CriticStep``.
        compile: As in ``CriticStep``.
        precision: As in ``CriticStep``.

    Attributes:
        steps_taken: Calls so far; decides which steps carry a lazy penalty.

    Raises:
        TypeError: As ``CriticStep``.
        ValueError: As ``CriticStep``, or the penalty is at "both" or of groups.
    """

    def __init__(
        self,
        critic: nn.Module,
        *,
        loss: str,
        penalty: PenaltyConfig,
        stride: int,
        engine: Engine,
        compile: bool,
        precision: Precision,
    ) -> None:
        if penalty.at == "both":
            raise ValueError('penalty must be at one set of points, got at="both"')
        if penalty.group_size > 1:
            raise ValueError(f"penalty must have a group_size of 1, got {penalty.group_size}")
        self._loss = CriticStep(critic, loss=loss, penalty=None, engine=engine, compile=compile, precision=precision)
        self._penalty = replace(penalty, weight=penalty.weight * penalty.every)
        objective = Objective(
            weight=self._penalty.weight, target=penalty.target, one_sided=penalty.one_sided, at="given"
        )
        self._four_passes = EngineChoice(critic, objective, engine, compile=compile)
        self._stride = stride
        self.steps_taken = 0

    def __call__(self, real: Tensor, fake: Tensor, alpha: Tensor | None = None) -> CriticStepResult:
        """Run one step.

        Args:
            real: Real samples ``[N, *D]``.
            fake: Generated samples of the same shape, dtype and device.
            alpha: α of every sample, ``[N]``, penalised or not; None draws it.

        Returns:
            As ``CriticStep``.

        Raises:
            TypeError: As ``CriticStep``.
            ValueError: As ``CriticStep``.
        """
        points = None
        if self.steps_taken % self._penalty.every == 0:
            # DRAGAN's perturbation depends on the spread of the whole batch.
            (whole,) = penalty_points(self._penalty, real, fake, alpha, None)
            points = self._thinned(whole)
        result = self._loss(real, fake, alpha)
        if points is not None:
            penalty, norm = self._penalise(points)
            result = result._replace(loss=result.loss + penalty, penalty=penalty, gradient_norm=norm)
        self.steps_taken += 1
        return result

    def _thinned(self, samples: Tensor) -> Tensor:
        kept = samples[:: self._stride]
        return empty(samples, kept.shape[0], samples.dtype).copy_(kept)

    def _penalise(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Add the penalty's gradients to those of the loss; returns the penalty and the mean gradient norm."""
        bf16 = self._loss.precision == "bf16"
        autocast = torch.autocast(points.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with torch.enable_grad(), autocast:
            step = self._four_passes.prepare(points, (), None)
            if isinstance(step, GivenWay):
                penalty, norm = penalty_at(self._loss.critic, points, **self._penalty.norm_options)
                penalty.backward()  # type: ignore[no-untyped-call]
                step.confirm()
                return penalty.detach(), norm
        output = step.run({"points": points})
        assert output.penalty is not None
        assert output.gradient_norm is not None
        leave(step.tensors, output.gradients)
        return output.penalty, output.gradient_norm
