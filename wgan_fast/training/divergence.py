"""Noticing that training has diverged, without making the host wait for the device at every step, and saying why."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DivergenceError
from .config import TrainConfig
from .iteration import IterationResult

# The penalty before the loss, which contains it.
QUANTITIES = ("the gradient penalty", "the critic's loss", "the generator's loss", "the Wasserstein estimate")

PENALTY_LIMIT = 1e7
"""Of the penalty over its weight: a gradient norm of 3,000 where 1 is asked for. Measured over all methods and learning
rates up to 0.1, on points, digits and values of 1e5: at most 2e4; at a learning rate of 1, 1e7 and more."""

ESTIMATE_LIMIT = 1e5
"""Of the Wasserstein estimate over the norm of a sample, which bounds it for a critic of slope 1. Likewise measured: at
most 300, and 1e6 and more."""


class DivergedError(DivergenceError):
    """A quantity is not finite, or larger than any training explains.

    Attributes:
        what: The quantity and its value.
        step: At which it was seen.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"training diverged at step {step}: {what}")
        self.what, self.step = what, step


class _Pending(NamedTuple):
    step: int
    values: Tensor
    copied: torch.cuda.Event | None


class LossWatch:
    """Looks at the losses of every iteration: on a CPU at once, on a GPU when the next one has been launched.

    Until then the copy to the host has long arrived, so that reading it does not make the device run dry.

    Args:
        size: Norm of a real sample; 0 looks at no more than whether figures are finite.
        weight: Of the penalty.
    """

    def __init__(self, size: float = 0.0, weight: float = 0.0) -> None:
        self._limits = (PENALTY_LIMIT * weight or math.inf, math.inf, math.inf, ESTIMATE_LIMIT * size or math.inf)
        self._pending: list[_Pending] = []

    def put(self, step: int, result: IterationResult) -> float:
        """Note the losses of ``step``, and check those of the step before (on a CPU: these).

        Returns:
            How many processes were asked to stop, as far as is known here.

        Raises:
            DivergedError: A checked loss is not finite, or exploded.
        """
        values, copied = result.watched, None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(result.watched.device))  # not the current device's
        self._pending.append(_Pending(step, values, copied))
        return self._check(leave=0 if copied is None else 1)

    def flush(self) -> float:
        """Check everything noted so far, waiting for it; returns and raises as ``put``."""
        return self._check(leave=0)

    def clear(self) -> None:
        """Forget what was noted: training goes on from elsewhere."""
        self._pending.clear()

    def _check(self, leave: int) -> float:
        stopping = 0.0
        while len(self._pending) > leave:
            step, values, copied = self._pending.pop(0)
            if copied is not None:
                copied.synchronize()
            *losses, stopping = values.tolist()
            for name, loss, limit in zip(QUANTITIES, losses, self._limits):
                if not abs(loss) <= limit or math.isinf(loss):
                    raise DivergedError(f"{name} is {loss:.4g}", step)
        return stopping


def advice(config: TrainConfig, value: float) -> str:
    """Say what is likely to have made a run diverge, and what to try.

    Args:
        config: The resolved configuration.
        value: Root mean square of the data's values.
    """
    likely, usual = [], config.recipe.learning_rate
    rate = max(config.learning_rate or 0.0, config.generator_learning_rate or 0.0)
    if rate > 10 * usual:
        likely.append(f"a learning rate of {rate:g} where {usual:g} is usual")
    if value > 100:
        likely.append(f"values of about {value:.0g} in the data: bring them near [-1, 1]")
    if config.loss == "wasserstein" and config.penalty is None and config.clip is None:
        likely.append("a Wasserstein critic without penalty, whose slope nothing bounds")
    if config.precision == "bf16":
        likely.append("the precision of bf16")
    tries = [f"--learning-rate {usual if rate > 10 * usual else rate / 4:g}"] if rate else ["a lower learning rate"]
    if config.clip_gradients is None:
        tries.append("--clip-gradients 1")
    because = f"likely because of {', and '.join(likely)}; " if likely else ""
    return f"{because}try {' or '.join(tries)}"
