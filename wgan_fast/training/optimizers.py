"""Optimizers: any of ``torch.optim`` by name, with settings of its own, or one of the user's own from a function."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..optim import ClippedRMSprop
from .config import OWN, TrainConfig

OptimizerFactory = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer of one network from its parameters."""

# What is not to be had from gradients alone, or not from dense ones.
_UNFIT = {"LBFGS", "SparseAdam"}
_CLASSES = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name not in {"Optimizer", *_UNFIT}
}
_OUR_OWN = {"self", "params", "lr", "betas", "foreach", "fused", "capturable", "differentiable"}
"""What a configuration says elsewhere, or PyTorch chooses."""


def parse(text: str) -> tuple[type[torch.optim.Optimizer], dict[str, float | bool]]:
    """Read "sgd,momentum=0.9": a class of ``torch.optim`` and settings of its own.

    Raises:
        InputError: There is no such optimizer, or it has no such setting.
    """
    name, *pairs = text.split(",")
    kind = _CLASSES.get(name.lower())
    if kind is None:
        raise InputError(f"optimizer must be one of {', '.join(sorted(_CLASSES))}, got {name!r}")
    takes = inspect.signature(kind).parameters.keys() - _OUR_OWN - _decay_rates(kind).keys()
    settings: dict[str, float | bool] = {}
    for pair in pairs:
        setting, _, value = pair.partition("=")
        if setting not in takes:
            raise InputError(f"optimizer {name} takes {', '.join(sorted(takes))}, got {pair!r}")
        settings[setting] = _number(setting, value)
    return kind, settings


def _number(name: str, text: str) -> float | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise InputError(f"optimizer's {name} must be a number, true or false, got {text!r}")


def _decay_rates(kind: type[torch.optim.Optimizer], beta1: float = 0, beta2: float = 0) -> dict[str, Any]:
    """Say how an optimizer takes the decay rates of its moments."""
    if "betas" in inspect.signature(kind).parameters:
        return {"betas": (beta1, beta2)}
    return {"alpha": beta2} if kind is torch.optim.RMSprop else {}


def takes_beta(text: str) -> tuple[bool, bool]:
    """Whether the optimizer of a configuration has a decay rate for its first moment, and for its second."""
    rates = _decay_rates(parse(text)[0])
    return "betas" in rates, bool(rates)


def capturable(text: str) -> bool:
    """Whether the optimizer of a configuration can be replayed in a CUDA graph."""
    return text != OWN and "capturable" in inspect.signature(parse(text)[0]).parameters


def make_optimizer(
    parameters: list[nn.Parameter],
    config: TrainConfig,
    learning_rate: float | None,
    clip: float | None = None,
    own: OptimizerFactory | None = None,
) -> torch.optim.Optimizer:
    """Build a network's optimizer as the configuration says, its learning rate a tensor under a CUDA graph.

    RMSprop with a ``clip`` is the fused one, which also clips. Every group notes its ``initial_lr``.

    Raises:
        InputError: It cannot be built so.
    """
    if config.optimizer == OWN:
        if own is None:
            raise InputError(f"optimizer {OWN} is one of your own: give Trainer(..., optimizer=function)")
        optimizer = own(parameters)
        _check_own(optimizer)
    else:
        optimizer = _named(parameters, config, learning_rate or 0.0, clip)
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
    return optimizer


def _named(
    parameters: list[nn.Parameter], config: TrainConfig, rate: float, clip: float | None
) -> torch.optim.Optimizer:
    assert config.optimizer is not None
    kind, settings = parse(config.optimizer)
    options: dict[str, Any] = {**settings, **_decay_rates(kind, config.beta1 or 0.0, config.beta2 or 0.0)}
    options["lr"] = torch.tensor(rate, device=parameters[0].device) if config.cuda_graph else rate
    takes = inspect.signature(kind).parameters
    if "fused" in takes:
        options["fused"] = config.fused or None  # None leaves the choice to PyTorch.
    if "capturable" in takes:
        options["capturable"] = bool(config.cuda_graph) and parameters[0].device.type == "cuda"
    if kind is torch.optim.RMSprop and clip is not None:
        kind, options["clip"] = ClippedRMSprop, clip
    try:
        return kind(parameters, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"optimizer {config.optimizer} cannot be built: {error}") from error


def _check_own(optimizer: object) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(f"optimizer must step from gradients alone, {type(optimizer).__name__} needs a closure")
    if not all("lr" in group for group in optimizer.param_groups):
        raise InputError(f"optimizer must have a learning rate lr, {type(optimizer).__name__} has none")


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float, written: dict[int, float]) -> None:
    """Set every group's learning rate to ``factor`` times what it began with.

    One that is a tensor on a device is written to where it changes: ``written`` notes the rates there.
    """
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if not isinstance(group["lr"], Tensor):
            group["lr"] = rate
        elif written.get(id(group)) != rate:
            group["lr"].fill_(rate)
            written[id(group)] = rate
