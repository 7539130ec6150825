"""Tries networks before a run: what does not fit is said before anything is written."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_scores
from ..errors import InputError
from ..four_pass import CaptureError
from ..losses import LOSSES, AdversarialLoss
from .iteration import Iteration


def check_networks(
    generator: nn.Module,
    critic: nn.Module,
    sample_shape: tuple[int, ...],
    latent_dim: int,
    n: int,
    *,
    conditional: bool = False,
) -> None:
    """Run both networks on ``n`` samples in training mode, with labels of 0 if they take any; they stay as they were.

    Raises:
        InputError: A network fails, or the shapes do not fit.
    """
    shape = [n, *sample_shape]
    fake = _try("generator", generator, [n, latent_dim], conditional)
    if not isinstance(fake, Tensor) or list(fake.shape) != shape:
        got = list(fake.shape) if isinstance(fake, Tensor) else type(fake).__name__
        raise InputError(
            f"generator must make samples of the data's shape {shape} from noise [{n}, {latent_dim}], got {got}"
        )
    scores = _try("critic", critic, shape, conditional)
    try:
        check_scores(scores, torch.empty(shape), one=True)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def check_loss(loss: AdversarialLoss, named: str | None) -> AdversarialLoss:
    """Try a loss of one's own on three scores.

    Args:
        loss: The loss.
        named: What the configuration says.

    Raises:
        InputError: It is none, has a name that is taken, or does not give 0-dim tensors that depend on the scores.
    """
    if not isinstance(loss, AdversarialLoss):
        raise InputError(f"loss must be an AdversarialLoss, got {type(loss).__name__}")
    if named not in (None, loss.name):
        raise InputError(f"loss was given twice: as {named} in the configuration, and {loss.name}")
    if LOSSES.get(loss.name, loss) is not loss:
        raise InputError(f"loss must have a name of its own, {loss.name} is one of the package's")
    for part, count in (("critic", 2), ("generator", 1)):
        scores = [torch.zeros(3, requires_grad=True) for _ in range(count)]
        try:
            value = getattr(loss, part)(*scores)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"loss.{part} fails on scores [3]: {str(error).partition(chr(10))[0]}") from error
        if not (isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad):
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"loss.{part} must return a 0-dim tensor computed from the scores, got {got}")
    return loss


def try_step(iteration: Iteration, sample_shape: tuple[int, ...], n: int) -> None:
    """Take a critic step on ``n`` samples of zeros, which leaves no trace.

    Raises:
        InputError: It fails.
    """
    critic = iteration.critic
    before = copy.deepcopy(critic.state_dict())
    zeros = torch.zeros(n, *sample_shape, dtype=iteration.dtype, device=iteration.device)
    zeros = iteration.laid_out(zeros)
    try:
        critic.train()
        iteration.critic_step(zeros, zeros, critic_args=iteration.condition(n))
    except CaptureError as error:
        raise InputError(f"engine four_pass cannot take this critic: {error}") from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"critic fails in a training step: {str(error).partition(chr(10))[0]}") from error
    finally:
        critic.load_state_dict(before)
        critic.zero_grad(set_to_none=True)
        iteration.critic_step.steps_taken = 0


@torch.no_grad()
def _try(name: str, network: nn.Module, shape: list[int], conditional: bool) -> Any:
    """Return the network's output for zeros in training mode; its buffers stay as they were."""
    before = copy.deepcopy(network.state_dict())
    parameter = next(network.parameters(), torch.empty(0))
    try:
        labels = (torch.zeros(shape[0], dtype=torch.int64, device=parameter.device),) if conditional else ()
        return network.train()(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device), *labels)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        hint = (
            "; the noise's length is latent_dim, of the configuration or the generator" if name == "generator" else ""
        )
        given = f"an input of shape {shape}" + f" and labels [{shape[0]}]" * conditional
        raise InputError(f"{name} fails on {given}: {reason}{hint}") from error
    finally:
        network.load_state_dict(before)
