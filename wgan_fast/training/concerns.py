"""What is allowed and yet unlikely to train: said once, at the start, in a line each."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .networks import copy_of

RANGES = {
    "tanh": (-1.0, 1.0), "softsign": (-1.0, 1.0), "sin": (-1.0, 1.0),
    "sigmoid": (0.0, 1.0), "hardsigmoid": (0.0, 1.0), "softmax": (0.0, 1.0),
}  # fmt: skip
"""What functions without further arguments map to, by name; as methods and in place too."""

RAW_SCORES = ("wasserstein", "non_saturating", "hinge")
"""Losses of scores that nothing bounds; the labels of least squares lie in [0, 1] themselves."""


class _LastBounded(TorchFunctionMode):
    """Remembers what bounded functions returned; holding it keeps its memory from being given to others."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[str, Tensor, int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name in RANGES and isinstance(output, Tensor):
            self.outputs.append((name, output, output._version))
        return output

    def of(self, result: Tensor) -> str | None:
        """Name the function whose output ``result`` still is, if only as another view."""
        for name, output, version in reversed(self.outputs):
            if output.untyped_storage().data_ptr() == result.untyped_storage().data_ptr():
                unchanged = bool(output._version == version and output.numel() == result.numel())
                return name if unchanged else None
        return None


@torch.no_grad()
def last_bounded(network: nn.Module, *inputs: Tensor) -> str | None:
    """Name the bounded function, such as tanh, that a network ends in; None where it ends in no such.

    Args:
        network: Is left as it is: a copy runs.
        inputs: A batch of each of its inputs.
    """
    bounded = _LastBounded()
    try:
        with bounded:
            result = copy_of(network).eval()(*inputs)
    except Exception:  # What a copy, or the evaluation mode, cannot do is no reason to stop a run.
        return None
    return bounded.of(result)


def concerns(
    generator: nn.Module,
    critic: nn.Module,
    noise: tuple[Tensor, ...],
    real: tuple[Tensor, ...],
    span: tuple[Tensor, Tensor],
    loss: str | None,
) -> list[str]:
    """Say what is unlikely to train.

    Args:
        generator: The generator.
        critic: The critic.
        noise: A few inputs of the generator, labels beside the noise where it takes them.
        real: A few of the critic.
        span: The least and the greatest of many real values.
        loss: Name of the adversarial loss.
    """
    found = []
    end = last_bounded(generator, *noise)
    if end is not None:
        (low, high), (least, most) = RANGES[end], (value.item() for value in span)
        beyond = 0.01 * (high - low)
        if least < low - beyond or most > high + beyond:
            found.append(
                f"the generator ends in {end} and makes values in [{low:g}, {high:g}], but the data has {least:g} to "
                f"{most:g}: it cannot reach them; scale the data, or leave {end} out"
            )
    end = last_bounded(critic, *real)
    if end is not None and loss in RAW_SCORES:
        low, high = RANGES[end]
        found.append(
            f"the critic ends in {end}, so its scores lie in [{low:g}, {high:g}]: the {loss.replace('_', '-')} loss is "
            f"of raw scores; leave {end} out"
        )
    return found
