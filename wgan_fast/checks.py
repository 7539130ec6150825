"""What the public functions ask of their arguments before they touch anything."""

import math
from collections.abc import Callable, Iterator, Mapping
from types import EllipsisType
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor

from .precision import accumulation_dtype

Engine = Literal["auto", "four_pass", "autograd", "checked"]


def check_alpha(alpha: Tensor | float, real: Tensor, group_size: int = 1) -> Tensor:
    """Return a given α as a vector where it is one a sample, or a group, of ``real`` ``[N, *D]``, else as it is."""
    N = real.shape[0]
    groups = N // group_size
    if isinstance(alpha, int | float) and not isinstance(alpha, bool):
        if not torch.compiler.is_compiling() and not math.isfinite(alpha):  # the compiler's numbers have no value yet
            raise ValueError(f"alpha must be finite, got {alpha}")
        return torch.full((groups,), float(alpha), dtype=accumulation_dtype(real.dtype), device=real.device)
    alpha = check_floating("alpha", alpha)
    if alpha.device != real.device:
        raise ValueError(f"alpha is on {alpha.device}, real on {real.device}: they must be on one device")
    if alpha.dim() == 0:
        return alpha.expand(groups)
    if alpha.numel() == alpha.shape[0] and alpha.shape[0] in (N, groups):
        return alpha.reshape(-1)
    sizes = zip(reversed(alpha.shape), reversed(real.shape))
    if alpha.dim() > real.dim() or not all(own in (1, size) for own, size in sizes):
        raise ValueError(
            f"alpha must be a number, have one value per sample, shape [{N}], or broadcast to {list(real.shape)}, "
            f"got {list(alpha.shape)}"
        )
    return alpha


def is_per_group(alpha: Tensor, real: Tensor, group_size: int = 1) -> bool:
    """Say whether what ``check_alpha`` gave is one value a sample, or a group of them."""
    return alpha.dim() == 1 and alpha.shape[0] == real.shape[0] // group_size


def check_samples(real: object, fake: object, group_size: int = 1) -> Tensor:
    """Return the first tensor of real, or raise unless real and fake are a usable pair of batches."""
    first = check_one("real", real, group_size)
    if isinstance(real, Tensor):
        check_matches("fake", fake, real)
        return first
    ours, theirs = dict(named_leaves("real", real)), dict(named_leaves("fake", fake))
    if [name.removeprefix("real") for name in ours] != [name.removeprefix("fake") for name in theirs]:
        raise ValueError(f"fake must be nested as real, got {list(theirs)} and {list(ours)}")
    for (name, leaf), like in zip(theirs.items(), ours.values()):
        check_matches(name, leaf, check_tensor("real", like), like="its counterpart in real", floating=False)
    return first


def check_one(name: str, batch: object, group_size: int = 1) -> Tensor:
    """Return the first tensor of a batch, or raise unless it is usable by itself."""
    if not isinstance(batch, Tensor) and isinstance(batch, tuple | list | Mapping):
        leaves = list(named_leaves(name, batch))
        for path, leaf in leaves:
            if not isinstance(leaf, Tensor):
                kind = type(batch).__name__
                raise TypeError(
                    f"{name} is a {kind}, which must hold tensors alone, and {path} is {type(leaf).__name__}: give the "
                    "critic what is no sample by critic_args, or by a function of the samples"
                )
        first = _check_nest(name, leaves)  # type: ignore[arg-type]
    else:
        first = check_floating(name, batch)
        check_batch(name, first)
    if first.shape[0] % group_size:
        raise ValueError(f"group_size {group_size} does not divide the batch of {first.shape[0]} samples")
    return first


def named_leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield what a tuple, list or dict holds, however deep, in order, with the way to it."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from named_leaves(f"{name}[{key!r}]", value[key])
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from named_leaves(f"{name}[{i}]", part)
    else:
        yield name, value


def _check_nest(name: str, leaves: list[tuple[str, Tensor]]) -> Tensor:
    if not any(leaf.is_floating_point() for _, leaf in leaves):
        raise TypeError(f"{name} must hold a floating-point tensor, got {[str(leaf.dtype) for _, leaf in leaves]}")
    _, first = leaves[0]
    for path, leaf in leaves:
        if leaf.dim() == 0 or leaf.numel() == 0:
            raise ValueError(f"{path} must be a non-empty batch [N, ...], got shape {list(leaf.shape)}")
        if leaf.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name} must hold one number of samples, got {first.shape[0]} and, in {path}, {leaf.shape[0]}"
            )
        if leaf.device != first.device:
            raise ValueError(
                f"{path} is on {leaf.device}, {leaves[0][0]} on {first.device}: they must be on one device"
            )
    return first


Score = int | str | Callable[[Any], Any] | None
"""What of a critic's output is differentiated: an index, a key, or a function of it; None for all of it."""


def check_score(score: object) -> None:
    """Raise unless ``score`` says what of an output is differentiated."""
    if isinstance(score, bool) or not (score is None or isinstance(score, int | str) or callable(score)):
        raise TypeError(f"score must be an index, a key, a function of the output or None, got {type(score).__name__}")


