"""What the public functions ask of their arguments before they touch anything."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor

from .precision import accumulation_dtype

Engine = Literal["auto", "four_pass", "autograd", "checked"]


def check_alpha(alpha: Tensor | float, real: Tensor, group_size: int = 1) -> Tensor:
    """Return a given α as ``[N]`` where it is one a sample of ``real`` ``[N, *D]`` (or a group), else as it is."""
    N = real.shape[0]
    if isinstance(alpha, int | float) and not isinstance(alpha, bool):
        if not torch.compiler.is_compiling() and not math.isfinite(alpha):  # the compiler's numbers have no value yet
            raise ValueError(f"alpha must be finite, got {alpha}")
        return torch.full((N,), float(alpha), dtype=accumulation_dtype(real.dtype), device=real.device)
    alpha = check_floating("alpha", alpha)
    if alpha.device != real.device:
        raise ValueError(f"alpha is on {alpha.device}, real on {real.device}: they must be on one device")
    if alpha.dim() == 0:
        return alpha.expand(N)
    if alpha.numel() == alpha.shape[0] and alpha.shape[0] in (N, N // group_size):
        alpha = alpha.reshape(-1)
        return alpha if alpha.shape[0] == N else alpha.repeat_interleave(group_size)
    sizes = zip(reversed(alpha.shape), reversed(real.shape))
    if alpha.dim() > real.dim() or not all(own in (1, size) for own, size in sizes):
        raise ValueError(
            f"alpha must be a number, have one value per sample, shape [{N}], or broadcast to {list(real.shape)}, "
            f"got {list(alpha.shape)}"
        )
    return alpha


def is_per_sample(alpha: Tensor, real: Tensor) -> bool:
    """Say whether what ``check_alpha`` gave is one value a sample."""
    return alpha.dim() == 1 and alpha.shape[0] == real.shape[0]


def check_samples(real: object, fake: object, group_size: int = 1) -> None:
    """Raise unless real and fake are a usable pair of batches."""
    real = check_floating("real", real)
    check_matches("fake", fake, real)
    check_one("real", real, group_size)


def check_one(name: str, batch: object, group_size: int = 1) -> None:
    """Raise unless a batch is usable by itself."""
    batch = check_floating(name, batch)
    check_batch(name, batch)
    if batch.shape[0] % group_size:
        raise ValueError(f"group_size {group_size} does not divide the batch of {batch.shape[0]} samples")


Score = int | str | Callable[[Any], Any] | None
"""What of a critic's output is differentiated: an index, a key, or a function of it; None for all of it."""


def check_score(score: object) -> None:
    """Raise unless ``score`` says what of an output is differentiated."""
    if isinstance(score, bool) or not (score is None or isinstance(score, int | str) or callable(score)):
        raise TypeError(f"score must be an index, a key, a function of the output or None, got {type(score).__name__}")


def picked(output: Any, score: Score) -> Any:
    """Return what of a critic's output is differentiated; several tensors become one, a row a sample."""
    if score is not None:
        if callable(score):
            output = score(output)
        elif isinstance(output, Tensor):
            raise TypeError(f"score={score!r} picks from a tuple, list or dict, and the critic returns a tensor")
        else:
            try:
                output = output[score]
            except (KeyError, IndexError, TypeError):
                has = f"the keys {list(output)}" if isinstance(output, Mapping) else f"{len(output)} parts"
                raise ValueError(f"score={score!r} is not in what the critic returns, which has {has}") from None
        if isinstance(output, list | tuple) and all(isinstance(part, Tensor) and part.dim() > 0 for part in output):
            output = torch.cat([part.reshape(part.shape[0], -1) for part in output], 1)
    return output


def check_scores(scores: object, x: Tensor, group_size: int = 1, *, one: bool = False) -> Tensor:
    """Return the critic's scores, or raise unless there is a row of them (or ``one``) per sample or group of ``x``."""
    groups = x.shape[0] // group_size
    if not isinstance(scores, Tensor):
        say = ", say: score=0, score='name' or a function of it" if isinstance(scores, tuple | list | Mapping) else ""
        raise TypeError(
            f"critic must return a tensor of scores, got {type(scores).__name__}"
            + (f"; which part is the score{say}" if say else "")
        )
    if scores.dim() == 0 or scores.shape[0] != groups or (one and scores.numel() != groups):
        per = "sample" if group_size == 1 else f"group of {group_size} samples"
        raise ValueError(
            f"critic must return {'one score' if one else 'a row of scores'} per {per}, shape [{groups}] or [{groups}, "
            f"{'1' if one else '...'}], got {list(scores.shape)} for input {list(x.shape)} with group_size {group_size}"
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


def check_floating(name: str, tensor: object) -> Tensor:
    """Return ``tensor``, or raise unless it is a floating-point one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    return tensor


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


def check_matches(name: str, tensor: object, real: Tensor) -> None:
    """Raise unless ``tensor`` has the shape, dtype and device of ``real``."""
    tensor = check_floating(name, tensor)
    if tensor.shape != real.shape:
        raise ValueError(f"{name} must have the shape of real, got {list(tensor.shape)} and {list(real.shape)}")
    if tensor.dtype != real.dtype:
        raise TypeError(f"{name} must have the dtype of real, got {tensor.dtype} and {real.dtype}")
    if tensor.device != real.device:
        raise ValueError(f"{name} is on {tensor.device}, real on {real.device}: they must be on one device")
