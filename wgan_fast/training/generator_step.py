"""The generator's samples and its step as programs, where both networks are MLPs on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..engine.autograd import leave
from ..engine.guarded import Called
from ..engine.planned import FourPassEngine, Prepared
from ..four_pass import CaptureError, Objective
from ..four_pass.program import Program
from ..ops.run_program import AVAILABLE
from . import models

_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.ReLU, nn.LeakyReLU)
_CONTAINERS = {nn.Sequential.forward, models.Critic.forward}


class GeneratorStep:
    """Runs a generator without what autograd and fresh memory cost; what it cannot run it leaves to whoever asks.

    What runs is what the forwards are at every call, as with critics: hooks, layers and parameters may be changed.

    Args:
        generator: The generator.
        critic: The critic, whose parameters are constants here.
        loss: Of the critic's scores of generated samples, 0-dim.
    """

    def __init__(self, generator: nn.Module, critic: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
        self._generator, self._pair = generator, _Pair(generator, critic)
        scores = Objective(weight=None, sides=("fake",))
        self._engines = {
            "samples": FourPassEngine(generator, scores),
            "step": FourPassEngine(self._pair, Objective(weight=None, loss=loss, sides=("fake",))),
        }
        if not (AVAILABLE and all(map(_may_be_written, (generator, critic)))):
            self._engines.clear()

    def samples(self, noise: Tensor) -> Tensor | None:
        """Generate samples ``[N, *D]`` from noise ``[N, latent_dim]``, as constants; None where it cannot."""
        prepared = self._prepared("samples", self._generator, noise)
        if prepared is None:
            return None
        (samples,) = prepared.planned.plan.begin(prepared.inputs, {"fake": [noise]})
        return samples  # type: ignore[no-any-return]

    def differentiate(self, noise: Tensor) -> tuple[Tensor, Callable[[], None]] | None:
        """Evaluate the loss, 0-dim, at noise ``[N, latent_dim]``; None where it cannot.

        Returns:
            The loss, and what leaves its gradients in the generator's parameters.
        """
        with _constant(self._pair.critic):
            prepared = self._prepared("step", self._pair, noise)
            if prepared is None:
                return None
            output = prepared.run({"fake": noise})
        assert output.loss is not None
        return output.loss, lambda: leave(prepared.tensors, output.gradients)

    def _prepared(self, what: str, forward: nn.Module, noise: Tensor) -> Prepared | None:
        engine = self._engines.get(what)
        if engine is None:
            return None
        try:
            prepared = engine.prepare(Called(forward, noise, picks=(None,)))
        except (CaptureError, TypeError, ValueError):
            # What is the user's error is one of the usual way, too.
            prepared = None
        if prepared is None or not all(isinstance(piece, Program) for piece in prepared.planned.plan.programs):
            del self._engines[what]
            return None
        return prepared


class _Pair(nn.Module):
    def __init__(self, generator: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.generator, self.critic = generator, critic

    def forward(self, noise: Tensor) -> Tensor:
        return self.critic(self.generator(noise))  # type: ignore[no-any-return]


def _may_be_written(network: nn.Module) -> bool:
    """Whether it is worth a try, which takes seconds where a network is deep."""
    tensors = [*network.parameters(), *network.buffers()]
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return False
    return all(
        type(layer) in _LAYERS or getattr(type(layer), "forward", None) in _CONTAINERS for layer in network.modules()
    )


@contextmanager
def _constant(network: nn.Module) -> Iterator[None]:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
