"""Training that starts with the networks of another run: fine-tuning on other data, at other rates."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError
from .checkpoint import load_checkpoint, load_module
from .config import OWN, TrainConfig
from .data import Data
from .description import Description, listed

ARCHITECTURE = ("width", "latent_dim", "spectral_norm")
"""What describes the networks of a model besides its name."""


def with_architecture(config: TrainConfig, run: Path) -> TrainConfig:
    """Return a configuration whose networks are those of ``run`` where it says nothing else.

    Raises:
        InputError: There is no run.
    """
    description = Description.read(run)
    description.find_model()
    source = description.config
    taken: dict[str, Any] = {"init_from": run.resolve()}
    if config.model == "auto" and source.model != OWN:
        taken["model"] = source.model
    if taken.get("model", config.model) == source.model:
        taken |= {name: getattr(source, name) for name in ARCHITECTURE if getattr(config, name) is None}
    return dataclasses.replace(config, **taken)


def load_networks(
    run: Path,
    data: Data,
    classes: tuple[str, ...],
    generator: nn.Module,
    ema: nn.Module | None,
    critic: nn.Module,
) -> None:
    """Load the networks of the newest whole checkpoint of ``run``, in place, for training on ``data`` of ``classes``.

    Raises:
        InputError: There is none, or its networks are of another architecture or for samples of another shape.
    """
    description = Description.read(run)
    shape = description.sample_shape
    if description.classes != classes:
        theirs, own = (listed(names) if names else "none" for names in (description.classes, classes))
        raise InputError(f"init_from {run} is conditional on classes {theirs}; here they are {own}: see --conditional")
    if shape != data.sample_shape:
        raise InputError(
            f"init_from {run} makes samples of shape {list(shape)}, data {data.name} has {list(data.sample_shape)}"
        )
    checkpoint = load_checkpoint(run)
    if checkpoint is None:
        raise InputError(f"init_from {run} has no checkpoint yet")
    state, path = checkpoint.state, checkpoint.path
    load_module(generator, state["generator"], "generator", path)
    load_module(critic, state["critic"], "critic", path)
    if ema is not None:
        load_module(ema, state["ema"] or state["generator"], "generator", path)
