"""What a step computes, and what it gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

Loss = Callable[..., Tensor]
Batches = Mapping[str, Sequence[Any]]
"""What a critic is called with, by batch: the leaves of its samples, then of further arguments of that batch's own."""
Schedule = Literal["auto", "batched", "split"]


@dataclass(frozen=True)
class Objective:
    """What a plan computes.

    A loss or a penalty that is any function at all is left to whoever runs the plan, which then comes in pieces: what
    the function is of comes out of one, and its derivative goes into the next. With neither loss nor penalty it is the
    scores themselves, and nothing is differentiated.

    Attributes:
        loss: ``(*scores) -> 0-dim``, of those of the ``sides``; None for the penalty alone.
        weight: The penalty's factor; None for the loss alone.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
        at: "real", "fake" or "both" for the penalty on the samples themselves; "given" for points that are passed in;
            "mixed" for those between real and fake, of which α is passed in, one a sample or group.
        group_size: Samples that share one norm.
        outside_loss: Whether the loss is left outside, in place of ``loss``.
        outside_penalty: Whether the penalty is.
        outside_scores: Whether scores at the points come out with the gradient, and their cotangents go in with its.
        own_arguments: Whether the fake batch has further arguments of its own.
        sides: The batches that the loss is of: "real" and "fake", or "fake" alone.
    """

    loss: Loss | None = None
    weight: float | None = 10.0
    target: float = 1.0
    one_sided: bool = False
    at: Literal["real", "fake", "both", "given", "mixed"] = "given"
    group_size: int = 1
    outside_loss: bool = False
    outside_penalty: bool = False
    outside_scores: bool = False
    own_arguments: bool = False
    sides: tuple[str, ...] = ("real", "fake")

    @property
    def has_loss(self) -> bool:
        """Whether batches go through the critic for a loss."""
        return self.loss is not None or self.outside_loss

    def batches(self) -> int:
        """Count the batches that a plain implementation sends through the critic."""
        losses = self.has_loss or self.weight is None
        return len(self.sides) * losses + len(self.points())

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
        return {"both": ["real", "fake"], "given": ["points"], "mixed": ["points"]}.get(self.at, [self.at])

    def inputs(self) -> list[str]:
        """Return the batches that go through the critic."""
        losses = list(self.sides) if self.has_loss or self.weight is None else []
        return [*losses, *(name for name in self.points() if name not in losses)]


class StepOutput(NamedTuple):
    """Figures of one step (None where the objective has no such part), and the gradients.

    Attributes:
        loss: The whole objective as far as the plan knows it, 0-dim.
        penalty: Weight included, 0-dim.
        real_score: mean D(real), 0-dim.
        fake_score: mean D(fake), 0-dim.
        gradient_norm: Mean ‖∇D‖₂ over the points, 0-dim.
        norms: ‖∇D‖₂ by sample or group, ``[N]``, for every set of points.
        gradients: By the plan's trainable inputs.
    """

    loss: Tensor | None
    penalty: Tensor | None
    real_score: Tensor | None
    fake_score: Tensor | None
    gradient_norm: Tensor | None
    norms: list[Tensor]
    gradients: list[Tensor | None]


class RefusedError(Exception):
    """What a user did wrong was found while planning; carries the error to raise."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
