"""What a step computes, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
Schedule = Literal["auto", "batched", "split"]


@dataclass(frozen=True)
class Objective:
    """What a plan computes.

    Attributes:
        loss: ``(real_scores, fake_scores) -> 0-dim``; None for the penalty alone.
        weight: The penalty's factor; None for the loss alone.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
        at: "real", "fake" or "both" for the penalty on the samples themselves; "given" for points that are passed in.
        group_size: Samples that share one norm.
    """

    loss: Loss | None = None
    weight: float | None = 10.0
    target: float = 1.0
    one_sided: bool = False
    at: Literal["real", "fake", "both", "given"] = "given"
    group_size: int = 1

    def batches(self) -> int:
        """Count the batches that a plain implementation sends through the critic."""
        return 2 * bool(self.loss) + len(self.points())

    @property
    def norm_options(self) -> dict[str, Any]:
        """What of it says how a gradient's norm is penalised, as keyword arguments."""
        return {name: getattr(self, name) for name in ("weight", "target", "one_sided", "group_size")}

    def form(self) -> "Objective":
        """Return the objective with the numbers left out that a plan takes at every step."""
        return self if self.weight is None else replace(self, weight=1.0, target=0.0)

    def points(self) -> list[str]:
        """Return the batches at which the gradient is penalised."""
        if self.weight is None:
            return []
        return {"both": ["real", "fake"], "given": ["points"]}.get(self.at, [self.at])

    def inputs(self) -> list[str]:
        """Return the batches that a step is given."""
        losses = ["real", "fake"] if self.loss else []
        return [*losses, *(name for name in self.points() if name not in losses)]


class StepOutput(NamedTuple):
    """Figures of one step, 0-dim tensors (None where the objective has no such part), and the gradients."""

    loss: Tensor | None
    penalty: Tensor | None
    real_score: Tensor | None
    fake_score: Tensor | None
    gradient_norm: Tensor | None
    gradients: list[Tensor | None]


class RefusedError(Exception):
    """What a user did wrong was found while planning; carries the error to raise."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
