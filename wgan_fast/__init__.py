"""A fast, exact backend for WGAN-GP training in PyTorch."""

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
