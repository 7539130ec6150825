"""The generator's samples and its step as programs, where both networks are MLPs on a CPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..engine.autograd import leave
from ..engine.guarded import Called
from ..engine.planned import FourPassEngine, Prepared, TooManyPlansError
from ..four_pass import CaptureError, Objective
from ..four_pass.program import Program
from ..losses import LOSSES, AdversarialLoss
from ..ops.run_program import AVAILABLE
from . import models

_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.ReLU, nn.LeakyReLU)
_CONTAINERS = {nn.Sequential.forward, models.Critic.forward}


class GeneratorStep:
    """Runs a generator without what autograd and fresh memory cost; what it cannot run it leaves to whoever asks.

    What runs is what the forwards are at every call, as with critics: hooks, layers and parameters may be changed.
    Where that is no program once, it is not tried again.

    Args:
        generator: The generator.
        critic: The critic, whose parameters are constants here.
        loss: Whose part is the generator's; one of one's own, which may change, is left to autograd.
        trained: The generator's trainable parameters.
    """

    def __init__(
        self, generator: nn.Module, critic: nn.Module, loss: AdversarialLoss, trained: Sequence[nn.Parameter]
    ) -> None:
        self._generator, self._pair, self._trained = generator, _Pair(generator, critic), trained
        self._samples: FourPassEngine | None = None
        self._step: FourPassEngine | None = None
        if not (AVAILABLE and all(map(_may_be_written, (generator, critic)))):
            return
        self._samples = FourPassEngine(generator, Objective(weight=None, sides=("fake",)))
        if LOSSES.get(loss.name) is loss:
            self._step = FourPassEngine(self._pair, Objective(weight=None, loss=loss.generator, sides=("fake",)))

    def samples(self, noise: Tensor) -> Tensor | None:
        """Generate samples ``[N, *D]`` from noise ``[N, latent_dim]``, as constants; None where it cannot."""
        if self._samples is None:
            return None
        prepared, go_on = _prepared(self._samples, self._generator, noise)
        if not go_on:
            self._samples = None
        if prepared is None:
            return None
        (samples,) = prepared.planned.plan.begin(prepared.inputs, {"fake": [noise]})
        return samples  # type: ignore[no-any-return]

    def differentiate(self, noise: Tensor) -> tuple[Tensor, Callable[[], None]] | None:
        """Evaluate the loss, 0-dim, at noise ``[N, latent_dim]``; None where it cannot.

        Returns:
            The loss, and what leaves its gradients in the generator's parameters.
        """
        now = [parameter for parameter in self._generator.parameters() if parameter.requires_grad]
        if self._step is None or list(map(id, now)) != list(map(id, self._trained)):
            return None
        with _constant(self._pair.critic, now):
            prepared, go_on = _prepared(self._step, self._pair, noise)
            if not go_on:
                self._step = None
            if prepared is None:
                return None
            output = prepared.run({"fake": noise})
        assert output.loss is not None
        return output.loss, lambda: leave(prepared.tensors, output.gradients)


def _prepared(engine: FourPassEngine, forward: nn.Module, noise: Tensor) -> tuple[Prepared | None, bool]:
    """Prepare a step; returns it, None where it cannot be run, and whether another one is worth a try."""
    try:
        prepared = engine.prepare(Called(forward, noise, picks=(None,)))
    except TooManyPlansError:
        return None, True
    except (CaptureError, TypeError, ValueError):
        # What is the user's error is one of the usual way, too.
        return None, False
    # What its forward changes has been changed: this one runs, whatever it is.
    return prepared, all(isinstance(piece, Program) for piece in prepared.planned.plan.programs)


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
    forwards = {layer: getattr(type(layer), "forward", None) for layer in network.modules()}
    return all(type(layer) in _LAYERS or forward in _CONTAINERS for layer, forward in forwards.items())


@contextmanager
def _constant(network: nn.Module, besides: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have a network's parameters require no gradient, but for those that another one shares."""
    kept = set(map(id, besides))
    parameters = [p for p in network.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
