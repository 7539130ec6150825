"""A fast, exact backend for WGAN-GP training in PyTorch."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import losses, optim
    from .build import build_info
    from .clipping import clip_weights_
    from .critic_step import CriticStep, CriticStepResult
    from .explain import Explanation, explain
    from .penalty import GradientPenalty, PenaltyResult, gradient_penalty, penalty_from_gradient
    from .points import PenaltyConfig, interpolate

__version__ = "0.1.0"

__all__ = [
    "CriticStep",
    "CriticStepResult",
    "Explanation",
    "GradientPenalty",
    "PenaltyConfig",
    "PenaltyResult",
    "build_info",
    "clip_weights_",
    "explain",
    "gradient_penalty",
    "interpolate",
    "losses",
    "optim",
    "penalty_from_gradient",
]

_HOME = {
    "CriticStep": "critic_step",
    "CriticStepResult": "critic_step",
    "Explanation": "explain",
    "GradientPenalty": "penalty",
    "PenaltyConfig": "points",
    "PenaltyResult": "penalty",
    "build_info": "build",
    "clip_weights_": "clipping",
    "explain": "explain",
    "gradient_penalty": "penalty",
    "interpolate": "points",
    "penalty_from_gradient": "penalty",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the command line answers before PyTorch is imported."""
    if name in ("losses", "optim"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps a function where the submodule that it lives in has its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        in_module = name in _HOME and isinstance(value, types.ModuleType)
        super().__setattr__(name, getattr(value, name) if in_module else value)


sys.modules[__name__].__class__ = _Package
