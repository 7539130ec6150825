"""Tries networks before a run: what does not fit is said before anything is written."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_scores
from ..errors import InputError
from ..four_pass import CaptureError
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
