"""Noticing that training has diverged, without making the host wait for the device at every step."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DivergenceError
from .iteration import IterationResult

# The penalty before the loss, which contains it.
QUANTITIES = ("the gradient penalty", "the critic's loss", "the generator's loss")


class DivergedError(DivergenceError):
    """A quantity is not finite.

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
    """

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def put(self, step: int, result: IterationResult) -> float:
        """Note the losses of ``step``, and check those of the step before (on a CPU: these).

        Returns:
            How many processes were asked to stop, as far as is known here.

        Raises:
            DivergedError: A checked loss is not finite.
        """
        losses = (result.critic.penalty, result.critic.loss, result.generator_loss, result.stopping)
        values = torch.stack([loss.double() for loss in losses])
        copied = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(losses[0].device))  # not the current device's
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
            for name, loss in zip(QUANTITIES, losses):
                if not math.isfinite(loss):
                    raise DivergedError(f"{name} is {loss}", step)
        return stopping
