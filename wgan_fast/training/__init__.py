"""Training: configuration, loop, checkpoints, and runs on disk."""

try:
    import matplotlib  # noqa: F401
    import PIL  # noqa: F401
    import rich  # noqa: F401
    import safetensors  # noqa: F401
except ImportError as error:
    raise ImportError(f"training needs {error.name}: pip install 'wgan_fast[train]'") from error

from .config import RECIPES, TrainConfig
from .run import Run
from .stopping import InterruptedTraining
from .trainer import Summary, Trainer

__all__ = ["RECIPES", "InterruptedTraining", "Run", "Summary", "TrainConfig", "Trainer"]
