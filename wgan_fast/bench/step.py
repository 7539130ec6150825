"""What every way to compute a workload comes down to: a call, and the gradients that it left."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Skipped(Exception):  # noqa: N818 (no error: a variant that does not apply here)
    """Why a variant cannot be timed on a workload."""


class Step:
    """One way to compute a workload, ready to be called again and again.

    Args:
        run: Called with α ``[N]``, or None to draw it.
        critic: Whose ``.grad`` holds the result.
        scale: What a measured time is multiplied by.
    """

    def __init__(self, run: Callable[[Tensor | None], object], critic: nn.Module, *, scale: float = 1.0) -> None:
        self.run, self.critic, self.scale = run, critic, scale

    def __call__(self, alpha: Tensor | None = None) -> None:
        """Compute the gradients."""
        self.run(alpha)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the last call, in the order of ``critic.parameters()``; zeros where it left none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.critic.parameters()]
