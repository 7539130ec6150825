"""What the public functions ask of their arguments before they touch anything."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

Engine = Literal["auto", "four_pass", "autograd", "checked"]


def check_alpha(alpha: Tensor, real: Tensor, group_size: int = 1) -> Tensor:
    """Return a given α as ``[N]``, one value per sample of ``real`` ``[N, *D]``."""
    check_floating("alpha", alpha)
    N = real.shape[0]
    if alpha.device != real.device:
        raise ValueError(f"alpha is on {alpha.device}, real on {real.device}: they must be on one device")
    if alpha.dim() == 0 or alpha.numel() != alpha.shape[0] or alpha.shape[0] not in (N, N // group_size):
        raise ValueError(f"alpha must have one value per sample, shape [{N}], got {list(alpha.shape)}")
    alpha = alpha.reshape(-1)
    return alpha if alpha.shape[0] == N else alpha.repeat_interleave(group_size)


def check_samples(real: Tensor, fake: Tensor, group_size: int = 1) -> None:
    """Raise unless real and fake are a usable pair of batches."""
    check_floating("real", real)
    check_matches("fake", fake, real)
    check_batch("real", real)
    if real.shape[0] % group_size:
        raise ValueError(f"group_size {group_size} does not divide the batch of {real.shape[0]} samples")


def check_scores(scores: object, x: Tensor, group_size: int = 1) -> Tensor:
    """Return the critic's scores, or raise unless there is one per sample (or group) of ``x``."""
    groups = x.shape[0] // group_size
    if not isinstance(scores, Tensor):
        raise TypeError(f"critic must return a tensor of scores, got {type(scores).__name__}")
    if scores.dim() == 0 or scores.shape[0] != groups or scores.numel() != groups:
        per = "sample" if group_size == 1 else f"group of {group_size} samples"
        raise ValueError(
            f"critic must return one score per {per}, shape [{groups}] or [{groups}, 1], "
            f"got {list(scores.shape)} for input {list(x.shape)} with group_size {group_size}"
        )
    if not scores.is_floating_point():
        raise TypeError(f"critic must return floating-point scores, got {scores.dtype}")
    return scores


def check_loss(loss: object) -> Tensor:
    """Return what an adversarial loss gave, or raise unless that is a 0-dim tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must return a tensor, got {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"loss must return a 0-dim tensor, got shape {list(loss.shape)}")
    return loss


def unconnected() -> ValueError:
    """Return the error to raise where a critic has no input gradient."""
    return ValueError("critic's scores do not depend on its input: it was detached or computed under torch.no_grad()")


def check_gradients_allowed(what: str) -> None:
    """Raise under ``torch.inference_mode()``."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise ValueError(f"{what} needs gradients, which torch.inference_mode() forbids")


def check_critic_arguments(critic_args: object, critic_kwargs: object) -> None:
    """Raise unless a critic can be called with ``*critic_args, **critic_kwargs``."""
    # Not any iterable: a tensor of labels would arrive as one argument per sample.
    if not isinstance(critic_args, tuple):
        raise TypeError(f"critic_args must be a tuple, got {type(critic_args).__name__}")
    if critic_kwargs is not None and not isinstance(critic_kwargs, Mapping):
        raise TypeError(f"critic_kwargs must be a mapping or None, got {type(critic_kwargs).__name__}")


def check_engine(engine: str) -> None:
    """Raise unless ``engine`` names an engine that this version has."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}")


def check_floating(name: str, tensor: object) -> None:
    """Raise unless ``tensor`` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_batch(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is ``[N, ...]`` with at least one value."""
    if tensor.dim() < 2 or tensor.numel() == 0:
        raise ValueError(f"{name} must be a non-empty batch [N, ...], got shape {list(tensor.shape)}")


def check_generator(generator: object, real: Tensor) -> None:
    """Raise unless ``generator`` can draw on the device of ``real``."""
    if generator is None:
        return
    if not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != real.device.type:
        raise ValueError(f"generator is on {generator.device}, real on {real.device}: they must be on one device")


def check_matches(name: str, tensor: Tensor, real: Tensor) -> None:
    """Raise unless ``tensor`` has the shape, dtype and device of ``real``."""
    check_floating(name, tensor)
    if tensor.shape != real.shape:
        raise ValueError(f"{name} must have the shape of real, got {list(tensor.shape)} and {list(real.shape)}")
    if tensor.dtype != real.dtype:
        raise TypeError(f"{name} must have the dtype of real, got {tensor.dtype} and {real.dtype}")
    if tensor.device != real.device:
        raise ValueError(f"{name} is on {tensor.device}, real on {real.device}: they must be on one device")