WHOLE = ...
"""In place of a score: all that a critic returns."""


def picked(output: Any, score: Score | EllipsisType) -> Any:
    """Return what of a critic's output is differentiated: a tensor, or a list of several whose sum is meant."""
    if score is not None and score is not WHOLE:
        if callable(score):
            output = score(output)
        elif isinstance(output, Tensor):
            raise TypeError(f"score={score!r} picks from a tuple, list or dict, and the critic returns a tensor")
        else:
            try:
                named = isinstance(score, str) and not isinstance(output, Mapping)
                output = getattr(output, score) if named else output[score]  # type: ignore[arg-type]
            except (KeyError, IndexError, TypeError, AttributeError):
                has = f"the keys {list(output)}" if isinstance(output, Mapping) else f"the type {type(output).__name__}"
                if isinstance(output, tuple | list):
                    has = f"{len(output)} parts"
                raise ValueError(f"score={score!r} is not in what the critic returns, which has {has}") from None
        if isinstance(output, list | tuple) and len(output) and all(isinstance(part, Tensor) for part in output):
            return list(output) if len(output) > 1 else output[0]
    return output


def check_scores(scores: object, x: Tensor, group_size: int = 1, *, one: bool = False, rows: bool = True) -> Tensor:
    """Return the critic's scores, or raise unless there is a row of them (or ``one``) per sample or group of ``x``.

    Without ``rows`` they may lie in any way.
    """
    groups = x.shape[0] // group_size
    if not isinstance(scores, Tensor):
        simple = scores is None or isinstance(scores, bool | int | float | str)
        say = "" if simple else ", say: score=0, score='name' or a function of it"
        raise TypeError(
            f"critic must return a tensor of scores, got {type(scores).__name__}"
            + (f"; which part is the score{say}" if say else "")
        )
    if rows and (scores.dim() == 0 or scores.shape[0] != groups or (one and scores.numel() != groups)):
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


def check_penalty(value: object) -> Tensor:
    """Return what a penalty of one's own gave, or raise unless that is a tensor of numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"penalty must return a tensor, got {type(value).__name__}")
    if value.numel() == 0:
        raise ValueError(f"penalty must return a value per sample, [N], or a 0-dim tensor, got {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"penalty must return a floating-point tensor, got {value.dtype}")
    return value


UNREACHED = (
    "critic's loss reaches no trainable parameter: its scores were detached or computed under torch.no_grad(), or "
    "every parameter is frozen"
)


def unconnected() -> ValueError:
    """Return the error to raise where a critic has no input gradient."""
    return ValueError("critic's scores do not depend on its input: it was detached or computed under torch.no_grad()")


def check_gradients_allowed(what: str) -> None:
    """Raise under ``torch.inference_mode()``."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise ValueError(f"{what} needs gradients, which torch.inference_mode() forbids")


def check_critic_arguments(
    critic_args: object, critic_kwargs: object, args_name: str = "critic_args", kwargs_name: str = "critic_kwargs"
) -> None:
    """Raise unless a critic can be called with ``*critic_args, **critic_kwargs``."""
    # Not any iterable: a tensor of labels would arrive as one argument per sample.
    if not isinstance(critic_args, tuple):
        raise TypeError(f"{args_name} must be a tuple, got {type(critic_args).__name__}")
    if critic_kwargs is not None and not isinstance(critic_kwargs, Mapping):
        raise TypeError(f"{kwargs_name} must be a mapping or None, got {type(critic_kwargs).__name__}")


def check_penalty_arguments(penalty_args: object, penalty: object) -> None:
    """Raise unless a penalty of one's own can be called with ``*penalty_args``."""
    if not isinstance(penalty_args, tuple):
        raise TypeError(f"penalty_args must be a tuple, got {type(penalty_args).__name__}")
    if penalty_args and penalty is None:
        raise ValueError("penalty_args are arguments of penalty, which is not given")


def check_engine(engine: str) -> None:
    """Raise unless ``engine`` names an engine that this version has."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}")


def check_tensor(name: str, tensor: object) -> Tensor:
    """Return ``tensor``, or raise unless it is one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    return tensor


def check_floating(name: str, tensor: object) -> Tensor:
    """Return ``tensor``, or raise unless it is a floating-point one."""
    tensor = check_tensor(name, tensor)
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


def check_matches(name: str, tensor: object, real: Tensor, *, like: str = "real", floating: bool = True) -> None:
    """Raise unless ``tensor`` has the shape, dtype and device of ``real``, which the message calls ``like``."""
    tensor = check_floating(name, tensor) if floating else check_tensor(name, tensor)
    if tensor.shape != real.shape:
        raise ValueError(f"{name} must have the shape of {like}, got {list(tensor.shape)} and {list(real.shape)}")
    if tensor.dtype != real.dtype:
        raise TypeError(f"{name} must have the dtype of {like}, got {tensor.dtype} and {real.dtype}")
    if tensor.device != real.device:
        raise ValueError(f"{name} is on {tensor.device}, {like} on {real.device}: they must be on one device")
