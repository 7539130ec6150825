"""Training: data, networks, loop, checkpoints, runs on disk, and the command line."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import Callback
    from .config import TrainConfig
    from .recipes import RECIPES
    from .run import Run
    from .stopping import InterruptedTraining
    from .trainer import Summary, Trainer

__all__ = ["RECIPES", "Callback", "InterruptedTraining", "Run", "Summary", "TrainConfig", "Trainer"]

_HOME = {
    "RECIPES": "recipes",
    "Callback": "callbacks",
    "InterruptedTraining": "stopping",
    "Run": "run",
    "Summary": "trainer",
    "TrainConfig": "config",
    "Trainer": "trainer",
}


def __getattr__(name: str) -> Any:
    """Import what training needs when it is asked for: models and data alone need less."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import rich  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(f"training needs {error.name}: pip install 'wgan_fast[train]'") from error
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
